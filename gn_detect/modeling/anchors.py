"""Anchors (Ren et al. 2015, arXiv 1506.01497), centred on the grid of each feature map without rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AnchorGenerator(nn.Module):
    """Anchors of every level of a pyramid.

    Args:
        sizes: for each level, square roots of the areas in pixels; one entry serves all levels.
        aspect_ratios: for each level, height / width; one entry serves all levels.
        strides: pixels between neighbouring cells of each level.
        offset: position of the first centre in units of the stride.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        levels = len(strides)
        sizes = list(sizes) * levels if len(sizes) == 1 else sizes
        aspect_ratios = list(aspect_ratios) * levels if len(aspect_ratios) == 1 else aspect_ratios
        self.strides = tuple(strides)
        self.offset = offset
        self.num_anchors = len(sizes[0]) * len(aspect_ratios[0])
        for level, (size, ratio) in enumerate(zip(sizes, aspect_ratios, strict=True)):
            # Not saved: anchors follow from the configuration.
            self.register_buffer(f"cell_anchors_{level}", cell_anchors(size, ratio), persistent=False)

    def forward(self, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return for each map of shape (height, width) its anchors, (H * W * A, 4) ``xyxy``, row by row."""
        return [
            self._level(getattr(self, f"cell_anchors_{level}"), shape, stride)
            for level, (shape, stride) in enumerate(zip(shapes, self.strides, strict=True))
        ]

    def _level(self, cells: Tensor, shape: tuple[int, int], stride: int) -> Tensor:
        height, width = shape
        first = self.offset * stride
        y = torch.arange(height, dtype=torch.float32, device=cells.device) * stride + first
        x = torch.arange(width, dtype=torch.float32, device=cells.device) * stride + first
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack([grid_x, grid_y, grid_x, grid_y], dim=-1).view(-1, 1, 4)
        return (shifts + cells).view(-1, 4)


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Return (sizes * ratios, 4) float32 anchors centred on the origin, sizes outermost."""
    anchors = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2.0 / ratio)
            height = ratio * width
            anchors.append([-width / 2, -height / 2, width / 2, height / 2])
    return torch.tensor(anchors)
