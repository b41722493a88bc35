"""ONNX and torch.export programs: written, run, compared with the model."""

from .run import ExportedPredictor

__all__ = ["ExportedPredictor"]
