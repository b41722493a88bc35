"""Outlines, masks and textures of the demo dataset's eight categories, and its backgrounds."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from random import Random

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image, ImageDraw, ImageFilter

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


Colour = np.ndarray  # (3,) float32 RGB, 0..255
Generator = np.random.Generator

# Least distance in RGB between an object's colour and its surroundings: objects are not camouflaged.
CONTRAST = 90.0


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), dtype=np.float32) * 255


def _random_colour(random: Generator) -> Colour:
    return _hsv(random.random(), random.uniform(0.25, 1.0), random.uniform(0.25, 1.0))


def _clearance(colour: Colour, covered: list[Colour]) -> float:
    return min(float(np.linalg.norm(colour - other)) for other in covered)


def _contrasting_colour(random: Generator, covered: list[Colour]) -> Colour:
    """Return a random colour at least :data:`CONTRAST` from each in ``covered``, or the best of 40."""
    best, best_distance = _random_colour(random), -1.0
    for _ in range(40):
        colour = _random_colour(random)
        distance = _clearance(colour, covered)
        if distance >= CONTRAST:
            return colour
        if distance > best_distance:
            best, best_distance = colour, distance
    return best


def object_texture(height: int, width: int, covered: list[Colour], random: Generator) -> np.ndarray:
    """Return a patch that fills one object, float32 RGB (height, width, 3).

    Args:
        height, width: size of the patch in pixels.
        covered: mean colours of the areas that the object covers.
        random: source of colours and pattern.
    """
    first = _contrasting_colour(random, covered)
    # The second colour is near the first: the outline shows the category, not the pattern inside.
    step = random.standard_normal(3).astype(np.float32)
    step *= random.uniform(20, 60) / np.linalg.norm(step)
    second = max((first + step, first - step), key=lambda colour: _clearance(colour, covered))
    pattern = _pattern(height, width, random)
    patch = first + pattern[..., None] * (second - first)
    light = _ramp(height, width, random) * random.uniform(0.0, 0.25)
    return patch * (1.1 - light[..., None])


def background(height: int, width: int, random: Generator) -> np.ndarray:
    """Return smooth colours, noise of several scales, faint stripes and lines: float32 (height, width, 3)."""
    hue, saturation = random.random(), random.uniform(0.0, 0.5)
    value = random.uniform(0.2, 0.95)
    first = _hsv(hue, saturation, value)
    other_value = float(np.clip(value + random.uniform(-0.2, 0.2), 0.1, 1.0))
    second = _hsv(hue + random.uniform(-0.15, 0.15), saturation, other_value)
    canvas = first + _ramp(height, width, random)[..., None] * (second - first)
    for cell, most in ((64, 30.0), (20, 22.0), (6, 14.0), (2, 8.0)):
        amplitude = random.uniform(0.0, most)
        tint = 1 + 0.25 * random.standard_normal(3).astype(np.float32)
        canvas += amplitude * tint * _noise(height, width, cell, random)[..., None]
    if random.random() < 0.35:
        canvas += random.uniform(8, 20) * (_stripes(height, width, random)[..., None] - 0.5)
    return _with_lines(canvas, random)


def _with_lines(canvas: np.ndarray, random: Generator) -> np.ndarray:
    """Draw a few thin bent lines in colours near the background's; they are no objects."""
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    base = canvas.mean(axis=(0, 1))
    for _ in range(random.integers(0, 9)):
        corners = random.uniform(-0.1, 1.1, (3, 2)) * picture.size
        t = np.linspace(0, 1, 12)[:, None]
        curve = (1 - t) ** 2 * corners[0] + 2 * t * (1 - t) * corners[1] + t**2 * corners[2]
        colour = np.clip(base + random.uniform(-70, 70) + random.uniform(-20, 20, 3), 0, 255).astype(int)
        draw.line(curve.reshape(-1).tolist(), tuple(colour.tolist()), int(random.integers(1, 4)))
    return np.asarray(picture, dtype=np.float32)


def finish(canvas: np.ndarray, random: Generator) -> np.ndarray:
    """Add a slight blur, which softens the edges of the masks, and noise, as a camera does; uint8 RGB."""
    picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 0.8))), dtype=np.float32)
    noise = random.standard_normal(canvas.shape, dtype=np.float32) * random.uniform(1.0, 4.0)
    return np.clip(blurred + noise, 0, 255).astype(np.uint8)


def _pattern(height: int, width: int, random: Generator) -> np.ndarray:
    """Return one of six patterns, float32 (height, width) of about 0..1."""
    kind = random.integers(6)
    if kind == 0:
        return 0.15 * _noise(height, width, 8, random)
    if kind == 1:
        return _ramp(height, width, random)
    if kind == 2:
        return _stripes(height, width, random)
    if kind == 5:
        return np.clip(0.5 + 0.35 * _noise(height, width, 4, random), 0, 1)
    across, along = _grid(height, width, random)
    period = _period(height, width, random)
    if kind == 3:  # checks
        return ((across // (period / 2) + along // (period / 2)) % 2).astype(np.float32)
    distance = (across % period - period / 2) ** 2 + (along % period - period / 2) ** 2
    return (distance < (0.3 * period) ** 2).astype(np.float32)  # dots


def _grid(height: int, width: int, random: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates in a frame turned at random, with a random origin, in pixels."""
    angle = random.uniform(0, np.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    x, y = x + random.uniform(0, 32), y + random.uniform(0, 32)
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cosine + y * sine, y * cosine - x * sine


def _period(height: int, width: int, random: Generator) -> float:
    """Return pixels of a repeat: wide enough to be seen, narrow enough to be a texture."""
    return float(np.clip(max(height, width) * random.uniform(0.1, 0.25), 4, 24))


def _ramp(height: int, width: int, random: Generator) -> np.ndarray:
    across, _ = _grid(height, width, random)
    low, high = across.min(), across.max()
    return (across - low) / max(high - low, 1.0)


def _stripes(height: int, width: int, random: Generator) -> np.ndarray:
    across, _ = _grid(height, width, random)
    period = _period(height, width, random)
    return (across % period < period / 2).astype(np.float32)


def _noise(height: int, width: int, cell: int, random: Generator) -> np.ndarray:
    """Return smooth noise of unit strength with grains of about ``cell`` pixels."""
    coarse = random.standard_normal((height // cell + 3, width // cell + 3), dtype=np.float32)
    size = coarse.shape[1] * cell, coarse.shape[0] * cell
    smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(smooth)[cell : cell + height, cell : cell + width]
