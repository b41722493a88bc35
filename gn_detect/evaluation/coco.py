"""Box and mask AP as COCO defines them (https://cocodataset.org/#detection-eval)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.coco.canonical import CocoFile
from .backends import choose_backend, precision_and_recall
from .coco_data import GroundTruth, prepare_detections, prepare_ground_truth

IOU_TYPES = ("bbox", "segm")
# Averages over the IoU thresholds 0.5, 0.55, ..., 0.95, except for AP50 and AP75. s, m and l are areas of
# less than 32^2, up to 96^2 and more square pixels. AR1 to AR100 limit the detections of an image.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

_IOU_50, _IOU_75 = 0, 5
_ALL = 0  # areas; then small, medium and large
_MAX_100 = 2

_CATEGORIES = 2000  # evaluated at once


def evaluate_results(
    annotations_json: str | Path | Mapping[str, Any] | CocoFile,
    results_json: str | Path | Sequence[Mapping[str, Any]],
    iou_type: str,
    backend: str | None = None,
) -> dict[str, float]:
    """Return COCO's twelve numbers and the AP of each category, in percent.

    Args:
        annotations_json: COCO ground truth: a file, its content, or what :func:`read_annotations` returned.
        results_json: COCO results, a file or its content; may be empty.
        iou_type: ``"bbox"`` or ``"segm"``. With ``"segm"`` the areas of detections are those of their masks.
        backend: ``"pycocotools"`` (the reference), ``"hotcoco"`` or ``"faster_coco_eval"``. None and
            ``"auto"`` choose the fastest installed one that is proven to give the same numbers.

    Returns:
        :data:`METRICS` and ``AP-<category name>``; nan if the ground truth has nothing to find.

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
    labels = truth.labels
    numbers = {f"AP-{label}": float("nan") for label in labels}
    sums, counts = dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 0)
    for categories, precision, recall in evaluate_categories(truth, detections, iou_type, backend):
        for name, values in _select(precision, recall).items():
            counted = values[values > -1]
            sums[name] += float(counted.sum())
            counts[name] += counted.size
        for k, category in enumerate(categories):
            numbers[f"AP-{labels[category]}"] = _mean(precision[:, :, k, _ALL, _MAX_100])
    return {
        name: sums[name] / counts[name] * 100 if counts[name] else float("nan") for name in METRICS
    } | numbers


def evaluate_categories(
    truth: GroundTruth, detections: Iterable[dict[str, Any]], iou_type: str, backend: str
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Evaluate the categories that have annotations, some at a time: each takes 100 KB and more.

    Args:
        truth, detections: as :mod:`.coco_data` prepares them.
        iou_type, backend: see :func:`precision_and_recall`.

    Yields:
        positions of categories in ``truth.labels``, their precision and their recall.
    """
    present = sorted({annotation["category_id"] for annotation in truth.coco["annotations"]})
    parts = [present[i : i + _CATEGORIES] for i in range(0, len(present), _CATEGORIES)]
    if len(parts) > 1:
        detections = list(detections)
    for part in parts or [[]]:
        chosen = frozenset(part)
        found = (detection for detection in detections if detection["category_id"] in chosen)
        if not part:
            for _ in found:  # checks all of them
                pass
            return
        coco = truth.coco | {
            key: [entry for entry in truth.coco[key] if entry[name] in chosen]
            for key, name in (("categories", "id"), ("annotations", "category_id"))
        }
        yield [number - 1 for number in part], *precision_and_recall(coco, found, iou_type, backend)


def _select(precision: np.ndarray, recall: np.ndarray) -> dict[str, np.ndarray]:
    """Return the values whose mean is each of :data:`METRICS`."""
    values = {
        "AP50": precision[_IOU_50, ..., _ALL, _MAX_100],
        "AP75": precision[_IOU_75, ..., _ALL, _MAX_100],
        "AR1": recall[..., _ALL, 0],
        "AR10": recall[..., _ALL, 1],
    }
    for area, (ap, ar) in enumerate((("AP", "AR100"), ("APs", "ARs"), ("APm", "ARm"), ("APl", "ARl"))):
        values[ap], values[ar] = precision[..., area, _MAX_100], recall[..., area, _MAX_100]
    return values


def _mean(values: np.ndarray) -> float:
    """Return a mean in percent; entries of -1, with nothing to find, do not count."""
    counted = values[values > -1]
    return float(np.mean(counted)) * 100 if counted.size else float("nan")
