"""Modules from which detectors are built."""

from .conv import Conv2d, init_he, init_normal, init_xavier, make_conv
from .fuse import fuse, fuse_relu, has_hooks
from .norm import (
    NORM_NAMES,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    GroupNorm,
    GroupNormAct,
    LayerNorm2d,
    choose_groups,
    frozen_norm,
    is_norm,
    make_norm,
)

__all__ = [
    "NORM_NAMES",
    "Conv2d",
    "FrozenBatchNorm2d",
    "FrozenBatchNormAct2d",
    "GroupNorm",
    "GroupNormAct",
    "LayerNorm2d",
    "choose_groups",
    "frozen_norm",
    "fuse",
    "fuse_relu",
    "has_hooks",
    "init_he",
    "init_normal",
    "init_xavier",
    "is_norm",
    "make_conv",
    "make_norm",
]
