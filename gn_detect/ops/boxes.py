"""Arithmetic on boxes beyond torchvision.ops. Boxes are floating-point ``xyxy`` in absolute pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

# Largest log scale in decoding: a 16 px anchor grows to at most 1000 px, as in R-CNN.
SCALE_CLAMP = math.log(1000.0 / 16)

_FEW_GROUPS = 8


def box_area(boxes: Tensor) -> Tensor:
    """Return (N,) areas in square pixels of (N, 4) boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def clip_boxes(boxes: Tensor, size: tuple[int, int] | Tensor) -> Tensor:
    """Clip boxes (..., 4) to an image of ``size`` = (height, width), two numbers or a tensor (2,)."""
    if isinstance(size, Tensor):  # an exported program reads it from its input
        limit = size.flip(0).repeat(2).to(boxes.dtype)
        return torch.minimum(boxes.clamp(min=0), limit)
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x, y], dim=-1).flatten(-2)


def nms_by_group(
    boxes: Tensor, scores: Tensor, group: Tensor, num_groups: int, threshold: float, limit: int
) -> Tensor:
    """Return the first ``limit`` of ``torchvision.ops.batched_nms``, also in a compiled or exported program.

    torchvision runs one NMS for each group, or one for all with the groups moved apart; the number of boxes
    decides. A program does not know this number. So it takes up to 8 groups one by one, and moves more apart.

    Args:
        boxes: (N, 4) ``xyxy``, no coordinate below 0.
        scores: (N,) float32.
        group: (N,) int64 below ``num_groups``; boxes of different groups do not suppress each other.
        threshold: IoU above which the box of the lower score is dropped.
        limit: largest number of indices.

    Returns:
        (M,) int64 indices, best score first; M is at most ``limit``.
    """
    if not torch.compiler.is_compiling():
        return torchvision.ops.batched_nms(boxes, scores, group, threshold)[:limit]
    keep = _nms_of_any_number_by_group(boxes, scores, group, num_groups, threshold)[:limit]
    # Without it PyTorch 2.11 uses the sum of all groups' largest numbers, which no ONNX integer holds.
    torch._check(keep.shape[0] <= limit)
    return keep


def _nms_of_any_number_by_group(
    boxes: Tensor, scores: Tensor, group: Tensor, num_groups: int, threshold: float
) -> Tensor:
    if num_groups > _FEW_GROUPS:
        farthest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()  # there may be no box
        moved = boxes + (group.to(boxes.dtype) * (farthest + 1))[:, None]
        return _nms_of_any_number(moved, scores, threshold)
    kept = []
    for i in range(num_groups):
        row = (group == i).nonzero()[:, 0]
        kept.append(row[_nms_of_any_number(boxes[row], scores[row], threshold)])
    keep = torch.cat(kept)
    return keep[scores[keep].argsort(descending=True)]


def _nms_of_any_number(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Add two boxes, apart from all others: torchvision promises exporters at least two boxes."""
    more = boxes.new_tensor([[-2, -2, -1, -1], [-4, -4, -3, -3]])
    least = scores.new_full((2,), torch.finfo(scores.dtype).min)
    keep = torchvision.ops.nms(torch.cat([boxes, more]), torch.cat([scores, least]), threshold)
    return keep[keep < boxes.shape[0]]


def scale_boxes(boxes: Tensor, scale_x: float, scale_y: float) -> Tensor:
    """Multiply x of boxes (..., 4) by ``scale_x`` and y by ``scale_y``."""
    return torch.stack([boxes[..., 0::2] * scale_x, boxes[..., 1::2] * scale_y], dim=-1).flatten(-2)


def _times(values: Tensor, x: float, y: float) -> Tensor:
    """Multiply (..., 2) by x and y; numbers need no copy to a GPU."""
    return values * x if x == y else torch.stack([values[..., 0] * x, values[..., 1] * y], dim=-1)


def _over(values: Tensor, x: float, y: float) -> Tensor:
    return values / x if x == y else torch.stack([values[..., 0] / x, values[..., 1] / y], dim=-1)


def encode_boxes(reference: Tensor, target: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the regression targets from ``reference`` to ``target``: the inverse of :func:`decode_boxes`.

    Centre offsets are in units of the reference's size, and sizes are log ratios, each times its weight
    (Girshick et al. 2014, arXiv 1311.2524, appendix C).

    Args:
        reference: (N, 4) anchors or proposals of positive width and height.
        target: (N, 4) ground-truth boxes.
        weights: multipliers of (dx, dy, dw, dh).

    Returns:
        (N, 4) deltas.
    """
    reference_size = reference[:, 2:] - reference[:, :2]
    target_size = target[:, 2:] - target[:, :2]
    reference_center = reference[:, :2] + 0.5 * reference_size
    target_center = target[:, :2] + 0.5 * target_size
    wx, wy, ww, wh = weights
    position = _times(target_center - reference_center, wx, wy) / reference_size
    scale = _times(torch.log(target_size / reference_size), ww, wh)
    return torch.cat([position, scale], dim=1)


def decode_boxes(deltas: Tensor, reference: Tensor, weights: Sequence[float]) -> Tensor:
    """Apply regression ``deltas`` to ``reference`` boxes.

    Args:
        deltas: (N, 4 * K), K boxes (classes) for each reference.
        reference: (N, 4) anchors or proposals.
        weights: divisors of (dx, dy, dw, dh).

    Returns:
        (N, 4 * K) float32 boxes; the log scale is clamped at :data:`SCALE_CLAMP`.
    """
    deltas = deltas.float()
    reference = reference.to(deltas.dtype)
    size = (reference[:, 2:] - reference[:, :2])[:, None]  # (N, 1, 2)
    center = reference[:, None, :2] + 0.5 * size
    wx, wy, ww, wh = weights
    steps = deltas.view(-1, deltas.shape[1] // 4, 4)
    position = _over(steps[..., :2], wx, wy)
    scale = _over(steps[..., 2:], ww, wh).clamp(max=SCALE_CLAMP)
    new_center = position * size + center
    new_size = torch.exp(scale) * size
    boxes = torch.cat([new_center - 0.5 * new_size, new_center + 0.5 * new_size], dim=-1)
    return boxes.view(deltas.shape)
