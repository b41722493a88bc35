"""Say why an AP is what it is: what errors cost, and how far scores can be believed. At IoU 0.5."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from .backends import Evaluators, Pairs
from .bootstrap import Ranked, average_precision
from .coco_data import GroundTruth
from .detections import DetectionTable

ERRORS = ("classification", "localisation", "both", "duplicate", "background", "missed")
"""Kinds of errors in TIDE (https://arxiv.org/abs/2008.08115, section 2.2)."""

IOU, LEAST_IOU = 0.5, 0.1  # of a hit; of a detection that means an object. Both are TIDE's
BINS = 10  # of scores

_CLASS, _PLACE, _BOTH, _DUPLICATE, _BACKGROUND, _MISSED = range(len(ERRORS))
_NO_ERROR = -1

Json = dict[str, Any]


def diagnose(truth: GroundTruth, table: DetectionTable, evaluators: Evaluators, iou_type: str) -> Json:
    """Return errors, score thresholds and calibration as JSON values; all but scores in percent.

    Args:
        truth, table, evaluators: of one dataset.
        iou_type: ``"bbox"`` or ``"segm"``.

    Returns:
        ``errors``: for each of :data:`ERRORS` its ``count`` and ``AP50_lost``. ``thresholds``: by category
        the least score with the best F1, with F1, precision and recall from it on; None for a category
        without a true positive. ``threshold``: the same of all categories together. ``calibration``: by score
        the ``count`` of detections, their mean ``score`` and their ``precision``; and the ``error``, the
        expected calibration error (https://arxiv.org/abs/1706.04599, equation 3).
    """
    pairs = evaluators.pairs(iou_type)
    objects = np.zeros(len(truth.labels), dtype=np.int64)
    for entry in truth.annotations(iou_type):
        objects[entry["category_id"] - 1] += not entry["iscrowd"]
    counted = ~pairs.ignored
    scores, hits, labels = (x[counted] for x in (pairs.scores, pairs.objects > 0, pairs.categories - 1))
    return {
        "errors": _errors(truth, table, pairs, objects, iou_type),
        "threshold": best_threshold(scores, hits, int(objects.sum())),
        "thresholds": {
            name: best_threshold(scores[labels == label], hits[labels == label], int(objects[label]))
            for label, name in enumerate(truth.labels)
        },
        "calibration": calibration(scores, hits),
    }


def best_threshold(scores: np.ndarray, hits: np.ndarray, objects: int) -> Json | None:
    """Return the least score with the best F1, the highest such one, with its F1, precision and recall.

    Args:
        scores: (D,) of detections.
        hits: (D,) bool, true positives.
        objects: number of objects to find.
    """
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(hits[order])
    if not len(found) or not found[-1]:
        return None
    last = np.append(scores[1:] < scores[:-1], True)  # of equal scores all are kept or none
    kept = np.arange(1, len(scores) + 1)
    f1 = np.where(last, 2 * found / (kept + objects), 0.0)
    best = int(f1.argmax())
    return {
        "score": float(scores[best]),
        "F1": 100 * float(f1[best]),
        "precision": 100 * float(found[best] / kept[best]),
        "recall": 100 * float(found[best] / objects),
    }


def calibration(scores: np.ndarray, hits: np.ndarray) -> Json:
    """Return how often detections of like scores are true positives.

    Args:
        scores: (D,) in [0, 1].
        hits: (D,) bool, true positives.
    """
    numbers = np.clip((scores * BINS).astype(np.int64), 0, BINS - 1)
    counts = np.bincount(numbers, minlength=BINS)
    sums, true = (np.bincount(numbers, weights=x, minlength=BINS) for x in (scores, hits))
    bins = [
        {
            "from": number / BINS,
            "to": (number + 1) / BINS,
            "count": int(count),
            "score": float(sums[number] / count) if count else None,
            "precision": 100 * float(true[number] / count) if count else None,
        }
        for number, count in enumerate(counts)
    ]
    error = 100 * float(np.abs(sums - true).sum() / len(scores)) if len(scores) else None
    return {"error": error, "bins": bins}


def _errors(
    truth: GroundTruth, table: DetectionTable, pairs: Pairs, objects: np.ndarray, iou_type: str
) -> dict[str, Json]:
    """Return the number of errors of each kind, and the AP50 that is gained if they alone are mended.

    As in TIDE's published program, a mended error of classification or localisation becomes a true positive
    if no detection has its object, and only the best one of each object. Other errors are removed. An object
    is missed if no detection means it; a missed one counts no more. Unlike there, a category without an
    object has no AP, as in COCO, and one of which nothing is left to find has an AP of 100.
    """
    found = _Errors.find(truth, table, pairs, iou_type)
    hits = pairs.objects > 0
    before = _average_precision(pairs.categories - 1, pairs.scores, hits, pairs.ignored, objects, objects)
    lost = {}
    for number, name in enumerate(ERRORS):
        categories, left = pairs.categories - 1, objects
        mended, removed = found.mended & (found.kinds == number), found.kinds == number
        if number == _MISSED:
            left = objects - found.missed
        elif mended.any():
            categories = np.where(mended, found.categories - 1, categories)
        after = _average_precision(
            categories, pairs.scores, hits | mended, pairs.ignored | (removed & ~mended), left, objects
        )
        count = int(found.missed.sum()) if number == _MISSED else int(removed.sum())
        lost[name] = {"count": count, "AP50_lost": after - before}
    return lost


@dataclass(frozen=True)
class _Errors:
    """The error of each detection.

    Attributes:
        kinds: (D,) position in :data:`ERRORS`, or ``_NO_ERROR``.
        categories: (D,) number of the category of the object that an error of classification or localisation
            means.
        mended: (D,) bool, an error that becomes a true positive.
        missed: (K,) number of objects that no detection means.
    """

    kinds: np.ndarray
    categories: np.ndarray
    mended: np.ndarray
    missed: np.ndarray

    @classmethod
    def find(cls, truth: GroundTruth, table: DetectionTable, pairs: Pairs, iou_type: str) -> _Errors:
        """Find the error of each detection by its IoU with all objects of its image."""
        kinds = np.full(len(pairs), _NO_ERROR)
        categories, mended = np.zeros((2, len(pairs)), dtype=np.int64)
        meant: dict[int, int] = {}  # the best error of an object without a detection
        key = "bbox" if iou_type == "bbox" else "segmentation"
        entries = [entry for entry in truth.annotations(iou_type) if not entry["iscrowd"]]
        by_image: dict[int, list[Json]] = {}
        for entry in entries:
            by_image.setdefault(entry["image_id"], []).append(entry)
        taken = set(pairs.objects.tolist())
        wrong = np.flatnonzero(~pairs.ignored & (pairs.objects == 0))
        for image, places in _by_image(pairs.images, wrong):
            known = by_image.get(image, [])
            if not known:
                kinds[places] = _BACKGROUND
                continue
            rows = pairs.rows[places]
            shapes = table.boxes[rows].tolist() if iou_type == "bbox" else table.masks(rows)
            iou = np.asarray(coco_mask.iou(shapes, [entry[key] for entry in known], [0] * len(known)))
            numbers = np.array([entry["category_id"] for entry in known])
            same = pairs.categories[places, None] == numbers
            used = np.array([entry["id"] in taken for entry in known])
            own, other = np.where(same, iou, 0), np.where(same, 0, iou)
            kinds[places] = np.select(
                [
                    (own.max(axis=1) >= LEAST_IOU) & (own.max(axis=1) <= IOU),
                    other.max(axis=1) >= IOU,
                    (own * used).max(axis=1) >= IOU,
                    iou.max(axis=1) <= LEAST_IOU,
                ],
                [_PLACE, _CLASS, _DUPLICATE, _BACKGROUND],
                _BOTH,
            )
            partners = np.where(kinds[places] == _PLACE, own.argmax(axis=1), other.argmax(axis=1))
            categories[places] = numbers[partners]
            for place, partner in zip(places.tolist(), partners.tolist(), strict=True):
                if kinds[place] in (_PLACE, _CLASS) and not used[partner]:
                    best = meant.setdefault(known[partner]["id"], place)
                    if pairs.scores[place] > pairs.scores[best]:
                        meant[known[partner]["id"]] = place
        mended[list(meant.values())] = 1
        missed = np.zeros(len(truth.labels), dtype=np.int64)
        for entry in entries:
            missed[entry["category_id"] - 1] += entry["id"] not in taken and entry["id"] not in meant
        return cls(kinds, categories, mended.astype(bool), missed)


def _by_image(images: np.ndarray, places: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each image with those of the places that lie in it."""
    if not len(places):
        return
    numbers = images[places]
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    for part in np.split(places[order], starts[1:]):
        yield int(images[part[0]]), part


def _average_precision(
    labels: np.ndarray,
    scores: np.ndarray,
    hits: np.ndarray,
    ignored: np.ndarray,
    objects: np.ndarray,
    objects_before: np.ndarray,
) -> float:
    """Return the mean AP in percent over the categories with objects; nan without one."""
    once = np.ones((1, 1), dtype=np.int32)
    values = []
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], np.arange(len(objects) + 1))
    for label in np.flatnonzero(objects_before).tolist():
        if not objects[label]:
            values.append(1.0)
            continue
        part = order[bounds[label] : bounds[label + 1]]
        part = part[np.argsort(-scores[part], kind="stable")]
        ranked = Ranked(
            np.zeros(len(part), dtype=np.int64), hits[None, part], ignored[None, part], objects[[label]]
        )
        values.append(float(average_precision(ranked, once)[0, 0]))
    return 100 * float(np.mean(values)) if values else float("nan")
