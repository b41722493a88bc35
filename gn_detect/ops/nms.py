"""Greedy non-maximum suppression of many groups at once, with fixed shapes and without a wait for the GPU."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from .kernels import kernels_run_on


def keep_best(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Return which boxes ``torchvision.ops.nms`` keeps in each group.

    Args:
        boxes: (G, B, 4) float32 ``xyxy``, in each group the best score first.
        valid: (G, B) bool; other boxes are not kept and drop no box, whatever their coordinates.
        threshold: IoU above which the later box is dropped.

    Returns:
        (G, B) bool.
    """
    return torch.ops.gn_detect.keep_best(boxes, valid, threshold)


def _one_by_one(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    keep = torch.zeros_like(valid)
    for group, rows in enumerate(valid):
        index = rows.nonzero()[:, 0]
        falling = torch.arange(len(index), 0, -1, dtype=torch.float32, device=boxes.device)
        keep[group, index[torchvision.ops.nms(boxes[group, index], falling, threshold)]] = True
    return keep


def _on_gpu(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    if not kernels_run_on(boxes.device):
        return _one_by_one(boxes, valid, threshold)
    from . import nms_triton

    return nms_triton.keep_best(boxes, valid, threshold)


torch.library.define("gn_detect::keep_best", "(Tensor boxes, Tensor valid, float threshold) -> Tensor")
torch.library.impl("gn_detect::keep_best", "cpu", _one_by_one)
torch.library.impl("gn_detect::keep_best", "cuda", _on_gpu)
torch.library.register_fake("gn_detect::keep_best", lambda boxes, valid, threshold: torch.empty_like(valid))
