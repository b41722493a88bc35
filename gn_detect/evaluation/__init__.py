"""COCO box and mask AP."""

from .coco import METRICS, evaluate_results
from .model import detections_to_coco, evaluate_model
from .table import format_results

__all__ = ["METRICS", "detections_to_coco", "evaluate_model", "evaluate_results", "format_results"]
