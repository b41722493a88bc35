"""Class layers of other libraries: where the background is, and which rows are which class."""

from __future__ import annotations

import torch
from torch import Tensor

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
"""Of COCO's 80 categories; torchvision's detectors have an output for each of 0 to 90.

Where ``coco_ids`` is True below, 91 classes are these; elsewhere they are a background and 90 categories.
"""


def background_last(tensor: Tensor, *, coco_ids: bool = False) -> Tensor:
    """(K + 1, ...) class logits with the background first -> with the background last."""
    if coco_ids and len(tensor) == 91:
        return tensor[[*COCO_IDS, 0]]
    return torch.cat([tensor[1:], tensor[:1]])


def boxes_without_background(tensor: Tensor, *, coco_ids: bool = False) -> Tensor:
    """(4 (K + 1), ...) box deltas with the background first -> (4 K, ...); class-agnostic ones: (4, ...)."""
    rows = tensor.unflatten(0, (-1, 4))
    return (rows[COCO_IDS] if coco_ids and len(rows) == 91 else rows[1:]).flatten(0, 1)


def masks_without_background(tensor: Tensor, *, coco_ids: bool = False) -> Tensor:
    """(K + 1, ...) mask logits with the background first -> (K, ...); a single mask stays."""
    if len(tensor) == 1:
        return tensor
    return tensor[COCO_IDS] if coco_ids and len(tensor) == 91 else tensor[1:]
