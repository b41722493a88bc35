"""Matching of boxes with the objects of many images, with fixed shapes and without a wait for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from .kernels import kernels_run_on


def match_boxes_padded(
    objects: Tensor, valid: Tensor, boxes: Tensor, keep_best: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the object of highest IoU for each box. N, M and R are at least 1.

    Args:
        objects: (N, M, 4) float32 ``xyxy``.
        valid: (N, M) bool, the first rows of each image.
        boxes: (N, R, 4) float32 ``xyxy``, or (1, R, 4) shared by all images.
        keep_best: see below.

    Returns:
        (N, R) float32 IoU, -1 in an image without objects; (N, R) int64 index of the object, the lowest of
        equals, 0 in an image without; and (N, R) bool: with ``keep_best``, boxes that no box of the image
        beats for some object, if their IoU is above 0.
    """
    return torch.ops.gn_detect.match_boxes_padded(objects, valid, boxes, keep_best)


def is_best(iou: Tensor, highest: Tensor) -> Tensor:
    """Return (R,) bool: boxes that no box beats for some object, by (M, R) IoU and each (M, 1) highest."""
    return ((iou == highest) & (highest > 0)).any(dim=0)


def _one_by_one(
    objects: Tensor, valid: Tensor, boxes: Tensor, keep_best: bool
) -> tuple[Tensor, Tensor, Tensor]:
    found = []
    for some, real, box in zip(objects, valid, boxes.expand(len(objects), -1, -1), strict=True):
        iou = torch.where(real[:, None], box_iou(some, box), -1)
        best, index = iou.max(dim=0)
        kept = torch.zeros_like(index, dtype=torch.bool)
        if keep_best:
            kept = is_best(iou, iou.amax(dim=1, keepdim=True))
        found.append((best.float(), index, kept))
    best, index, kept = (torch.stack(column) for column in zip(*found, strict=True))
    return best, index, kept


def _on_gpu(objects: Tensor, valid: Tensor, boxes: Tensor, keep_best: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not kernels_run_on(boxes.device):
        return _one_by_one(objects, valid, boxes, keep_best)
    from . import matching_triton

    return matching_triton.match_boxes_padded(objects, valid, boxes, keep_best)


def _fake(objects: Tensor, valid: Tensor, boxes: Tensor, keep_best: bool) -> tuple[Tensor, Tensor, Tensor]:
    best = objects.new_empty((len(objects), boxes.shape[1]), dtype=torch.float32)
    return best, torch.empty_like(best, dtype=torch.int64), torch.empty_like(best, dtype=torch.bool)


torch.library.define(
    "gn_detect::match_boxes_padded",
    "(Tensor objects, Tensor valid, Tensor boxes, bool keep_best) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("gn_detect::match_boxes_padded", "cpu", _one_by_one)
torch.library.impl("gn_detect::match_boxes_padded", "cuda", _on_gpu)
torch.library.register_fake("gn_detect::match_boxes_padded", _fake)
