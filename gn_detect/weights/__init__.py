"""Checkpoints of many libraries: read without running what they contain, translated, loaded, saved whole."""

from .architecture import (
    CONFIG_KEYS,
    Architecture,
    read_architecture,
    untold_group_norms,
    untold_keys,
    untold_keys_of,
)
from .checkpoint import SUFFIXES, Checkpoint, read_checkpoint, save_weights
from .convention import InputConvention, as_command_line
from .load import LoadReport, Mismatch, implied_keys, load_weights
from .mmdetection_config import standardised_convs
from .names.classes import COCO_IDS
from .names.torchvision import computes_with_eps_0
from .norm_settings import (
    NORM_EPS,
    NORM_GROUPS,
    USUAL_EPS,
    as_metadata,
    group_keys,
    norm_eps_of,
    norm_groups_of,
    norm_settings,
    set_norm_eps,
)
from .translate import Translation, translate

__all__ = [
    "COCO_IDS",
    "CONFIG_KEYS",
    "NORM_EPS",
    "NORM_GROUPS",
    "SUFFIXES",
    "USUAL_EPS",
    "Architecture",
    "Checkpoint",
    "InputConvention",
    "LoadReport",
    "Mismatch",
    "Translation",
    "as_command_line",
    "as_metadata",
    "computes_with_eps_0",
    "group_keys",
    "implied_keys",
    "load_weights",
    "norm_eps_of",
    "norm_groups_of",
    "norm_settings",
    "read_architecture",
    "read_checkpoint",
    "save_weights",
    "set_norm_eps",
    "standardised_convs",
    "translate",
    "untold_group_norms",
    "untold_keys",
    "untold_keys_of",
]
