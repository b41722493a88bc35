"""Outlines of the demo dataset's eight categories, and their masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import pycocotools.mask as coco_mask

CATEGORIES: dict[int, str] = {
    1: "disc",
    2: "square",
    4: "triangle",
    5: "star",
    7: "ring",
    8: "cross",
    11: "crescent",
    13: "arrow",
}
"""Category id -> name. The ids have gaps, as COCO's do, so that the mapping to labels is exercised."""

MIN_SIZE, MAX_SIZE = 12, 160
"""Longer side of an object's box in pixels."""

MAX_TURN = math.radians(40)
"""Objects stand about upright, as most things in photos do."""


@dataclass(frozen=True)
class Outline:
    """A closed outline and possibly a hole, each (K, 2) float64 ``x, y`` in pixels, two decimals."""

    outer: np.ndarray
    hole: np.ndarray | None = None

    def moved(self, x: float, y: float) -> Outline:
        """The outline shifted by (x, y) pixels."""
        shift = np.array([x, y])
        hole = None if self.hole is None else _rounded(self.hole + shift)
        return Outline(_rounded(self.outer + shift), hole)

    def inside(self, height: int, width: int) -> bool:
        """Whether the outline stays within an image of this size."""
        low, high = self.outer.min(axis=0), self.outer.max(axis=0)
        return bool(low.min() >= 0 and high[0] <= width and high[1] <= height)

    def mask(self, height: int, width: int) -> np.ndarray:
        """The pixels as COCO rasterises polygons: bool (height, width)."""
        mask = _rasterize(self.outer, height, width)
        if self.hole is not None:
            mask &= ~_rasterize(self.hole, height, width)
        return mask

    def polygon(self) -> list[float]:
        """COCO's flat list ``[x0, y0, x1, y1, ...]``; the hole, which COCO cannot write so, is not in it."""
        return self.outer.reshape(-1).tolist()


def make_outline(category_id: int, size: float, random: Random) -> Outline:
    """A shape of the category, slightly stretched and turned at random.

    Args:
        category_id: key of :data:`CATEGORIES`.
        size: longer side of its box in pixels.
        random: source of stretch, rotation and proportions.

    Returns:
        The outline with its box centred on (0, 0).
    """
    outer, hole = _UNIT_SHAPES[CATEGORIES[category_id]](random)
    stretch = math.exp(random.uniform(-0.15, 0.15))
    angle = random.uniform(-MAX_TURN, MAX_TURN)
    cosine, sine = math.cos(angle), math.sin(angle)
    transform = np.array([[cosine, -sine], [sine, cosine]]) @ np.diag([stretch, 1 / stretch])
    outer = outer @ transform.T
    low, high = outer.min(axis=0), outer.max(axis=0)
    centre, scale = (low + high) / 2, size / (high - low).max()
    turned_hole = None if hole is None else _rounded((hole @ transform.T - centre) * scale)
    return Outline(_rounded((outer - centre) * scale), turned_hole)


def _rounded(points: np.ndarray) -> np.ndarray:
    """Two decimals, as in COCO: the last bits of sin and cos differ between machines and must not matter."""
    return np.round(points, 2)


def _rasterize(points: np.ndarray, height: int, width: int) -> np.ndarray:
    return coco_mask.decode(coco_mask.frPyObjects([points.reshape(-1).tolist()], height, width))[..., 0] > 0


UnitShape = tuple[np.ndarray, np.ndarray | None]


def _circle(radius: float, centre: tuple[float, float] = (0.0, 0.0), points: int = 40) -> np.ndarray:
    return _arc(radius, centre, 0.0, 2 * math.pi * (1 - 1 / points), points)


def _arc(radius: float, centre: tuple[float, float], start: float, stop: float, points: int) -> np.ndarray:
    angles = np.linspace(start, stop, points)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + np.array(centre)


def _disc(random: Random) -> UnitShape:
    return _circle(1.0), None


def _square(random: Random) -> UnitShape:
    return np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]), None


def _triangle(random: Random) -> UnitShape:
    return _circle(1.0, points=3), None


def _star(random: Random) -> UnitShape:
    points = _circle(1.0, points=10)
    points[1::2] *= random.uniform(0.40, 0.48)
    return points, None


def _ring(random: Random) -> UnitShape:
    return _circle(1.0), _circle(random.uniform(0.5, 0.6), points=32)


def _cross(random: Random) -> UnitShape:
    a = random.uniform(0.30, 0.38)
    quarter = np.array([[a, -1.0], [a, -a], [1, -a]])
    turns = [np.array([[0, -1], [1, 0]]), np.array([[-1, 0], [0, -1]]), np.array([[0, 1], [-1, 0]])]
    return np.concatenate([quarter] + [quarter @ turn.T for turn in turns]), None


def _crescent(random: Random) -> UnitShape:
    """A unit disc less a disc of the same size moved to the right."""
    offset = random.uniform(0.65, 0.85)
    half = math.acos(offset / 2)  # angle of the two horns seen from the centre
    back = _arc(1.0, (0.0, 0.0), half, 2 * math.pi - half, 36)
    front = _arc(1.0, (offset, 0.0), math.pi + half, math.pi - half, 28)
    return np.concatenate([back, front[1:-1]]), None


def _arrow(random: Random) -> UnitShape:
    shaft, neck = random.uniform(0.22, 0.30), random.uniform(-0.05, 0.15)
    top = np.array([[-1.0, -shaft], [neck, -shaft], [neck, -0.8]])
    return np.concatenate([top, [[1.0, 0.0]], top[::-1] * [1, -1]]), None


_UNIT_SHAPES = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "crescent": _crescent,
    "arrow": _arrow,
}
