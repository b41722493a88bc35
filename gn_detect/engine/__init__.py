"""Training, evaluation and prediction."""

from .black_box import replay
from .distributed import launch, scale_config
from .evaluator import evaluate
from .exported import ExportedPredictor
from .optimizer import build_optimizer
from .predictor import Predictor
from .schedule import learning_rate_factor
from .trainer import train

__all__ = [
    "ExportedPredictor",
    "Predictor",
    "build_optimizer",
    "evaluate",
    "launch",
    "learning_rate_factor",
    "replay",
    "scale_config",
    "train",
]
