"""Which detection found which object: for pictures and confusion, not for AP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

NOTHING, IN_CROWD = -1, -2

Json = dict[str, Any]


def match_objects(
    objects: Sequence[Json], detections: Sequence[Json], iou_type: str, iou_threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Give each detection an object of its own, in the order of their scores.

    Of the objects that it overlaps enough and that are free, a detection gets the one with the highest IoU
    among those of its category, or else among all: another category is a confusion, not a miss beside a
    false alarm.

    Args:
        objects, detections: of one image, as COCO entries with ``category_id`` and, by ``iou_type``,
            ``bbox`` or ``segmentation`` as RLE; detections have ``score``, objects may have ``iscrowd``.
        iou_type: ``"bbox"`` or ``"segm"``.
        iou_threshold: the least IoU of a pair.

    Returns:
        (M,) int64 for each detection the index of its object, :data:`NOTHING` for a false alarm, or
        :data:`IN_CROWD` where it lies in a crowd and does not count; and (M,) float64 the IoU of each pair.
    """
    key = "bbox" if iou_type == "bbox" else "segmentation"
    matched, overlap = np.full(len(detections), NOTHING), np.zeros(len(detections))
    if not objects or not detections:
        return matched, overlap
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in objects])
    iou = np.asarray(
        coco_mask.iou([entry[key] for entry in detections], [entry[key] for entry in objects], crowd.tolist())
    )
    same = np.array([[d["category_id"] == o["category_id"] for o in objects] for d in detections])
    free = ~crowd
    for row in np.argsort([-entry["score"] for entry in detections], kind="stable"):
        enough = iou[row] >= iou_threshold
        for allowed in (enough & free & same[row], enough & free):
            if allowed.any():
                partner = int(np.where(allowed, iou[row], -1.0).argmax())
                matched[row], overlap[row], free[partner] = partner, iou[row, partner], False
                break
        else:
            if (enough & crowd).any():
                matched[row] = IN_CROWD
    return matched, overlap


def confusion_matrix(
    images: Sequence[tuple[Sequence[Json], Sequence[Json], np.ndarray]], category_ids: Sequence[int]
) -> np.ndarray:
    """How often an object of each category was taken for each.

    Args:
        images: objects, detections and :func:`match_objects`' first result of each image.
        category_ids: in the order of rows and columns.

    Returns:
        (K + 1, K + 1) int64: rows are what it is, columns what it was taken for; the last row are false
        alarms (it is background), the last column misses. Crowds do not count.
    """
    position = {category_id: number for number, category_id in enumerate(category_ids)}
    background = len(category_ids)
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    for objects, detections, matched in images:
        missed = {i for i, entry in enumerate(objects) if not entry.get("iscrowd", 0)}
        for entry, partner in zip(detections, matched.tolist(), strict=True):
            if partner == IN_CROWD:
                continue
            row = background if partner == NOTHING else position[objects[partner]["category_id"]]
            counts[row, position[entry["category_id"]]] += 1
            missed.discard(partner)
        for index in missed:
            counts[position[objects[index]["category_id"]], background] += 1
    return counts
