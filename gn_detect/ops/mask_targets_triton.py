"""Triton kernels of :mod:`gn_detect.ops.mask_targets`: polygons drawn, and bitmaps cropped, for each RoI.

Fused multiplications and additions would round otherwise than pycocotools and torchvision.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import on_device
from .mask_targets import LEAST_SIDE, STEPS

CELLS = 8192  # edges * columns * rows that a program compares at a time
BLOCK = 256  # cells of a RoI that a program samples from a bitmap


def draw(
    corners: Tensor, polygons: Tensor, objects: Tensor, which: Tensor, boxes: Tensor, side: int
) -> Tensor:
    """Draw one RoI in each program; see :func:`gn_detect.ops.mask_targets.draw_polygons`."""
    targets = torch.empty((len(boxes), side, side), dtype=torch.bool, device=boxes.device)
    block = triton.next_power_of_2(side)
    if len(boxes) == 0:
        return targets
    tensors = corners, polygons, objects, which, boxes.contiguous(), targets
    edges = max(1, min(16, CELLS // block**2))
    sizes = {"BLOCK": block, "EDGES": edges, "STEPS": STEPS, "LEAST": LEAST_SIDE}
    with on_device(boxes.device):
        draw_roi[(len(boxes),)](*tensors, side, **sizes, num_warps=4, enable_fp_fusion=False)
    return targets


@triton.jit
def draw_roi(
    corners,
    polygons,
    objects,
    which,
    boxes,
    targets,
    side,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    STEPS: tl.constexpr,
    LEAST: tl.constexpr,
):
    roi = tl.program_id(0).to(tl.int64)
    owner = tl.load(which + roi)
    least = tl.full((), LEAST, tl.float64)
    half = tl.full((), 0.5, tl.float64)
    left, top = tl.load(boxes + roi * 4).to(tl.float64), tl.load(boxes + roi * 4 + 1).to(tl.float64)
    right, bottom = tl.load(boxes + roi * 4 + 2).to(tl.float64), tl.load(boxes + roi * 4 + 3).to(tl.float64)
    unit_x = side.to(tl.float64) / tl.maximum(right - left, least)
    unit_y = side.to(tl.float64) / tl.maximum(bottom - top, least)
    column = tl.arange(0, BLOCK)
    step = (STEPS * column + 2)[None, :].to(tl.float64)  # column c is crossed between 5c + 2 and 5c + 3
    inside = tl.zeros((BLOCK, BLOCK), tl.int32)  # (columns, rows)
    for polygon in range(tl.load(objects + owner), tl.load(objects + owner + 1)):
        begin, end = tl.load(polygons + polygon), tl.load(polygons + polygon + 1)
        flips = tl.zeros((BLOCK, BLOCK), tl.int32)
        for first in range(begin, end, EDGES):
            edge = first + tl.arange(0, EDGES)
            is_edge = edge < end
            after = tl.where(edge + 1 < end, edge + 1, begin)
            x0 = _walked(corners + 2 * edge, is_edge, left, unit_x, half, STEPS)
            y0 = _walked(corners + 2 * edge + 1, is_edge, top, unit_y, half, STEPS)
            x1 = _walked(corners + 2 * after, is_edge, left, unit_x, half, STEPS)
            y1 = _walked(corners + 2 * after + 1, is_edge, top, unit_y, half, STEPS)

            width, height = tl.abs(x1 - x0), tl.abs(y1 - y0)
            steep = width < height
            flip = tl.where(steep, y0 > y1, x0 > x1)
            x0, x1 = tl.where(flip, x1, x0), tl.where(flip, x0, x1)
            y0, y1 = tl.where(flip, y1, y0), tl.where(flip, y0, y1)
            slope = tl.where(steep, x1 - x0, y1 - y0) / tl.where(
                width + height > 0, tl.maximum(width, height), 1
            )
            crossed = (tl.minimum(x0, x1)[:, None] <= step) & (step < tl.maximum(x0, x1)[:, None])
            crossed = crossed & is_edge[:, None]
            x0, y0, slope, steep = x0[:, None], y0[:, None], slope[:, None], steep[:, None]

            t = step - x0
            flat = tl.minimum(_trunc(y0 + slope * t + half), _trunc(y0 + slope * (t + 1) + half))
            near = tl.floor((step + half - x0) / tl.where(steep & (slope != 0), slope, 1))
            found = near + 2
            for back in tl.static_range(4):
                candidate = near + 1 - back
                beyond = (_trunc(x0 + slope * candidate + half) > step) == (slope > 0)
                found = tl.where(beyond, candidate, found)
            y = tl.where(steep, found - 1 + y0, flat)
            row = tl.ceil((y - 2) / STEPS)[:, :, None]  # from here on, the column flips
            flipped = (row <= tl.arange(0, BLOCK)[None, None, :]) & crossed[:, :, None]
            flips += tl.sum(flipped.to(tl.int32), axis=0)
        inside = inside | (flips & 1)
    row = tl.arange(0, BLOCK)
    place = targets + roi * side * side + row[None, :] * side + column[:, None]
    tl.store(place, inside != 0, mask=(row < side)[None, :] & (column < side)[:, None])


@triton.jit
def _trunc(x):
    """Round towards 0, as C's cast to int."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def _walked(place, is_edge, origin, unit, half, STEPS: tl.constexpr):
    """Return coordinates in steps of the walk."""
    value = tl.load(place, mask=is_edge, other=0.0)
    return _trunc(STEPS * ((value - origin) * unit) + half)


def crop(bitmaps: Tensor, which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Sample a block of cells of a RoI in each program; see :func:`gn_detect.ops.crop_bitmaps`."""
    targets = torch.empty((len(boxes), side, side), dtype=torch.bool, device=boxes.device)
    if targets.numel() == 0:
        return targets
    tensors = bitmaps.contiguous(), which.contiguous(), boxes.contiguous(), targets
    grid = len(boxes), triton.cdiv(side * side, BLOCK)
    with on_device(boxes.device):
        crop_roi[grid](*tensors, *bitmaps.shape[1:], side, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return targets


@triton.jit(do_not_specialize=["height", "width", "side"])
def crop_roi(bitmaps, which, boxes, targets, height, width, side, BLOCK: tl.constexpr):
    """Compute torchvision's RoIAlign, operation by operation. Grid: RoIs x blocks of cells."""
    roi = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bitmap = tl.load(which + roi)
    samples_x, size_x, edge_x = _grid(boxes + roi * 4, cell % side, side)
    samples_y, size_y, edge_y = _grid(boxes + roi * 4 + 1, cell // side, side)
    exists = (cell < side * side) & (bitmap >= 0)
    pixels = bitmaps + bitmap * height * width
    total = tl.zeros((BLOCK,), tl.float32)
    for y in range(samples_y):
        top, bottom, below, inside_y = _sample(edge_y, size_y, y, samples_y, height)
        for x in range(samples_x):
            left, right, beyond, inside_x = _sample(edge_x, size_x, x, samples_x, width)
            inside = exists & inside_x & inside_y
            a = tl.load(pixels + top * width + left, mask=inside, other=0).to(tl.float32)
            b = tl.load(pixels + top * width + right, mask=inside, other=0).to(tl.float32)
            c = tl.load(pixels + bottom * width + left, mask=inside, other=0).to(tl.float32)
            d = tl.load(pixels + bottom * width + right, mask=inside, other=0).to(tl.float32)
            above, before = 1.0 - below, 1.0 - beyond
            total += above * before * a + above * beyond * b + below * before * c + below * beyond * d
    share = tl.div_rn(total, tl.maximum(samples_y * samples_x, 1).to(tl.float32))
    tl.store(targets + roi * side * side + cell, share >= 0.5, mask=cell < side * side)


@triton.jit
def _grid(corner, cell, side):
    """Return the samples in a cell on an axis, the size of a cell, and the edge of each cell."""
    start = tl.load(corner).to(tl.float32) - 0.5
    extent = tl.load(corner + 2).to(tl.float32) - 0.5 - start
    size = tl.div_rn(extent, side.to(tl.float32))
    return tl.ceil(size).to(tl.int32), size, start + cell.to(tl.float32) * size


@triton.jit
def _sample(edge, size, number, samples, limit):
    """Return both neighbours of a sample on an axis, the distance from the first, and whether it counts."""
    place = edge + tl.div_rn((tl.cast(number, tl.float32) + 0.5) * size, samples.to(tl.float32))
    inside = (place >= -1.0) & (place <= limit.to(tl.float32))
    place = tl.maximum(place, 0.0)
    first = tl.minimum(place.to(tl.int32), limit - 1)
    second = tl.minimum(first + 1, limit - 1)
    return first, second, tl.where(first == second, 0.0, place - first.to(tl.float32)), inside
