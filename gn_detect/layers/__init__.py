"""Modules from which detectors are built."""

from .conv import Conv2d, init_he, init_normal, init_xavier, make_conv
from .deform_conv import DeformConv2d
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
from .ws_conv import WSConv2d, fold_standardization, standardize_convs

__all__ = [
    "NORM_NAMES",
    "Conv2d",
    "DeformConv2d",
    "FrozenBatchNorm2d",
    "FrozenBatchNormAct2d",
    "GroupNorm",
    "GroupNormAct",
    "LayerNorm2d",
    "WSConv2d",
    "choose_groups",
    "fold_standardization",
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
    "standardize_convs",
]
