"""Compare a model's detections with the ground truth: by recall, by category and by image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation import (
    IN_CROWD,
    NOTHING,
    DetectionTable,
    Evaluators,
    Truth,
    choose_backend,
    confusion_matrix,
    diagnose,
    evaluate_categories,
    match_objects,
    prepare_detections,
    prepare_ground_truth,
)
from ..evaluation.coco_data import GroundTruth, Json
from ..progress import progress_bar

RECALLS = np.linspace(0, 1, 101)  # the recalls of COCO's precision
IOU_AVERAGES = {"0.50:0.95": slice(None), "0.50": slice(0, 1), "0.75": slice(5, 6)}  # its rows of each curve
_ALL_AREAS, _MOST_DETECTIONS = 0, 2


@dataclass(frozen=True)
class ImageResult:
    """One image at the report's score threshold.

    Attributes:
        image_id, file_name: the annotation file's.
        objects, detections: COCO entries; the objects include crowds.
        matched: see :func:`match_objects`.
        counts: numbers of objects (without crowds), of true positives, of objects detected as another class,
            of misses and of false positives.
        quality: the panoptic quality (https://arxiv.org/abs/1801.00868, equation 1) over all categories: the
            sum of the true positives' IoUs, divided by their number and half the number of mistakes. None
            without objects and detections.
    """

    image_id: Any
    file_name: str
    objects: list[Json]
    detections: list[Json]
    matched: np.ndarray
    counts: dict[str, int]
    quality: float | None

    def labels(self, truth: Truth) -> list[int]:
        """Return the labels of the categories of its objects and detections."""
        present = {entry["category_id"] for entry in [*self.objects, *self.detections]}
        return [label for label, category_id in enumerate(truth.category_ids) if category_id in present]


@dataclass(frozen=True)
class Analysis:
    """A comparison of a result file with its ground truth.

    Attributes:
        curves: by IoU type and name of :data:`IOU_AVERAGES`, (K, 101) precision in [0, 1] at
            :data:`RECALLS`; nan for a category without objects.
        confusion: see :func:`confusion_matrix`.
        images: in order of their ids.
        object_counts: numbers of objects in each category, without crowds.
        size_counts: numbers of small, medium and large objects, by area, without crowds.
        diagnosis: by IoU type, see :func:`diagnose`.
    """

    truth: Truth
    iou_type: str
    curves: dict[str, dict[str, np.ndarray]]
    confusion: np.ndarray
    images: list[ImageResult]
    object_counts: list[int]
    size_counts: dict[str, int]
    diagnosis: dict[str, Json]


def analyse(truth: Truth, results: Path, iou_types: Sequence[str], threshold: float) -> Analysis:
    """Compare a result file with its ground truth.

    Args:
        truth: with masks if the last of ``iou_types`` is ``"segm"``.
        results: COCO result file.
        iou_types: ``"bbox"``, ``"segm"`` or both; pictures are matched by the last one.
        threshold: least score of the detections in pictures and confusion; curves need all.

    Raises:
        UserError: the file is damaged, or belongs to another ground truth.
    """
    iou_type = iou_types[-1]
    prepared = prepare_ground_truth(truth.content, "segm" if "segm" in iou_types else "bbox")
    table = prepare_detections(results, prepared, iou_types)
    detections = _shown(truth, prepared, table, iou_type, threshold)
    evaluators = Evaluators(prepared, table, choose_backend(None))
    curves = {kind: _curves(prepared, evaluators, kind) for kind in iou_types}
    every = progress_bar(detections.items(), desc="comparing", unit="image")
    images = [_image(truth, image_id, found, iou_type) for image_id, found in every]
    confusion = confusion_matrix(
        [(image.objects, image.detections, image.matched) for image in images], truth.category_ids
    )
    objects = [entry for image in images for entry in image.objects if not entry["iscrowd"]]
    by_category = Counter(entry["category_id"] for entry in objects)
    sizes = Counter(_size_of(entry["area"]) for entry in objects)
    return Analysis(
        truth,
        iou_type,
        curves,
        confusion,
        images,
        [by_category[category_id] for category_id in truth.category_ids],
        {size: sizes[size] for size in ("small", "medium", "large")},
        {kind: diagnose(prepared, table, evaluators, kind) for kind in iou_types},
    )


def _shown(
    truth: Truth, prepared: GroundTruth, table: DetectionTable, iou_type: str, threshold: float
) -> dict[Any, list[Json]]:
    """Return the detections from the threshold on by image, with the ids of ``truth``."""
    image_ids, category_ids = list(prepared.images), list(prepared.categories)
    found: dict[Any, list[Json]] = {image_id: [] for image_id in truth.objects}
    for row in np.flatnonzero(table.scores >= threshold).tolist():
        entry = table.entry(row, iou_type)
        entry["image_id"] = image_ids[entry["image_id"] - 1]
        entry["category_id"] = category_ids[entry["category_id"] - 1]
        found[entry["image_id"]].append(entry)
    return found


def _curves(prepared: GroundTruth, evaluators: Evaluators, iou_type: str) -> dict[str, np.ndarray]:
    curves = {name: np.full((len(prepared.labels), len(RECALLS)), np.nan) for name in IOU_AVERAGES}
    for places, precision, _ in evaluate_categories(prepared, evaluators, iou_type):
        chosen = precision[..., _ALL_AREAS, _MOST_DETECTIONS]  # (10, 101, K)
        chosen = np.where(chosen > -1, chosen, np.nan)
        for name, rows in IOU_AVERAGES.items():
            curves[name][places] = chosen[rows].mean(axis=0).T
    return curves


def _image(truth: Truth, image_id: Any, found: list[Json], iou_type: str) -> ImageResult:
    objects = truth.objects[image_id]
    matched, iou = match_objects(objects, found, iou_type)
    pairs = [(index, partner) for index, partner in enumerate(matched.tolist()) if partner >= 0]
    right = [i for i, partner in pairs if objects[partner]["category_id"] == found[i]["category_id"]]
    number = sum(not entry["iscrowd"] for entry in objects)
    counts = {
        "objects": number,
        "found": len(right),
        "other class": len(pairs) - len(right),
        "missed": number - len(pairs),
        "false": int((matched == NOTHING).sum()),
    }
    wrong = (number - len(right)) + (len(found) - int((matched == IN_CROWD).sum()) - len(right))
    total = len(right) + wrong / 2
    quality = float(iou[right].sum() / total) if total else None
    return ImageResult(image_id, truth.file_names[image_id], objects, found, matched, counts, quality)


def _size_of(area: float) -> str:
    return "small" if area < 32**2 else "medium" if area < 96**2 else "large"


def condense(confusion: np.ndarray, names: Sequence[str], most: int = 18) -> tuple[np.ndarray, list[str]]:
    """Return a confusion matrix of the ``most`` categories with the most mistakes; the others become one.

    Args:
        confusion: (K + 1, K + 1), background last.
        names: names of the K categories.

    Returns:
        (L + 1, L + 1) with L at most ``most`` + 1, and L names.
    """
    count = len(names)
    if count <= most + 1:
        return confusion, list(names)
    wrong = confusion.sum(axis=0) + confusion.sum(axis=1) - 2 * confusion.diagonal()
    chosen = np.sort(np.argsort(-wrong[:count], kind="stable")[:most])
    group = np.full(count + 1, most)
    group[chosen], group[count] = np.arange(most), most + 1
    condensed = np.zeros((most + 2, most + 2), dtype=np.int64)
    np.add.at(condensed, (group[:, None], group[None, :]), confusion)
    return condensed, [*(names[i] for i in chosen), f"{count - most} others"]
