"""Pictures for people: detections and ground truth drawn on images, grids of both, and training curves."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from .errors import UserError
from .files import atomic_write
from .ops.masks import rasterize_polygons
from .structures import Detections, Target

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

COLOURS: tuple[Colour, ...] = (
    (255, 64, 64),
    (64, 160, 255),
    (70, 220, 90),
    (255, 190, 30),
    (200, 90, 255),
    (0, 220, 220),
    (255, 120, 200),
    (255, 130, 40),
    (150, 230, 30),
    (110, 110, 255),
    (240, 240, 80),
    (0, 190, 140),
)
"""One for each instance in turn: bright, and far from their neighbours in the list."""

SHORT_SIDE = 480
LONG_SIDE = 1600
"""Small images are enlarged until the short side has SHORT_SIDE or the long side LONG_SIDE pixels."""

_SMALL_OBJECT = 0.06
"""Objects whose box is narrower than this part of the picture's short side get an outline and no fill."""


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    class_names: Sequence[str],
    score_threshold: float = 0.5,
) -> np.ndarray:
    """The image with masks, boxes, names and scores of what was detected.

    Args:
        image: uint8 RGB (H, W, 3).
        detections: in the image's pixels.
        class_names: name of each contiguous label.
        score_threshold: detections below it are left out.

    Returns:
        uint8 RGB; small images are enlarged so that the text is legible.
    """
    chosen = detections.to("cpu")
    chosen = chosen[chosen.scores >= score_threshold]
    labels = [
        f"{_name(label, class_names)} {score:.2f}"
        for label, score in zip(chosen.labels.tolist(), chosen.scores.tolist(), strict=True)
    ]
    masks = [None] * len(chosen) if chosen.masks is None else list(chosen.masks.numpy())
    return _draw(image, chosen.boxes, masks, labels)


def draw_ground_truth(image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
    """The image with the masks, boxes and names of its annotations; see :func:`draw_detections`.

    Args:
        image: uint8 RGB (H, W, 3).
        target: in the image's pixels; polygons or bitmaps.
        class_names: name of each contiguous label.
    """
    target = target.to("cpu")
    masks: list[np.ndarray | None] = [None] * len(target)
    if target.masks is not None:
        height, width = image.shape[:2]
        masks = [
            mask.numpy() if isinstance(mask, Tensor) else rasterize_polygons(mask, height, width)
            for mask in target.masks
        ]
    labels = [_name(label, class_names) for label in target.labels.tolist()]
    return _draw(image, target.boxes, masks, labels)


def _name(label: int, class_names: Sequence[str]) -> str:
    return class_names[label] if 0 <= label < len(class_names) else f"class {label}"


def _draw(
    image: np.ndarray, boxes: Tensor, masks: Sequence[np.ndarray | None], labels: Sequence[str]
) -> np.ndarray:
    """Fills and outlines first, large objects below small ones; then all labels on top."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
    scale = _enlargement(*image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    picture = Image.fromarray(image)
    if scale > 1:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    corners: list[Box] = [tuple(v * scale for v in box) for box in boxes.tolist()]  # type: ignore[misc]
    for index in sorted(range(len(corners)), key=lambda i: -_area(corners[i])):
        _draw_object(picture, corners[index], masks[index], COLOURS[index % len(COLOURS)], scale)
    _draw_labels(picture, corners, labels)
    return np.asarray(picture)


def _enlargement(height: int, width: int) -> float:
    short, long = min(height, width), max(height, width)
    return max(1.0, min(SHORT_SIDE / short, LONG_SIDE / long))


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def _line_width(picture: Image.Image) -> int:
    return max(1, round(min(picture.size) / 400))


def _draw_object(
    picture: Image.Image, box: Box, mask: np.ndarray | None, colour: Colour, scale: float
) -> None:
    """Paint one mask (of the image before it was enlarged by ``scale``) and one box into ``picture``."""
    line = _line_width(picture)
    small = min(box[2] - box[0], box[3] - box[1]) < _SMALL_OBJECT * min(picture.size)
    if mask is not None and mask.any():
        _draw_mask(picture, mask, colour, scale, 0.0 if small else 0.4, line)
    if mask is None or not small:
        # A half-transparent box marks the extent without competing with the mask's outline.
        layer = picture.copy()
        ImageDraw.Draw(layer).rectangle(_inside(box, picture.size), outline=colour, width=line)
        picture.paste(Image.blend(picture, layer, 0.65 if mask is not None else 1.0))


def _draw_mask(
    picture: Image.Image, mask: np.ndarray, colour: Colour, scale: float, opacity: float, line: int
) -> None:
    """Blend a fill, and draw the mask's outline as a coloured line with a dark one outside it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    pad = 2 + math.ceil(2 * line / scale)
    top, bottom, left, right = rows[0] - pad, rows[-1] + 1 + pad, columns[0] - pad, columns[-1] + 1 + pad
    part = np.zeros((bottom - top, right - left), dtype=np.uint8)
    y, x = max(top, 0), max(left, 0)
    window = mask[y : min(bottom, mask.shape[0]), x : min(right, mask.shape[1])]
    part[y - top : y - top + window.shape[0], x - left : x - left + window.shape[1]] = window * np.uint8(255)
    size = (round(part.shape[1] * scale), round(part.shape[0] * scale))
    # Blurring the blocks of an enlarged mask and cutting at one half rounds off its stairs.
    smooth = Image.fromarray(part).resize(size, Image.Resampling.BICUBIC)
    inner = smooth.point(lambda value: 255 * (value >= 128))
    core = inner.filter(ImageFilter.MinFilter(2 * line + 1))
    halo = inner.filter(ImageFilter.MaxFilter(2 * line + 1))
    corner = (round(left * scale), round(top * scale))
    for area, paint in ((halo, 0.55), (inner, None)):
        if paint is not None:
            edge = Image.fromarray(((np.asarray(area) > 0) & (np.asarray(inner) == 0)).astype(np.uint8))
            picture.paste((0, 0, 0), corner, edge.point(lambda value: round(value * 255 * 0.55)))
    edge = Image.fromarray((np.asarray(inner) > 0) & (np.asarray(core) == 0))
    if opacity:
        picture.paste(colour, corner, inner.point(lambda value: round(value * opacity)))
    picture.paste(colour, corner, edge)
