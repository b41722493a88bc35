"""Box and mask AP as COCO defines them (https://cocodataset.org/#detection-eval)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .backends import choose_backend, precision_and_recall
from .coco_data import prepare_detections, prepare_ground_truth

IOU_TYPES = ("bbox", "segm")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Averages over the IoU thresholds 0.5, 0.55, ..., 0.95 unless one is named; s, m and l are areas of less
than 32^2, up to 96^2 and more square pixels; AR1 to AR100 limit the detections of an image."""

_IOU_50, _IOU_75 = 0, 5
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)
_MAX_100 = 2


def evaluate_results(
    annotations_json: str | Path | Mapping[str, Any],
    results_json: str | Path | Sequence[Mapping[str, Any]],
    iou_type: str,
    backend: str | None = None,
) -> dict[str, float]:
    """COCO's twelve numbers and the AP of each category, in percent.

    Args:
        annotations_json: COCO ground truth, a file or its content.
        results_json: COCO results, a file or its content; may be empty.
        iou_type: ``"bbox"`` or ``"segm"``. With ``"segm"`` the areas of detections are those of their masks.
        backend: ``"pycocotools"`` (the reference), ``"hotcoco"``, ``"faster_coco_eval"``; None or ``"auto"``
            takes the fastest installed one that is proven to give the same numbers.

    Returns:
        :data:`METRICS` and ``AP-<category name>``; nan where the ground truth has nothing to find.

    Raises:
        UserError: a file is missing or wrong, a detection belongs to an unknown image or category, or the
            backend is not installed.
        ValueError: an unknown ``iou_type``.
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type must be 'bbox' or 'segm', not {iou_type!r}")
    backend = choose_backend(backend)
    truth = prepare_ground_truth(annotations_json, iou_type)
    detections = prepare_detections(results_json, truth, iou_type)
    precision, recall = precision_and_recall(truth.coco, detections, iou_type, backend)
    numbers = {
        "AP": _mean(precision[..., _ALL, _MAX_100]),
        "AP50": _mean(precision[_IOU_50, ..., _ALL, _MAX_100]),
        "AP75": _mean(precision[_IOU_75, ..., _ALL, _MAX_100]),
        "APs": _mean(precision[..., _SMALL, _MAX_100]),
        "APm": _mean(precision[..., _MEDIUM, _MAX_100]),
        "APl": _mean(precision[..., _LARGE, _MAX_100]),
        "AR1": _mean(recall[..., _ALL, 0]),
        "AR10": _mean(recall[..., _ALL, 1]),
        "AR100": _mean(recall[..., _ALL, _MAX_100]),
        "ARs": _mean(recall[..., _SMALL, _MAX_100]),
        "ARm": _mean(recall[..., _MEDIUM, _MAX_100]),
        "ARl": _mean(recall[..., _LARGE, _MAX_100]),
    }
    for k, label in enumerate(truth.labels):
        numbers[f"AP-{label}"] = _mean(precision[:, :, k, _ALL, _MAX_100])
    return numbers


def _mean(values: np.ndarray) -> float:
    """Percent; entries of -1 say that there is nothing to find."""
    counted = values[values > -1]
    return float(np.mean(counted)) * 100 if counted.size else float("nan")
