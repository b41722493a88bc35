"""Outlines of the demo dataset's eight categories, and their masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
import pycocotools.mask as coco_mask

# Category id -> name. The ids have gaps, as COCO's do, to exercise the mapping to labels.
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

MIN_SIZE, MAX_SIZE = 12, 160  # pixels of the longer side of an object's box
MAX_TURN = math.radians(40)  # objects stand about upright, as most things in photos do


@dataclass(frozen=True)
class Outline:
    """A closed outline and perhaps a hole, each (K, 2) float64 ``x, y`` in pixels, rounded to two decimals.

    The last bits of sin and cos differ between machines, and must not matter.
    """

    outer: np.ndarray
    hole: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("outer", "hole"):
            points = getattr(self, name)
            object.__setattr__(self, name, None if points is None else np.round(points, 2))

    def moved(self, x: float, y: float) -> Outline:
        """Return the outline shifted by (x, y) pixels."""
        shift = np.array([x, y])
        return Outline(self.outer + shift, None if self.hole is None else self.hole + shift)

    def inside(self, height: int, width: int) -> bool:
        """Return whether the outline stays within an image of this size."""
        low, high = self.outer.min(axis=0), self.outer.max(axis=0)
        return bool(low.min() >= 0 and high[0] <= width and high[1] <= height)

    def mask(self, height: int, width: int) -> np.ndarray:
        """Return the pixels as COCO rasterises polygons: bool (height, width)."""
        mask = _rasterize(self.outer, height, width)
        if self.hole is not None:
            mask &= ~_rasterize(self.hole, height, width)
        return mask


def make_outline(category_id: int, size: float, random: Random) -> Outline:
    """Return a shape of the category, stretched a little and turned at random, centred on (0, 0).

    Args:
        category_id: key of :data:`CATEGORIES`.
        size: longer side of its box in pixels.
        random: source of stretch, rotation and proportions.
    """
    outer, hole = _unit_shape(CATEGORIES[category_id], random)
    stretch = math.exp(random.uniform(-0.15, 0.15))
    angle = random.uniform(-MAX_TURN, MAX_TURN)
    cosine, sine = math.cos(angle), math.sin(angle)
    transform = np.array([[cosine, -sine], [sine, cosine]]) @ np.diag([stretch, 1 / stretch])
    outer = outer @ transform.T
    low, high = outer.min(axis=0), outer.max(axis=0)
    centre, scale = (low + high) / 2, size / (high - low).max()
    hole = None if hole is None else (hole @ transform.T - centre) * scale
    return Outline((outer - centre) * scale, hole)


def _rasterize(points: np.ndarray, height: int, width: int) -> np.ndarray:
    return coco_mask.decode(coco_mask.frPyObjects([points.reshape(-1).tolist()], height, width))[..., 0] > 0


def _circle(radius: float = 1.0, points: int = 40) -> np.ndarray:
    return _arc(radius, 0.0, 0.0, 2 * math.pi * (1 - 1 / points), points)


def _arc(radius: float, x: float, start: float, stop: float, points: int) -> np.ndarray:
    """Return points of a circle around (x, 0) from angle ``start`` to ``stop``."""
    angles = np.linspace(start, stop, points)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + np.array([x, 0.0])


def _unit_shape(name: str, random: Random) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the outline of a category, and a hole or None, with radius 1 before its size is known."""
    match name:
        case "disc":
            return _circle(), None
        case "square":
            return np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]), None
        case "triangle":
            return _circle(points=3), None
        case "star":
            points = _circle(points=10)
            points[1::2] *= random.uniform(0.40, 0.48)
            return points, None
        case "ring":
            return _circle(), _circle(random.uniform(0.5, 0.6), 32)
        case "cross":
            a = random.uniform(0.30, 0.38)
            quarter = np.array([[a, -1.0], [a, -a], [1, -a]])
            turns = [np.array([[0, -1], [1, 0]]), np.array([[-1, 0], [0, -1]]), np.array([[0, 1], [-1, 0]])]
            return np.concatenate([quarter] + [quarter @ turn.T for turn in turns]), None
        case "crescent":  # a unit disc without a disc of the same size to its right
            offset = random.uniform(0.65, 0.85)
            half = math.acos(offset / 2)  # angle of the two horns seen from the centre
            back = _arc(1.0, 0.0, half, 2 * math.pi - half, 36)
            front = _arc(1.0, offset, math.pi + half, math.pi - half, 28)
            return np.concatenate([back, front[1:-1]]), None
        case _:  # arrow
            shaft, neck = random.uniform(0.22, 0.30), random.uniform(-0.05, 0.15)
            top = np.array([[-1.0, -shaft], [neck, -shaft], [neck, -0.8]])
            return np.concatenate([top, [[1.0, 0.0]], top[::-1] * [1, -1]]), None
