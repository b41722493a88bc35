"""Mask R-CNN with Group Normalization: training, evaluation, conversion and detectron2's checkpoints.

``import gn_detect`` is light: names and folders are loaded when they are used first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        bench,
        config,
        convert,
        data,
        distributed,
        engine,
        errors,
        evaluation,
        export,
        interop,
        layers,
        modeling,
        ops,
        report,
        structures,
        visualize,
        weights,
    )
    from .config import Config, load_config
    from .conversion import convert_checkpoint
    from .convert import calibrate, convert_norm
    from .engine import Predictor, evaluate, train
    from .errors import UserError
    from .finetuning import FineTuned, finetune
    from .layers import GroupNorm, fuse, fuse_relu
    from .modeling import build_model
    from .structures import Detections
    from .weights import load_weights

__version__ = "0.2.0"

__all__ = [
    "Config", "Detections", "FineTuned", "GroupNorm", "Predictor", "UserError", "__version__", "bench",
    "build_model", "calibrate", "config", "convert", "convert_checkpoint", "convert_norm", "data",
    "distributed", "engine", "errors", "evaluate", "evaluation", "export", "finetune", "fuse",
    "fuse_relu", "interop", "layers", "load_config", "load_weights", "modeling", "ops", "report",
    "structures", "train", "visualize", "weights",
]  # fmt: skip

_NAMES = {
    "config": "Config load_config",
    "conversion": "convert_checkpoint",
    "convert": "calibrate convert_norm",
    "engine": "Predictor evaluate train",
    "errors": "UserError",
    "finetuning": "FineTuned finetune",
    "layers": "GroupNorm fuse fuse_relu",
    "modeling": "build_model",
    "structures": "Detections",
    "weights": "load_weights",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
