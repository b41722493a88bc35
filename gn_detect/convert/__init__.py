"""Convert BatchNorm models to GroupNorm models that compute nearly the same function."""

from .calibrate import calibrate
from .report import ConversionReport, LayerReport
from .state_dict import convert_state_dict
from .surgery import convert_norm

__all__ = ["ConversionReport", "LayerReport", "calibrate", "convert_norm", "convert_state_dict"]
