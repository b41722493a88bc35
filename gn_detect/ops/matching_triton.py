"""Triton kernels of :func:`gn_detect.ops.match_boxes_padded`.

The first finds the best object of each box, and raises the highest IoU of each object by an atomic maximum.
The second computes the IoUs again, and compares. An IoU is not negative, so its bits, read as a whole number,
are in the order of its value, and the maximum is the same in any order of the programs. Where object and box
have no area, 0 / 0 is no number: it counts as the box's highest IoU, as in PyTorch. Such an object has no
other IoU above 0, so its own highest IoU does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .boxes_triton import box_iou, corners
from .kernels import on_device

BLOCK = tl.constexpr(256)  # boxes of a program


@triton.jit
def _count(valid, image, room, ROOM: tl.constexpr):
    i = tl.arange(0, ROOM)
    real = tl.load(valid + image * room + i, mask=i < room, other=0) != 0
    return tl.sum(real.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["room", "count", "step"])
def find_objects(
    objects,
    valid,
    boxes,
    best,
    index,
    highest,
    room,
    count,
    step,
    ROOM: tl.constexpr,
    KEEP_BEST: tl.constexpr,
):
    """Write the best IoU and its object for each box, and with ``KEEP_BEST`` raise ``highest`` (N, M).

    ``step``: rows from the boxes of an image to those of the next. ``ROOM``: power of two, at least ``room``.
    Grid: blocks of boxes x images.
    """
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < count
    x1, y1, x2, y2 = corners(boxes, image * step + row, exists)
    most = tl.full((BLOCK,), -1.0, tl.float32)
    which = tl.zeros((BLOCK,), tl.int32)
    for m in range(_count(valid, image, room, ROOM)):
        place = image * room + m
        ox1, oy1, ox2, oy2 = corners(objects, place, m < room)
        iou = box_iou(ox1, oy1, ox2, oy2, x1, y1, x2, y2)
        better = ~(iou <= most) & (most == most)
        most = tl.where(better, iou, most)
        which = tl.where(better, m, which)
        if KEEP_BEST:
            top = tl.max(iou.to(tl.int32, bitcast=True), axis=0)
            tl.atomic_max(highest + place, top, mask=top > 0, sem="relaxed")
    tl.store(best + image * count + row, most, mask=exists)
    tl.store(index + image * count + row, which.to(tl.int64), mask=exists)


@triton.jit(do_not_specialize=["room", "count", "step"])
def compare_with_highest(objects, valid, boxes, highest, is_best, room, count, step, ROOM: tl.constexpr):
    """Write which boxes have the highest IoU of some object, above 0. Grid: blocks of boxes x images."""
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < count
    x1, y1, x2, y2 = corners(boxes, image * step + row, exists)
    found = row < 0
    for m in range(_count(valid, image, room, ROOM)):
        place = image * room + m
        ox1, oy1, ox2, oy2 = corners(objects, place, m < room)
        iou = box_iou(ox1, oy1, ox2, oy2, x1, y1, x2, y2)
        found = found | ((iou.to(tl.int32, bitcast=True) == tl.load(highest + place)) & (iou > 0))
    tl.store(is_best + image * count + row, found, mask=exists)


def match_boxes_padded(
    objects: Tensor, valid: Tensor, boxes: Tensor, keep_best: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernels; see :func:`gn_detect.ops.match_boxes_padded`."""
    objects, valid, boxes = objects.contiguous(), valid.contiguous(), boxes.contiguous()
    (images, room), count = valid.shape, boxes.shape[1]
    best = torch.empty((images, count), dtype=torch.float32, device=boxes.device)
    index, is_best = torch.empty_like(best, dtype=torch.int64), torch.empty_like(best, dtype=torch.bool)
    highest = torch.empty_like(valid, dtype=torch.int32)
    (highest if keep_best else is_best).zero_()
    inputs, padded = (objects, valid, boxes), triton.next_power_of_2(room)
    sizes = room, count, 0 if len(boxes) == 1 else count
    options = {"ROOM": padded, "num_warps": 4, "enable_fp_fusion": False}
    grid = triton.cdiv(count, BLOCK.value), images
    with on_device(boxes.device):
        find_objects[grid](*inputs, best, index, highest, *sizes, KEEP_BEST=keep_best, **options)
        if keep_best:
            compare_with_highest[grid](*inputs, highest, is_best, *sizes, **options)
    return best, index, is_best
