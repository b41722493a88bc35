"""Boundary AP (https://arxiv.org/abs/2103.16562): masks are compared along their outlines, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from pycocotools.cocoeval import COCOeval

WIDTH = 0.02  # of the outlines, in diagonals of the image


class BoundaryEval(COCOeval):
    """COCO's evaluation of masks with, as IoU, the lesser one of the masks' and of their outlines'.

    The IoU with a crowd is the mask's alone, as in the authors' program.
    """

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        """Return (D, G) IoU of detections, best first, and objects; an empty list without any."""
        iou = super().computeIoU(imgId, catId)
        if not len(iou):
            return iou
        objects, detections = self._gts[imgId, catId], self._dts[imgId, catId]
        order = np.argsort([-entry["score"] for entry in detections], kind="mergesort")
        first, second = (
            [outline(entry["segmentation"]) for entry in entries]
            for entries in ([detections[i] for i in order[: self.params.maxDets[-1]]], objects)
        )
        of_outlines = coco_mask.iou(first, second, [0] * len(second))
        crowd = np.array([bool(entry["iscrowd"]) for entry in objects])
        return np.where(crowd, iou, np.minimum(iou, of_outlines))


def outline(mask: dict[str, Any]) -> dict[str, Any]:
    """Return the pixels of a mask that are near its edge or the image's, both as compressed RLE.

    A pixel is near if the square around it that reaches as far as :data:`WIDTH` holds a pixel outside.
    """
    height, width = mask["size"]
    x, y, w, h = (int(value) for value in coco_mask.toBbox(mask))
    reach = max(1, round(WIDTH * float(np.hypot(height, width))))
    side = 2 * reach + 1
    pixels = coco_mask.decode(mask)
    inside = np.pad(pixels[y : y + h, x : x + w].astype(np.int32), ((reach + 1, reach), (reach + 1, reach)))
    sums = inside.cumsum(axis=0).cumsum(axis=1)
    counts = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    pixels[y : y + h, x : x + w] &= counts < side**2
    found: dict[str, Any] = coco_mask.encode(np.asfortranarray(pixels))
    return found
