"""Run a model on a dataset and compute COCO box and mask AP."""

from .backends import AREAS, Evaluators, choose_backend
from .bootstrap import Ranked, average_precision, draw_images, interval
from .coco import (
    BOUNDARY,
    METRICS,
    evaluate_and_diagnose,
    evaluate_categories,
    evaluate_kinds,
    evaluate_results,
)
from .coco_data import prepare_ground_truth, read_annotations
from .detections import DetectionTable, prepare_detections
from .diagnosis import ERRORS, diagnose
from .losses import VALIDATION, mean_losses
from .matching import IN_CROWD, NOTHING, confusion_matrix, match_objects
from .model import DIAGNOSIS, Interrupted, Stop, detections_to_coco, evaluate_model
from .results_file import ResultsWriter, read_entries
from .table import format_results
from .truth import Truth, read_truth

__all__ = [
    "AREAS",
    "BOUNDARY",
    "DIAGNOSIS",
    "ERRORS",
    "IN_CROWD",
    "METRICS",
    "NOTHING",
    "VALIDATION",
    "DetectionTable",
    "Evaluators",
    "Interrupted",
    "Ranked",
    "ResultsWriter",
    "Stop",
    "Truth",
    "average_precision",
    "choose_backend",
    "confusion_matrix",
    "detections_to_coco",
    "diagnose",
    "draw_images",
    "evaluate_and_diagnose",
    "evaluate_categories",
    "evaluate_kinds",
    "evaluate_model",
    "evaluate_results",
    "format_results",
    "interval",
    "match_objects",
    "mean_losses",
    "prepare_detections",
    "prepare_ground_truth",
    "read_annotations",
    "read_entries",
    "read_truth",
]
