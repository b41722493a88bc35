"""The Triton kernel of :func:`gn_detect.ops.mask_targets.draw_polygons`: a program draws one RoI."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import on_device
from .mask_targets import LEAST_SIDE, STEPS

CELLS = 8192  # edges * columns * rows that a program compares at a time


def draw(
    corners: Tensor, polygons: Tensor, objects: Tensor, which: Tensor, boxes: Tensor, side: int
) -> Tensor:
    """Launch the kernel; see :func:`gn_detect.ops.mask_targets.draw_polygons`."""
    targets = torch.empty((len(boxes), side, side), dtype=torch.bool, device=boxes.device)
    block = triton.next_power_of_2(side)
    if len(boxes) == 0:
        return targets
    tensors = corners, polygons, objects, which, boxes.contiguous(), targets
    edges = max(1, min(16, CELLS // block**2))
    sizes = {"BLOCK": block, "EDGES": edges, "STEPS": STEPS, "LEAST": LEAST_SIDE}
    with on_device(boxes.device):
        # Fused multiplications and additions would round otherwise than pycocotools.
        _draw[(len(boxes),)](*tensors, side, **sizes, num_warps=4, enable_fp_fusion=False)
    return targets


@triton.jit
def _draw(
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
