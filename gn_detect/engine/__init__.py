"""Training, evaluation and prediction."""

from .divergence import replay
from .evaluator import evaluate
from .image_detections import ImageDetections
from .optimizer import build_optimizer, learning_rate_factor
from .predictor import Predictor
from .trainer import train

__all__ = [
    "ImageDetections",
    "Predictor",
    "build_optimizer",
    "evaluate",
    "learning_rate_factor",
    "replay",
    "train",
]
