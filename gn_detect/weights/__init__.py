"""Checkpoints of many libraries: read without running what they contain, translated, loaded, saved whole."""

from .architecture import Architecture, read_architecture
from .checkpoint import SUFFIXES, Checkpoint, read_checkpoint, save_weights
from .convention import InputConvention, as_command_line
from .load import LoadReport, Mismatch, implied_keys, load_weights
from .norm_settings import (
    NORM_EPS,
    NORM_GROUPS,
    as_metadata,
    group_keys,
    norm_eps_of,
    norm_groups_of,
    norm_settings,
    set_norm_eps,
)
from .translate import Translation, translate

__all__ = [
    "NORM_EPS",
    "NORM_GROUPS",
    "SUFFIXES",
    "Architecture",
    "Checkpoint",
    "InputConvention",
    "LoadReport",
    "Mismatch",
    "Translation",
    "as_command_line",
    "as_metadata",
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
    "translate",
]
