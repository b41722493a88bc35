"""RoI features (He et al. 2017, arXiv 1703.06870) from the pyramid level that fits each box."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import box_area, roi_align

CANONICAL_SIZE = 224
CANONICAL_LEVEL = 4


class RoIPooler(nn.Module):
    """RoIAlign from one feature map, or from the pyramid level of equation 1 in the FPN paper.

    Args:
        output_size: side of the pooled features.
        strides: pixels between cells of each level, finest first, each twice the one before.
        sampling_ratio: samples along each side of a bin; 0 takes one for each cell that the bin covers.
        aligned: shift by half a pixel (``ROIAlignV2``) or not (``ROIAlign``).
    """

    def __init__(
        self, output_size: int, strides: Sequence[int], sampling_ratio: int = 0, aligned: bool = True
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = tuple(strides)
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.levels = tuple(stride.bit_length() - 1 for stride in strides)

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Pool levels (N, C, H_l, W_l) at (R_n, 4) ``xyxy`` boxes of each image: (sum R_n, C, S, S)."""
        image = torch.cat([torch.full((box.shape[0],), n, device=box.device) for n, box in enumerate(boxes)])
        rois = torch.cat(list(boxes))
        level = self.assign_levels(rois) if len(features) > 1 else torch.zeros_like(image)
        return roi_align(
            features, rois, image, level, self.strides, self.output_size, self.sampling_ratio, self.aligned
        )

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Return (R,) int64 indices of levels for (R, 4) ``xyxy``; a box of 224 px belongs to stride 16."""
        size = torch.sqrt(box_area(boxes))
        level = torch.floor(CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIZE + 1e-8))
        return level.clamp(self.levels[0], self.levels[-1]).to(torch.int64) - self.levels[0]
