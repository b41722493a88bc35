"""Match detections with objects, for pictures and confusion. AP does not use this."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as coco_mask

from .coco_data import Json

NOTHING, IN_CROWD = -1, -2


def match_objects(
    objects: Sequence[Json], detections: Sequence[Json], iou_type: str, iou_threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Match each detection with its own object, in order of descending scores.

    A detection takes the free object with the highest IoU: among those of its category, or else among all.
    Another category is a confusion, not a miss and a false positive.

    Args:
        objects, detections: COCO entries of one image with ``category_id`` and, depending on ``iou_type``,
            ``bbox`` or ``segmentation`` as RLE. Detections have ``score``; objects may have ``iscrowd``.
        iou_type: ``"bbox"`` or ``"segm"``.
        iou_threshold: the least IoU of a pair.

    Returns:
        (M,) int64 the object's index for each detection, :data:`NOTHING` for a false positive, or
        :data:`IN_CROWD` for a detection in a crowd, which does not count; and (M,) float64 IoU of each pair.
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
        allowed = enough & free
        if (allowed & same[row]).any():
            allowed &= same[row]
        if allowed.any():
            partner = int(np.where(allowed, iou[row], -1.0).argmax())
            matched[row], overlap[row], free[partner] = partner, iou[row, partner], False
        elif (enough & crowd).any():
            matched[row] = IN_CROWD
    return matched, overlap


def confusion_matrix(
    images: Sequence[tuple[Sequence[Json], Sequence[Json], np.ndarray]], category_ids: Sequence[int]
) -> np.ndarray:
    """Count the detected categories of the objects of each category.

    Args:
        images: objects, detections and the first result of :func:`match_objects` for each image.
        category_ids: in the order of rows and columns.

    Returns:
        (K + 1, K + 1) int64: the row is the true category, the column the detected one. The last row counts
        false positives, the last column misses. Crowds do not count.
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
