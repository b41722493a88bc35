"""Triton kernels of :func:`gn_detect.ops.keep_best`.

The first computes the IoU of all pairs of a group in parallel and leaves a bit for each. The second settles
one group in each program, 64 boxes after the other, and only combines bits.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .boxes_triton import box_iou, corners
from .kernels import on_device

BLOCK = tl.constexpr(64)  # boxes in a word of bits


@triton.jit(do_not_specialize=["count"])
def compare_boxes(boxes, bits, count, threshold):
    """Write in ``bits`` (groups, count, words) which of the boxes before would drop each box.

    The operations and their order are torchvision's. Grid: groups x words x words.
    """
    group = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    word = tl.program_id(2)
    if word <= block:
        i = tl.arange(0, BLOCK)
        row = block * BLOCK + i
        column = word * BLOCK + i
        ax1, ay1, ax2, ay2 = corners(boxes, group * count + row, row < count)
        bx1, by1, bx2, by2 = corners(boxes, group * count + column, column < count)
        a1, b1, a2, b2 = ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None]
        over = box_iou(a1, b1, a2, b2, bx1[None, :], by1[None, :], bx2[None, :], by2[None, :]) > threshold
        over &= column[None, :] < row[:, None]
        found = tl.sum(over.to(tl.int64) << i.to(tl.int64)[None, :], axis=1)
        tl.store(bits + (group * count + row) * tl.num_programs(2) + word, found, mask=row < count)


@triton.jit(do_not_specialize=["count"])
def settle(bits, valid, keep, count, WORDS: tl.constexpr):
    """Write which boxes stay, 64 after the other. Grid: groups.

    A box stays if no box before it that stays drops it. Within a block this has one solution. Each round of
    the inner loop makes at least one more box right, so the result changes until it is this one.

    ``WORDS``: power of two, at least the words of a box.
    """
    group = tl.program_id(0).to(tl.int64)
    words = (count + BLOCK - 1) // BLOCK
    i = tl.arange(0, BLOCK)
    word = tl.arange(0, WORDS)
    kept = tl.zeros((WORDS,), tl.int64)
    for block in range(words):
        row = block * BLOCK + i
        exists = row < count
        place = group * count + row
        free = tl.load(valid + place, mask=exists, other=0) != 0
        own = tl.load(bits + place * words + block, mask=exists, other=0)
        before = exists[:, None] & (word < block)[None, :]
        drops = tl.load(bits + (place * words)[:, None] + word[None, :], mask=before, other=0) & kept[None, :]
        free &= tl.max((drops != 0).to(tl.int32), axis=1) == 0
        stays = free
        changes = tl.full((), 1, tl.int32)
        while changes > 0:
            together = tl.sum(stays.to(tl.int64) << i.to(tl.int64))
            kept = tl.where(word == block, together, kept)
            now = free & (own & together == 0)
            changes = tl.sum((now != stays).to(tl.int32))
            stays = now
        tl.store(keep + place, stays, mask=exists)


def keep_best(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Launch the kernels; see :func:`gn_detect.ops.keep_best`."""
    boxes, valid = boxes.contiguous(), valid.contiguous()
    groups, count = valid.shape
    keep = torch.empty_like(valid)
    if valid.numel() == 0:
        return keep
    words = triton.cdiv(count, 64)
    padded = triton.next_power_of_2(words)
    bits = torch.empty((groups, count, words), dtype=torch.int64, device=boxes.device)
    with on_device(boxes.device):
        # Fused operations would round otherwise than torchvision's.
        compare_boxes[(groups, words, words)](
            boxes, bits, count, rounded_down(threshold), num_warps=4, enable_fp_fusion=False
        )
        settle[(groups,)](bits, valid, keep, count, WORDS=padded, num_warps=4 if padded <= 32 else 16)
    return keep


def rounded_down(threshold: float) -> float:
    """Return the largest float32 number that is not above: torchvision compares with a double."""
    near = np.float32(threshold)
    return float(near if float(near) <= threshold else np.nextafter(near, np.float32(-math.inf)))
