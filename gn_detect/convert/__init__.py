"""Convert BatchNorm models to GroupNorm models that compute nearly the same function."""

from .calibrate import calibrate
from .choose import choose_settings
from .report import ConversionReport, LayerReport
from .state_dict import convert_state_dict
from .surgery import convert_norm

__all__ = [
    "ConversionReport", "LayerReport", "calibrate", "choose_settings", "convert_norm", "convert_state_dict",
]  # fmt: skip
