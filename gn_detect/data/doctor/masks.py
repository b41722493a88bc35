"""Measures of one mask: its area, its box, whether a polygon crosses itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as coco_mask

from ..coco.image_table import ImageRecord
from ..transforms import polygon_bounds

_PAIRS = 1 << 18
"""Pairs of edges that are compared at once."""

_MOST_PAIRS = 10_000_000
"""Pairs of edges of a polygon that are compared, in seconds; a traced outline has some 20 for each point."""


@dataclass(frozen=True, slots=True)
class MaskMeasures:
    """Of the part of a mask inside the image.

    Attributes:
        area: pixels.
        box: ``xyxy``.
        rle: compressed RLE with text counts.
    """

    area: float
    box: list[float]
    rle: dict[str, object]


def measure_mask(polygons: Sequence[Sequence[float]], rle: bytes, image: ImageRecord) -> MaskMeasures:
    """Measures of valid polygons, or of the counts of a compressed RLE.

    Raises:
        ValueError: the RLE is damaged.
    """
    size = [image.height, image.width]
    if rle:
        encoded = {"size": size, "counts": rle}
        x, y, width, height = coco_mask.toBbox(encoded).tolist()
        box = [x, y, x + width, y + height]
    else:
        encoded = coco_mask.merge(coco_mask.frPyObjects([list(map(float, p)) for p in polygons], *size))
        box = polygon_bounds([np.array(p, dtype=np.float64) for p in polygons], *size).tolist()
    text: dict[str, object] = {"size": size, "counts": bytes(encoded["counts"]).decode("ascii")}
    return MaskMeasures(float(coco_mask.area(encoded)), box, text)


def crosses_itself(polygon: Sequence[float]) -> bool:
    """Whether two edges of a closed polygon ``x0, y0, x1, y1, ...`` cross; touching is not crossing.

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
    """Whether segments ab and cd have one inner point in common: each has the other's ends on both sides."""
    return (_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)


def _side(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    """1, 0 or -1 for p left of, on or right of the line ab."""
    (ux, uy), (vx, vy) = np.moveaxis(b - a, -1, 0), np.moveaxis(p - a, -1, 0)
    return np.sign(ux * vy - uy * vx)
