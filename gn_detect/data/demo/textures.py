"""Backgrounds and object textures of the demo dataset. All categories have the same distribution."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

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
