"""Geometry of an image with its boxes and masks: resize, flip, crop, pad, move, paste; nothing is random.

Coordinates are continuous: pixel i covers [i, i + 1), so a horizontal flip maps x to width - x. Pillow
resizes images by its bilinear filter on uint8 and bitmaps by its nearest one, bit for bit as in detectron2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..ops.masks import rasterize_polygons
from ..structures import PolygonMask, Target
from .coco.rle import RleMask

MIN_BOX_SIDE = 1e-5  # pixels; boxes with a side up to this are empty, as in detectron2
PAD_VALUE = 128  # colour of padding; detectron2's, near the usual pixel mean

# Polygons (float64, may reach out of the image), or a bitmap: RLE until its pixels are needed, then bool (H,
# W).
Mask = PolygonMask | RleMask | np.ndarray


@dataclass(frozen=True)
class LabelledImage:
    """An image and its objects during the transforms.

    Attributes:
        image: (H, W, 3) uint8 RGB; may be a view.
        boxes: (N, 4) float64 ``xyxy`` in pixels; may reach out of the image.
        labels: (N,) int64.
        masks: N masks, or None.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: list[Mask] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) in pixels."""
        return self.image.shape[0], self.image.shape[1]

    def select(self, keep: np.ndarray) -> LabelledImage:
        """Return the objects for which ``keep`` (N,) bool is true."""
        masks = None if self.masks is None else [m for m, k in zip(self.masks, keep, strict=True) if k]
        return replace(self, boxes=self.boxes[keep], labels=self.labels[keep], masks=masks)


def resize_pixels(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3) uint8 by Pillow's antialiased bilinear filter."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize(labelled: LabelledImage, height: int, width: int) -> LabelledImage:
    """Scale everything to (height, width) pixels; bitmaps by the nearest pixel."""
    old_height, old_width = labelled.size
    if (old_height, old_width) == (height, width):
        return labelled
    moved = _map_points(labelled, lambda points: points * (width / old_width, height / old_height))

    def resize_bitmap(bitmap: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(bitmap).view(np.uint8))
        return np.asarray(picture.resize((width, height), Image.Resampling.NEAREST)).view(bool)

    return _map_pixels(moved, resize_pixels(labelled.image, height, width), resize_bitmap)


def flip_horizontal(labelled: LabelledImage) -> LabelledImage:
    """Exchange left and right."""
    moved = _map_points(labelled, lambda points: points * (-1, 1) + (labelled.size[1], 0))
    return _map_pixels(moved, labelled.image[:, ::-1], lambda bitmap: bitmap[:, ::-1])


def flip_vertical(labelled: LabelledImage) -> LabelledImage:
    """Exchange top and bottom."""
    moved = _map_points(labelled, lambda points: points * (1, -1) + (0, labelled.size[0]))
    return _map_pixels(moved, labelled.image[::-1], lambda bitmap: bitmap[::-1])


def transpose(labelled: LabelledImage) -> LabelledImage:
    """Exchange x and y, so height and width."""
    moved = _map_points(labelled, lambda points: points[:, ::-1])
    return _map_pixels(moved, labelled.image.swapaxes(0, 1), lambda bitmap: bitmap.T)


def affine(labelled: LabelledImage, matrix: np.ndarray, value: int = PAD_VALUE) -> LabelledImage:
    """Move each point (x, y) to ``matrix @ (x, y, 1)``; the size stays, and objects outside are dropped.

    Args:
        labelled: image with objects.
        matrix: (2, 3), invertible. Pixels are read by Pillow's bilinear filter and bitmaps by the nearest
            pixel, as by torchvision's ``v2.functional.affine``.
        value: colour of the pixels that come from outside.
    """
    height, width = labelled.size
    inverse = np.linalg.inv(np.vstack([matrix, (0, 0, 1)]))[:2].reshape(-1).tolist()

    def read(pixels: np.ndarray, resample: Image.Resampling, fill: Any) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        size, how = (width, height), Image.Transform.AFFINE
        return np.asarray(picture.transform(size, how, inverse, resample, fillcolor=fill))

    moved = _map_points(labelled, lambda points: points @ matrix[:, :2].T + matrix[:, 2])
    image = read(labelled.image, Image.Resampling.BILINEAR, (value,) * 3)
    nearest = Image.Resampling.NEAREST
    return _inside(_map_pixels(moved, image, lambda mask: read(mask.view(np.uint8), nearest, 0).view(bool)))


def paste(labelled: LabelledImage, other: LabelledImage) -> LabelledImage:
    """Paste the objects of another image of the same size, with their pixels; both have masks.

    The objects below lose what is covered: their boxes become the tight ones of the rest, a covered polygon
    becomes a bitmap, and an object without a rest is dropped. Pasted objects stay as they are.
    """
    assert labelled.masks is not None and other.masks is not None and labelled.size == other.size
    cover = np.zeros(labelled.size, dtype=bool)
    for mask in other.masks:
        cover |= drawn(mask, *labelled.size)
    boxes, masks, keep = labelled.boxes.copy(), list(labelled.masks), np.ones(len(labelled), dtype=bool)
    for i, mask in enumerate(masks):
        bitmap = drawn(mask, *labelled.size)
        if (bitmap & cover).any():
            masks[i] = rest = bitmap & ~cover
            boxes[i], keep[i] = bitmap_bounds(rest), rest.any()
    left = replace(labelled, boxes=boxes, masks=masks).select(keep)
    assert left.masks is not None
    return LabelledImage(
        np.where(cover[..., None], other.image, labelled.image),
        np.concatenate([left.boxes, other.boxes]),
        np.concatenate([left.labels, other.labels]),
        [*left.masks, *other.masks],
    )


def crop(labelled: LabelledImage, left: int, top: int, height: int, width: int) -> LabelledImage:
    """Crop the window of height x width pixels from pixel (left, top); drop the objects outside.

    Boxes are clipped to the window. Polygons are moved and not clipped: their drawing clips them, and
    :func:`polygon_bounds` returns the exact box of the part inside.
    """
    moved = _map_points(labelled, lambda points: points - (left, top))
    window = np.s_[top : top + height, left : left + width]

    def crop_bitmap(bitmap: RleMask | np.ndarray) -> np.ndarray:
        if isinstance(bitmap, RleMask):
            return bitmap.window(top, left, height, width)
        return bitmap[window].copy()  # a view would keep the whole bitmap in memory

    return _inside(_map_bitmaps(moved, labelled.image[window], crop_bitmap))


def pad(labelled: LabelledImage, height: int, width: int, value: int = PAD_VALUE) -> LabelledImage:
    """Add pixels of ``value`` at the right and the bottom up to (height, width)."""
    missing = max(height - labelled.size[0], 0), max(width - labelled.size[1], 0)
    if missing == (0, 0):
        return labelled
    around = ((0, missing[0]), (0, missing[1]))
    image = np.pad(labelled.image, (*around, (0, 0)), constant_values=value)
    return _map_pixels(labelled, image, lambda bitmap: np.pad(bitmap, around))


def _inside(labelled: LabelledImage) -> LabelledImage:
    """Clip the boxes, and drop the objects outside of the image."""
    clipped = replace(labelled, boxes=_clip(labelled.boxes, *labelled.size))
    keep = _nonempty(clipped.boxes)
    if clipped.masks is not None:
        inside = [_nonempty(mask_bounds(mask, *clipped.size)) for mask in clipped.masks]
        keep &= np.array(inside, dtype=bool)
    return clipped.select(keep)


def _map_points(labelled: LabelledImage, move: Callable[[np.ndarray], np.ndarray]) -> LabelledImage:
    """Map the points (K, 2) of boxes and polygons by ``move``; a box becomes that of its four corners."""
    corners = move(labelled.boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)).reshape(-1, 4, 2)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    masks = labelled.masks
    if masks is not None:
        masks = [[move(p.reshape(-1, 2)).reshape(-1) for p in m] if isinstance(m, list) else m for m in masks]
    return replace(labelled, boxes=boxes, masks=masks)


def _map_pixels(
    labelled: LabelledImage, image: np.ndarray, map_bitmap: Callable[[np.ndarray], np.ndarray]
) -> LabelledImage:
    """Set the new ``image``, and map each bitmap.

    RLEs are decoded one after the other: a hundred bitmaps of a large image would take more memory than all
    other steps.
    """
    return _map_bitmaps(labelled, image, lambda bitmap: map_bitmap(_decoded(bitmap)))


def _map_bitmaps(
    labelled: LabelledImage, image: np.ndarray, change: Callable[[RleMask | np.ndarray], np.ndarray]
) -> LabelledImage:
    masks = labelled.masks
    if masks is not None:
        masks = [mask if isinstance(mask, list) else change(mask) for mask in masks]
    return replace(labelled, image=image, masks=masks)


def _decoded(bitmap: RleMask | np.ndarray) -> np.ndarray:
    return bitmap.decode() if isinstance(bitmap, RleMask) else bitmap


def drawn(mask: Mask, height: int, width: int) -> np.ndarray:
    """Return the bool bitmap (height, width) of any mask."""
    return rasterize_polygons(mask, height, width) if isinstance(mask, list) else _decoded(mask)


def _clip(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    return boxes.clip(0, [width, height, width, height])


def _nonempty(boxes: np.ndarray) -> np.ndarray:
    """Return which of (..., 4) ``xyxy`` boxes have sides above :data:`MIN_BOX_SIDE`."""
    nonempty: np.ndarray = (boxes[..., 2:] - boxes[..., :2] > MIN_BOX_SIDE).all(axis=-1)
    return nonempty


def mask_bounds(mask: Mask, height: int, width: int) -> np.ndarray:
    """Return the tight box (4,) float64 ``xyxy`` of the part of a mask inside the image, or zeros."""
    return polygon_bounds(mask, height, width) if isinstance(mask, list) else bitmap_bounds(_decoded(mask))


def bitmap_bounds(bitmap: np.ndarray) -> np.ndarray:
    """Return the tight box (4,) float64 ``xyxy`` of the true pixels of (H, W), or zeros."""
    columns, rows = np.flatnonzero(bitmap.any(axis=0)), np.flatnonzero(bitmap.any(axis=1))
    if len(columns) == 0:
        return np.zeros(4)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def polygon_bounds(polygons: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Return the tight box (4,) float64 ``xyxy`` of the part of polygons inside the image, or zeros.

    The corners of the intersection are ends of polygon edges clipped to the window, and those corners of the
    window that lie in the polygon. So their extent is exact without the intersection itself.
    """
    window = np.array([width, height], dtype=np.float64)
    found = [_corners_in_window(p.reshape(-1, 2), window) for p in polygons]
    points = np.concatenate([np.empty((0, 2)), *found])
    if len(points) == 0:
        return np.zeros(4)
    return np.concatenate([points.min(axis=0), points.max(axis=0)])


def _corners_in_window(points: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return points (M, 2) with the extent of a polygon (K, 2), maybe concave, clipped to [0, window]."""
    if ((points >= 0) & (points <= window)).all():
        return points
    start, end = points, np.roll(points, -1, axis=0)
    step = end - start
    # Part [first, last] of each edge inside the window (Liang and Barsky 1984), one axis at a time.
    with np.errstate(divide="ignore", invalid="ignore"):
        borders = np.stack([-start / step, (window - start) / step])
    enter, leave = borders.min(axis=0), borders.max(axis=0)
    level, between = step == 0, (start >= 0) & (start <= window)
    enter = np.where(level, np.where(between, 0.0, np.inf), enter).max(axis=1).clip(min=0)
    leave = np.where(level, np.where(between, 1.0, -np.inf), leave).min(axis=1).clip(max=1)
    crossing = enter <= leave
    first, last = (start[crossing] + t[crossing, None] * step[crossing] for t in (enter, leave))
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]) * window
    covered = corners[[_contains(start, end, corner) for corner in corners]]
    return np.concatenate([first, last, covered]).clip(0, window)


def _contains(start: np.ndarray, end: np.ndarray, point: np.ndarray) -> bool:
    """Return whether a ray from ``point`` to the right crosses an odd number of edges (K, 2)."""
    straddles = (start[:, 1] > point[1]) != (end[:, 1] > point[1])
    start, end = start[straddles], end[straddles]
    x = start[:, 0] + (point[1] - start[:, 1]) / (end[:, 1] - start[:, 1]) * (end[:, 0] - start[:, 0])
    return bool((x > point[0]).sum() % 2)


def to_target(
    labelled: LabelledImage, *, draw_polygons: bool = False, boxes_from_masks: bool = False
) -> Target:
    """Return ground truth for the network, without empty objects.

    Args:
        labelled: image with objects.
        draw_polygons: convert polygons to bitmaps (``INPUT.MASK_FORMAT`` bitmask).
        boxes_from_masks: replace the boxes by tight boxes of the masks, for cropped images: the part of a box
            in the window is not the box of the part.

    Returns:
        Boxes clipped to the image; masks as polygons or contiguous bool tensors.
    """
    height, width = labelled.size
    masks, boxes = None, labelled.boxes
    keep = np.ones(len(labelled), dtype=bool)
    if labelled.masks is not None:
        masks = [m if isinstance(m, list) else _decoded(m) for m in labelled.masks]
        if draw_polygons:
            masks = [drawn(m, height, width) for m in masks]
        keep = np.array([m.any() if isinstance(m, np.ndarray) else len(m) > 0 for m in masks], dtype=bool)
        if boxes_from_masks:
            boxes = np.array([mask_bounds(m, height, width) for m in masks]).reshape(-1, 4)
    boxes = _clip(boxes, height, width).astype(np.float32)
    keep &= _nonempty(boxes)
    kept = None
    if masks is not None:
        kept = [
            torch.from_numpy(np.require(m, requirements=["C", "W"])) if isinstance(m, np.ndarray) else m
            for m, k in zip(masks, keep, strict=True)
            if k
        ]
    return Target(torch.from_numpy(boxes[keep]), torch.from_numpy(labelled.labels[keep]), kept)


def to_tensor(image: np.ndarray, channel_order: str) -> torch.Tensor:
    """Convert (H, W, 3) uint8 RGB to a contiguous (3, H, W) uint8 tensor in order ``"BGR"`` or ``"RGB"``."""
    planes = image.transpose(2, 0, 1)
    if channel_order == "BGR":
        planes = planes[::-1]
    return torch.from_numpy(np.array(planes, order="C"))
