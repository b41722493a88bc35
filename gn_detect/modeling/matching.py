"""Matching of anchors and proposals with ground truth, and the sampling of those to train on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from ..ops.matching import is_best

_MATCH_BYTES = 1 << 28  # memory for the pairs of objects and boxes of one image at once
_PAIR_BYTES = 36  # torchvision.ops.box_iou holds nine floats for a pair


def match_boxes(
    objects: Tensor,
    boxes: Tensor,
    thresholds: Sequence[float],
    labels: Sequence[int],
    *,
    keep_best_of_each_object: bool = False,
) -> tuple[Tensor, Tensor]:
    """Match boxes by their IoU with :func:`match`, in at most 256 MB.

    Args:
        objects: (M, 4) ``xyxy``.
        boxes: (N, 4) ``xyxy``.
        thresholds, labels, keep_best_of_each_object: see :func:`match`.

    Returns:
        (N,) int64 index of the object (0 where there is none) and (N,) int8 label: bitwise the result of
        ``match(box_iou(objects, boxes), ...)``.
    """
    size = max(1, _MATCH_BYTES // (_PAIR_BYTES * max(1, len(objects))))
    if len(boxes) <= size:
        iou = box_iou(objects, boxes)
        return match(iou, thresholds, labels, keep_best_of_each_object=keep_best_of_each_object)
    # The best IoU of an object is known only after all boxes, so IoUs are computed twice and not kept.
    parts = boxes.split(size)
    found = [_match_part(objects, part, thresholds, labels) for part in parts]
    index, label, highest = (list(column) for column in zip(*found, strict=True))
    if keep_best_of_each_object:
        best = torch.stack(highest).amax(dim=0)[:, None]
        for part_label, part in zip(label, parts, strict=True):
            part_label.masked_fill_(is_best(box_iou(objects, part), best), 1)
    return torch.cat(index), torch.cat(label)


def _match_part(
    objects: Tensor, boxes: Tensor, thresholds: Sequence[float], labels: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return index and label of a part of the boxes, and each object's highest IoU with them, (M,)."""
    iou = box_iou(objects, boxes)
    return *match(iou, thresholds, labels), iou.amax(dim=1)


def match(
    iou: Tensor, thresholds: Sequence[float], labels: Sequence[int], *, keep_best_of_each_object: bool = False
) -> tuple[Tensor, Tensor]:
    """Assign each box to its ground truth of highest IoU (Ren et al. 2015, section 3.1.2).

    Args:
        iou: (M, N) intersection over union of M objects with N boxes.
        thresholds: increasing IoU values that separate the labels.
        labels: one more than thresholds: 1 foreground, 0 background, -1 ignored.
        keep_best_of_each_object: boxes that no other box beats for some object become foreground even
            when their IoU is low, but not when it is 0 (detectron2 then takes every box).

    Returns:
        (N,) int64 index of the object (0 where there is none) and (N,) int8 label.
    """
    num_boxes = iou.shape[1]
    if iou.shape[0] == 0:
        index = torch.zeros(num_boxes, dtype=torch.int64, device=iou.device)
        return index, torch.full((num_boxes,), labels[0], dtype=torch.int8, device=iou.device)
    best, index = iou.max(dim=0)
    # The index stays that of the box's own best object, as in Detectron.
    kept = is_best(iou, iou.amax(dim=1, keepdim=True)) if keep_best_of_each_object else None
    return index, label_boxes(best, thresholds, labels, kept)


def label_boxes(
    best: Tensor, thresholds: Sequence[float], labels: Sequence[int], kept: Tensor | None = None
) -> Tensor:
    """Return int8 labels of boxes by their highest IoU, 1 where ``kept``; see :func:`match`."""
    label = torch.full_like(best, labels[0], dtype=torch.int8)
    for threshold, name in zip(thresholds, labels[1:], strict=True):
        label = torch.where(best < threshold, label, name)
    return label if kept is None else label.masked_fill_(kept, 1)


def sample(label: Tensor, count: int, positive_fraction: float, background: int) -> tuple[Tensor, Tensor]:
    """Sample positions of foreground and background at random.

    Args:
        label: (N,) integer labels; -1 is ignored.
        count: largest number of samples.
        positive_fraction: largest share of foreground; background fills the rest.
        background: the label of background.

    Returns:
        int64 indices of the sampled foreground and of the sampled background, in random order.
    """
    positive = ((label != -1) & (label != background)).nonzero()[:, 0]
    negative = (label == background).nonzero()[:, 0]
    num_positive = min(len(positive), int(count * positive_fraction))
    num_negative = min(len(negative), count - num_positive)
    chosen = torch.randperm(len(positive), device=label.device)[:num_positive]
    rest = torch.randperm(len(negative), device=label.device)[:num_negative]
    return positive[chosen], negative[rest]


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return (N, K, D) rows of (N, R, D) ``values``, for each of N at its (N, K) positions."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
