"""The few records that travel between data, model and evaluation. They hold tensors and no logic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PolygonMask = list[np.ndarray]
"""One object as polygons: each array is (2K,) float64, ``x0, y0, x1, y1, ...`` in absolute pixels."""


@dataclass
class Target:
    """Ground truth of one image, in the pixels of the network's input.

    Attributes:
        boxes: (N, 4) float32, ``xyxy``, absolute pixels.
        labels: (N,) int64, contiguous classes in ``[0, num_classes)``.
        masks: one entry for each object, either polygons or a bool (H, W) bitmap of the image's size;
            None when the dataset or the task has no masks.
    """

    boxes: Tensor
    labels: Tensor
    masks: list[PolygonMask | Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        """Boxes, labels and bitmaps on ``device``; polygons stay NumPy arrays."""
        masks = self.masks
        if masks is not None:
            masks = [m.to(device, non_blocking=non_blocking) if isinstance(m, Tensor) else m for m in masks]
        return Target(
            self.boxes.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            masks,
        )


@dataclass
class Detections:
    """What was found in one image, in the pixels of the original file.

    Attributes:
        boxes: (N, 4) float32, ``xyxy``, absolute pixels, inside the image.
        scores: (N,) float32 in [0, 1], descending.
        labels: (N,) int64, contiguous classes in ``[0, num_classes)``.
        masks: (N, H, W) bool of the image's size, or None for a model without masks; until they are pasted,
            (N, S, S) float32 probabilities inside the boxes.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Tensor | slice) -> Detections:
        masks = None if self.masks is None else self.masks[index]
        return Detections(self.boxes[index], self.scores[index], self.labels[index], masks)

    def to(self, device: torch.device | str) -> Detections:
        """The same detections on ``device``."""
        masks = None if self.masks is None else self.masks.to(device)
        return Detections(self.boxes.to(device), self.scores.to(device), self.labels.to(device), masks)


@dataclass
class Sample:
    """One image as the loader yields it; a batch is a list of these.

    Attributes:
        image: (3, H, W) uint8, channels in ``INPUT.FORMAT`` order, 0..255, not normalised.
        image_id: the annotation file's id; text where the file has text, and the sample is to be evaluated.
        file_name: path of the file that was read.
        original_size: (height, width) of the file in pixels, EXIF orientation applied.
        target: ground truth at the size of ``image``; None at inference.
    """

    image: Tensor
    image_id: Any
    file_name: str
    original_size: tuple[int, int]
    target: Target | None = None
