"""Checkpoints: read without running what they contain, loaded into a model, saved whole."""

from .checkpoint import Checkpoint, read_checkpoint, save_weights
from .load import LoadReport, Mismatch, load_weights

__all__ = ["Checkpoint", "LoadReport", "Mismatch", "load_weights", "read_checkpoint", "save_weights"]
