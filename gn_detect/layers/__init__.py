"""Modules from which detectors are built."""

from .conv import Conv2d
from .fuse import fuse, has_hooks
from .groups import choose_groups
from .norm import (
    NORM_NAMES,
    FrozenBatchNorm2d,
    GroupNorm,
    GroupNormAct,
    LayerNorm2d,
    is_norm,
    make_norm,
)

__all__ = [
    "NORM_NAMES",
    "Conv2d",
    "FrozenBatchNorm2d",
    "GroupNorm",
    "GroupNormAct",
    "LayerNorm2d",
    "choose_groups",
    "fuse",
    "has_hooks",
    "is_norm",
    "make_norm",
]
