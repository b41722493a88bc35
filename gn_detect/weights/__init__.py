"""Checkpoints of many libraries: read without running what they contain, translated, loaded, saved whole."""

from .architecture import (
    Architecture,
    config_of_converted,
    known_config,
    library_config,
    norms_of_unspecified_groups,
    read_architecture,
    unspecified_keys,
    unspecified_keys_of,
)
from .checkpoint import SUFFIXES, Checkpoint, read_checkpoint, save_weights
from .convention import InputConvention, as_command_line
from .load import LoadReport, Mismatch, implied_keys, load_weights
from .metadata import USUAL_EPS, CheckpointMetadata
from .names.library import library_convention, refuse_other_padding, trunk_of, trunk_tensors
from .names.resnet import COCO_IDS
from .names.torchvision import computes_with_eps_0
from .norm_settings import (
    group_keys,
    norm_metadata,
    norm_settings,
    norms_of,
    set_norm_eps,
)
from .standardization import CONV_KEYS, folded
from .translate import Translation, translate

__all__ = [
    "COCO_IDS",
    "CONV_KEYS",
    "SUFFIXES",
    "USUAL_EPS",
    "Architecture",
    "Checkpoint",
    "CheckpointMetadata",
    "InputConvention",
    "LoadReport",
    "Mismatch",
    "Translation",
    "as_command_line",
    "computes_with_eps_0",
    "config_of_converted",
    "folded",
    "group_keys",
    "implied_keys",
    "known_config",
    "library_config",
    "library_convention",
    "load_weights",
    "norm_metadata",
    "norm_settings",
    "norms_of",
    "norms_of_unspecified_groups",
    "read_architecture",
    "read_checkpoint",
    "refuse_other_padding",
    "save_weights",
    "set_norm_eps",
    "translate",
    "trunk_of",
    "trunk_tensors",
    "unspecified_keys",
    "unspecified_keys_of",
]
