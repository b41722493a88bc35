"""Masks of a batch in fixed shapes, and the mask targets of RoIs from them, on any device without a wait.

COCO draws a polygon as the parity of its boundary: the boundary is walked in steps of a fifth of a pixel, and
each crossing of the centre line of a column of pixels flips all pixels of this column from there on
(``rleFrPoly`` of pycocotools). The crossings of an edge depend on this edge alone, so edges are computed side
by side. The result is the same to the last bit, and the work is bounded: pycocotools walks each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import numpy as np
import torch
import torchvision
from torch import Tensor

from ..structures import PolygonMask
from .kernels import kernels_run_on

STEPS = 5  # of the walk, in a pixel
LEAST_SIDE = 0.1  # pixels; smaller RoIs are drawn as if they had this size, as in detectron2

_FLOAT_BYTES = 1 << 26  # of the bitmaps that are in float32 at a time where no kernel reads them as bool


@dataclass
class PaddedMasks:
    """Masks of K objects. Rows beyond the last polygon, corner or bitmap are padding.

    Attributes:
        corners: (T, 2) float64 x and y in absolute pixels, polygon by polygon.
        polygons: (Q + 1,) int32, position of the first corner of each polygon; the next one's ends it.
        objects: (K + 1,) int32, position of the first polygon of each object; the next one's ends it.
        bitmaps: (B, H, W) bool, or None if no object has one.
        bitmap_of: (K,) int64 row of each object's bitmap, -1 for an object of polygons.
    """

    corners: Tensor
    polygons: Tensor
    objects: Tensor
    bitmaps: Tensor | None
    bitmap_of: Tensor

    def to(self, device: torch.device) -> PaddedMasks:
        """Return the same masks on ``device``."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without the bitmaps that are None."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


def pad_masks(masks: Sequence[PolygonMask | Tensor], size: tuple[int, int] | None = None) -> PaddedMasks:
    """Collect the masks of objects, each polygons or a bool (H, W) bitmap, into tensors on the CPU.

    Args:
        masks: of K objects; bitmaps may differ in size.
        size: (height, width) to which bitmaps are padded. The numbers of corners, polygons and bitmaps are
            then rounded up to powers of two, so that batches share shapes. None: as large as need be.
    """
    polygons = [[] if isinstance(mask, Tensor) else mask for mask in masks]
    flat = [corners.reshape(-1, 2) for mask in polygons for corners in mask]
    bitmaps = [mask for mask in masks if isinstance(mask, Tensor)]
    rows, ends = iter(range(len(bitmaps))), list(accumulate(map(len, flat), initial=0))
    counts = ends[-1], len(flat), len(bitmaps)
    if size is not None:
        counts = _room(counts[0], 4096), _room(counts[1], 512), _room(counts[2], 16)
    corners = torch.zeros(counts[0], 2, dtype=torch.float64)
    if flat:
        corners[: ends[-1]] = torch.from_numpy(np.concatenate(flat))
    ends += [ends[-1]] * (counts[1] - len(flat))
    stacked = None
    if bitmaps:
        height, width = size or (max(b.shape[i] for b in bitmaps) for i in (0, 1))
        stacked = torch.zeros(counts[2], height, width, dtype=torch.bool)
        for bitmap, place in zip(bitmaps, stacked, strict=False):
            h, w = bitmap.shape
            place[:h, :w] = bitmap
            # RoIAlign interpolates up to one cell beyond; at a border it repeats the last one.
            place[h : h + 1, :w] = bitmap[-1:]
            place[: h + 1, w : w + 1] = place[: h + 1, w - 1 : w]
    return PaddedMasks(
        corners,
        torch.tensor(ends, dtype=torch.int32),
        torch.tensor(list(accumulate(map(len, polygons), initial=0)), dtype=torch.int32),
        stacked,
        torch.tensor([next(rows) if isinstance(mask, Tensor) else -1 for mask in masks], dtype=torch.int64),
    )


def _room(count: int, least: int) -> int:
    return max(least, 1 << max(count - 1, 0).bit_length())


def rasterize_masks(masks: Sequence[PolygonMask | Tensor], which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Return :func:`mask_targets` of the RoIs of one image, on the device of ``boxes``.

    Args:
        masks: of each ground-truth object of the image: polygons, or a bool (H, W) bitmap.
        which, boxes, side: see :func:`mask_targets`.
    """
    used, position = torch.unique(which, return_inverse=True)
    padded = pad_masks([masks[i] for i in used.tolist()]).to(boxes.device)
    return mask_targets(padded, position, boxes, side)


def mask_targets(masks: PaddedMasks, which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Return the mask targets of RoIs: draw polygons for each RoI, crop bitmaps, both as detectron2 does.

    Args:
        masks: on the device of ``boxes``.
        which: (R,) int64, the object of each RoI.
        boxes: (R, 4) float32 ``xyxy`` RoIs in pixels.
        side: of the targets.

    Returns:
        (R, side, side) bool.
    """
    drawn = draw_polygons(masks.corners, masks.polygons, masks.objects, which, boxes, side)
    if masks.bitmaps is None:
        return drawn
    return drawn | crop_bitmaps(masks.bitmaps, masks.bitmap_of[which], boxes, side)


def draw_polygons(
    corners: Tensor, polygons: Tensor, objects: Tensor, which: Tensor, boxes: Tensor, side: int
) -> Tensor:
    """Draw the part of an object inside each box on a grid of cells; see :class:`PaddedMasks`.

    Returns:
        (R, side, side) bool; False for an object without polygons.
    """
    return torch.ops.gn_detect.draw_polygons(corners, polygons, objects, which, boxes, side)


def _draw_on_cpu(
    corners: Tensor, polygons: Tensor, objects: Tensor, which: Tensor, boxes: Tensor, side: int
) -> Tensor:
    arrays = corners.numpy(), polygons.numpy(), objects.numpy(), which.numpy(), boxes.numpy()
    return torch.from_numpy(_draw(*arrays, side))


def _draw_on_gpu(
    corners: Tensor, polygons: Tensor, objects: Tensor, which: Tensor, boxes: Tensor, side: int
) -> Tensor:
    if not kernels_run_on(boxes.device):
        hosted = corners.cpu(), polygons.cpu(), objects.cpu(), which.cpu(), boxes.cpu()
        return _draw_on_cpu(*hosted, side).to(boxes.device)
    from . import mask_targets_triton

    drawn: Tensor = mask_targets_triton.draw(corners, polygons, objects, which, boxes, side)
    return drawn


torch.library.define(
    "gn_detect::draw_polygons",
    "(Tensor corners, Tensor polygons, Tensor objects, Tensor which, Tensor boxes, int side) -> Tensor",
)
torch.library.impl("gn_detect::draw_polygons", "cpu", _draw_on_cpu)
torch.library.impl("gn_detect::draw_polygons", "cuda", _draw_on_gpu)
torch.library.register_fake(
    "gn_detect::draw_polygons",
    lambda *inputs: inputs[4].new_empty((len(inputs[4]), inputs[5], inputs[5]), dtype=torch.bool),
)


def crop_bitmaps(bitmaps: Tensor, which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Crop bitmaps by boxes and resize them with RoIAlign, as detectron2's BitMasks does.

    Args:
        bitmaps: (M, H, W) bool; they are never all made float32.
        which: (N,) int64, the index of the bitmap of each box, -1 for none.
        boxes: (N, 4) float32 ``xyxy`` in pixels of the bitmaps.
        side: size of the result.

    Returns:
        (N, side, side) bool, True if at least half of a cell is covered.
    """
    return torch.ops.gn_detect.crop_bitmaps(bitmaps, which, boxes, side)


def _crop_some_at_a_time(bitmaps: Tensor, which: Tensor, boxes: Tensor, side: int) -> Tensor:
    cropped = boxes.new_zeros((len(boxes), side, side), dtype=torch.bool)
    some = max(1, _FLOAT_BYTES // (4 * max(1, bitmaps[:1].numel())))
    for first in range(0, len(bitmaps), some):
        row = ((which >= first) & (which < first + some)).nonzero()[:, 0]
        rois = torch.cat([(which[row, None] - first).to(boxes.dtype), boxes[row]], dim=1)
        part = bitmaps[first : first + some, None].to(boxes.dtype)
        shares = torchvision.ops.roi_align(part, rois, side, sampling_ratio=0, aligned=True)
        cropped[row] = shares[:, 0] >= 0.5
    return cropped


def _crop_on_gpu(bitmaps: Tensor, which: Tensor, boxes: Tensor, side: int) -> Tensor:
    if not kernels_run_on(boxes.device):
        return _crop_some_at_a_time(bitmaps, which, boxes, side)
    from . import mask_targets_triton

    return mask_targets_triton.crop(bitmaps, which, boxes, side)


torch.library.define(
    "gn_detect::crop_bitmaps", "(Tensor bitmaps, Tensor which, Tensor boxes, int side) -> Tensor"
)
torch.library.impl("gn_detect::crop_bitmaps", "cpu", _crop_some_at_a_time)
torch.library.impl("gn_detect::crop_bitmaps", "cuda", _crop_on_gpu)
torch.library.register_fake(
    "gn_detect::crop_bitmaps",
    lambda bitmaps, which, boxes, side: boxes.new_empty((len(boxes), side, side), dtype=torch.bool),
)


def _draw(
    corners: np.ndarray,
    polygons: np.ndarray,
    objects: np.ndarray,
    which: np.ndarray,
    boxes: np.ndarray,
    side: int,
) -> np.ndarray:
    boxes = boxes.astype(np.float64)
    scale = side / np.maximum(boxes[:, 2:] - boxes[:, :2], LEAST_SIDE)
    counts = (objects[1:] - objects[:-1])[which]
    roi, polygon = _spans(objects[which], counts)  # each polygon of each RoI
    begin, end = polygons[polygon], polygons[polygon + 1]
    drawn, edge = _spans(begin, end - begin)  # each edge of these
    after = np.where(edge + 1 == end[drawn], begin[drawn], edge + 1)
    first, unit = boxes[roi[drawn], :2], scale[roi[drawn]]
    start = np.trunc(STEPS * ((corners[edge] - first) * unit) + 0.5)
    stop = np.trunc(STEPS * ((corners[after] - first) * unit) + 0.5)

    # Column c is crossed between the steps 5c + 2 and 5c + 3.
    low, high = np.minimum(start[:, 0], stop[:, 0]), np.maximum(start[:, 0], stop[:, 0])
    left = np.clip(np.ceil((low - 2) / STEPS), 0, side).astype(np.int64)
    right = np.clip(np.ceil((high - 2) / STEPS), 0, side).astype(np.int64)
    crossing, column = _spans(left, right - left)
    y = _crossings(start[crossing], stop[crossing], STEPS * column + 2)
    row = np.clip(np.ceil((y - 2) / STEPS), 0, side).astype(np.int64)
    cell = (drawn[crossing] * side + column) * (side + 1) + row
    flips = np.bincount(cell, minlength=len(polygon) * side * (side + 1))
    inside = flips.reshape(len(polygon), side, side + 1)[..., :side].cumsum(axis=2) % 2 == 1
    targets = np.zeros((len(which), side, side), dtype=bool)
    if len(polygon):
        some = counts > 0
        targets[some] = np.logical_or.reduceat(inside, (np.cumsum(counts) - counts)[some])
    return np.ascontiguousarray(targets.transpose(0, 2, 1))


def _spans(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the owner of each element of the ranges [first, first + count), and the element."""
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) + (first - (np.cumsum(count) - count))[owner]


def _crossings(start: np.ndarray, stop: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Return the smaller y, in steps, of the two points at which walked edges go from x ``step`` to the next.

    ``start`` and ``stop`` are (N, 2) steps. A flat edge has one point for each x, a steep one for each y, of
    which the first beyond ``step`` is searched. The walk rounds as C's cast to int.
    """
    (x0, y0), (x1, y1) = start.T, stop.T
    width, height = np.abs(x1 - x0), np.abs(y1 - y0)
    steep = width < height
    flip = np.where(steep, y0 > y1, x0 > x1)
    x0, x1 = np.where(flip, x1, x0), np.where(flip, x0, x1)
    y0, y1 = np.where(flip, y1, y0), np.where(flip, y0, y1)
    slope = np.where(steep, x1 - x0, y1 - y0) / np.where(steep, height, width)
    t = step - x0
    flat = np.minimum(np.trunc(y0 + slope * t + 0.5), np.trunc(y0 + slope * (t + 1) + 0.5))
    near = np.floor((step + 0.5 - x0) / np.where(steep, slope, 1))
    found = near + 2
    for candidate in (near + 1, near, near - 1, near - 2):
        beyond = (np.trunc(x0 + slope * candidate + 0.5) > step) == (slope > 0)
        found = np.where(beyond, candidate, found)
    return np.where(steep, found - 1 + y0, flat)
