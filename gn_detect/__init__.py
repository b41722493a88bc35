"""Mask R-CNN with Group Normalization: training, evaluation, conversion and detectron2's checkpoints.

The names below are loaded when they are first used, so that importing one part does not import all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import convert, data, evaluation, layers, modeling, ops, weights
    from .config import Config, load_config
    from .conversion import convert_checkpoint
    from .convert import calibrate, convert_norm
    from .engine import Predictor, evaluate, train
    from .errors import UserError
    from .layers import GroupNorm, fuse
    from .modeling import build_model
    from .weights import load_weights

__version__ = "0.1.0"

__all__ = [
    "Config",
    "GroupNorm",
    "Predictor",
    "UserError",
    "__version__",
    "build_model",
    "calibrate",
    "convert",
    "convert_checkpoint",
    "convert_norm",
    "data",
    "evaluate",
    "evaluation",
    "fuse",
    "layers",
    "load_config",
    "load_weights",
    "modeling",
    "ops",
    "train",
    "weights",
]

_HOME = {
    "Config": "config",
    "GroupNorm": "layers",
    "Predictor": "engine",
    "UserError": "errors",
    "build_model": "modeling",
    "calibrate": "convert",
    "convert_checkpoint": "conversion",
    "convert_norm": "convert",
    "evaluate": "engine",
    "fuse": "layers",
    "load_config": "config",
    "load_weights": "weights",
    "train": "engine",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
