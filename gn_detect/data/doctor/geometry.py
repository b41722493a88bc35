"""Compare boxes and masks with each other and with their image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..coco.numbers import is_area
from ..coco.tables import ImageRecord

# Pixels by which boxes and polygons may reach out of the image: COCO's tools round up to that.
BORDER = 1.0

# How far a side of a box may be from its mask's: COCO's own are up to 1 pixel off.
_BOX_PIXELS, _BOX_SHARE = 2.0, 0.05

# How much of an area may be missing: COCO's are those of polygons, not of pixels; 1 in 1,000 is 15% off.
_AREA_PIXELS, _AREA_SHARE = 20.0, 0.2

# Pairs of edges of a polygon: compared at once, and in all (some seconds). A traced outline has 20 for each
# point.
_PAIRS, _MOST_PAIRS = 1 << 18, 10_000_000


def overhang(box: Sequence[float], image: ImageRecord) -> float:
    """Return the pixels by which an ``xyxy`` box reaches out of the image on one side; negative inside."""
    return max(-box[0], -box[1], box[2] - image.width, box[3] - image.height)


def boxes_differ(boxes: np.ndarray, others: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return (N,) bool: some side of a box, cut to the image, is elsewhere than the other box's.

    Args:
        boxes, others: (N, 4) ``xyxy``; a nan differs from nothing.
        sizes: (N, 2) width and height of the images.
    """
    limits = np.concatenate([sizes, sizes], axis=1)
    cut, around = boxes.clip(0, limits), others.clip(0, limits)
    sides = np.maximum(cut[:, 2:] - cut[:, :2], around[:, 2:] - around[:, :2])
    allowed = np.maximum(_BOX_PIXELS, _BOX_SHARE * np.concatenate([sides, sides], axis=1))
    differ: np.ndarray = (np.abs(cut - around) > allowed).any(axis=1)
    return differ


def box_differs(box: Sequence[float], mask_box: Sequence[float], image: ImageRecord) -> bool:
    """Return whether an ``xyxy`` box is elsewhere than its mask's, as :func:`boxes_differ`."""
    sizes = np.array([[image.width, image.height]])
    return bool(boxes_differ(np.array([box], float), np.array([mask_box], float), sizes)[0])


def area_differs(area: Any, pixels: float) -> bool:
    """Return whether an annotation's area, where it is a proper one, is not that of its mask."""
    if not is_area(area):
        return False
    return bool(abs(area - pixels) > max(_AREA_PIXELS, _AREA_SHARE * max(area, pixels)))


def crosses_itself(polygon: Sequence[float]) -> bool:
    """Return whether two edges of a closed polygon ``x0, y0, x1, y1, ...`` cross; touching is not crossing.

    Edges are compared with those that they share an x with; where these are too many, the answer is no.
    """
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    count = len(points)
    if count < 4:
        return False
    start, end = points, np.roll(points, -1, axis=0)
    left, right = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
    order = np.argsort(left)
    start, end, right = start[order], end[order], right[order]
    others = np.searchsorted(left[order], right, side="right") - np.arange(count) - 1
    firsts = np.concatenate([[0], np.cumsum(others)])
    if firsts[-1] > _MOST_PAIRS:
        return False
    for pair in range(0, int(firsts[-1]), _PAIRS):
        pairs = np.arange(pair, min(pair + _PAIRS, firsts[-1]))
        one = np.searchsorted(firsts, pairs, side="right") - 1
        other = pairs - firsts[one] + one + 1
        if _cross(start[one], end[one], start[other], end[other]).any():
            return True
    return False


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return whether segments ab and cd share an inner point: each has the other's ends on both sides."""
    return (_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)


def _side(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return 1, 0 or -1 for p left of, on or right of the line ab."""
    (ux, uy), (vx, vy) = np.moveaxis(b - a, -1, 0), np.moveaxis(p - a, -1, 0)
    return np.sign(ux * vy - uy * vx)
