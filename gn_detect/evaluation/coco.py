"""Box and mask AP as COCO defines them (https://cocodataset.org/#detection-eval)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.coco.canonical import CocoFile
from .backends import Evaluators, choose_backend
from .coco_data import GroundTruth, Json, prepare_ground_truth
from .detections import prepare_detections
from .diagnosis import diagnose
from .results_file import without_collector

Annotations = str | Path | Mapping[str, Any] | CocoFile
Results = str | Path | Sequence[Mapping[str, Any]]

IOU_TYPES = ("bbox", "segm")
BOUNDARY = "boundary"
# Averages over the IoU thresholds 0.5, 0.55, ..., 0.95, except for AP50 and AP75. s, m and l are areas of
# less than 32^2, up to 96^2 and more square pixels. AR1 to AR100 limit the detections of an image.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

_IOU_50, _IOU_75 = 0, 5
_ALL = 0  # areas; then small, medium and large
_MAX_100 = 2

_CATEGORIES = 2000  # evaluated at once


def evaluate_results(
    annotations_json: Annotations, results_json: Results, iou_type: str, backend: str | None = None
) -> dict[str, float]:
    """Return COCO's twelve numbers and the AP of each category, in percent; see :func:`evaluate_kinds`."""
    return evaluate_kinds(annotations_json, results_json, [iou_type], backend)[iou_type]


def evaluate_kinds(
    annotations_json: Annotations,
    results_json: Results,
    iou_types: Sequence[str] = IOU_TYPES,
    backend: str | None = None,
) -> dict[str, dict[str, float]]:
    """Return COCO's twelve numbers and the AP of each category, in percent, of boxes and masks together.

    Both files are parsed once.

    Args:
        annotations_json: COCO ground truth: a file, its content, or what :func:`read_annotations` returned.
        results_json: COCO results, a file or its content; may be empty.
        iou_types: some of ``"bbox"``, ``"segm"`` and ``"boundary"``. With the last two the areas of
            detections are those of their masks. ``"boundary"`` is the Boundary AP
            (https://arxiv.org/abs/2103.16562), which pycocotools computes whatever the backend is.
        backend: ``"pycocotools"`` (the reference), ``"hotcoco"`` or ``"faster_coco_eval"``. None and
            ``"auto"`` choose the fastest installed one that is proven to give the same numbers.

    Returns:
        For each IoU type :data:`METRICS` and ``AP-<category name>``; nan if the ground truth has nothing to
        find.

    Raises:
        UserError: a file is missing or wrong, a detection belongs to an unknown image or category, or the
            backend is not installed.
        ValueError: an unknown IoU type.
    """
    return evaluate_and_diagnose(annotations_json, results_json, iou_types, backend, only_metrics=True)[0]


def evaluate_and_diagnose(
    annotations_json: Annotations,
    results_json: Results,
    iou_types: Sequence[str] = IOU_TYPES,
    backend: str | None = None,
    *,
    only_metrics: bool = False,
) -> tuple[dict[str, dict[str, float]], dict[str, Json]]:
    """Return what :func:`evaluate_kinds` does, and for each IoU type the result of :func:`diagnose`.

    Arguments and errors are those of :func:`evaluate_kinds`. With ``only_metrics`` the second result is
    empty.
    """
    for iou_type in iou_types:
        if iou_type not in (*IOU_TYPES, BOUNDARY):
            raise ValueError(f"iou_type must be 'bbox', 'segm' or 'boundary', not {iou_type!r}")
    backend = choose_backend(backend)
    kinds = [kind for kind in IOU_TYPES if kind in iou_types or (kind == "segm" and BOUNDARY in iou_types)]
    with without_collector():
        truth = prepare_ground_truth(annotations_json, kinds[-1])
        table = prepare_detections(results_json, truth, kinds)
        evaluators = Evaluators(truth, table, backend)
        metrics = {iou_type: _metrics(truth, evaluators, iou_type) for iou_type in iou_types}
        diagnosed = [] if only_metrics else [kind for kind in IOU_TYPES if kind in iou_types]
        return metrics, {kind: diagnose(truth, table, evaluators, kind) for kind in diagnosed}


def _metrics(truth: GroundTruth, evaluators: Evaluators, iou_type: str) -> dict[str, float]:
    labels = truth.labels
    numbers = {f"AP-{label}": float("nan") for label in labels}
    sums, counts = dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 0)
    for categories, precision, recall in evaluate_categories(truth, evaluators, iou_type):
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
    truth: GroundTruth, evaluators: Evaluators, iou_type: str
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Evaluate the categories that have annotations, some at a time: each takes 100 KB and more.

    Args:
        truth: the ground truth of the evaluators.
        evaluators: a backend with the data.
        iou_type: ``"bbox"`` or ``"segm"``.

    Yields:
        positions of categories in ``truth.labels``, their precision and their recall, see
        :meth:`Evaluators.precision_and_recall`.
    """
    present = sorted({annotation["category_id"] for annotation in truth.annotations(iou_type)})
    for first in range(0, len(present), _CATEGORIES):
        part = present[first : first + _CATEGORIES]
        yield [number - 1 for number in part], *evaluators.precision_and_recall(iou_type, part)


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
