"""Measures of one mask: its area, its box, whether a polygon crosses itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as coco_mask

from .image_table import ImageRecord
from .transforms import polygon_bounds

_MOST_PAIRS = 1_000_000
"""Of edges of a polygon that are compared. Traced outlines of many thousand points have less, as their edges
are short."""


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

    Polygons with too many edges above each other are not looked at: no.
    """
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    if len(points) < 4:
        return False
    start, end = points, np.roll(points, -1, axis=0)
    order = np.argsort(np.minimum(start[:, 0], end[:, 0]))
    start, end = start[order], end[order]
    left, right = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
    # The edges behind each one that begin, from left to right, before it ends.
    number = np.searchsorted(left, right, side="right") - np.arange(1, len(points) + 1)
    if number.sum() > _MOST_PAIRS:
        return False
    first = np.repeat(np.arange(len(points)), number)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(number) - number, number)
    return bool(_cross(start[first], end[first], start[second], end[second]).any())


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Whether segments ab and cd have one inner point in common: each has the other's ends on both sides."""
    return (_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)


def _side(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    """1, 0 or -1 for p left of, on or right of the line ab."""
    (ux, uy), (vx, vy) = np.moveaxis(b - a, -1, 0), np.moveaxis(p - a, -1, 0)
    return np.sign(ux * vy - uy * vx)
