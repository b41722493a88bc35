"""Feature Pyramid Network (Lin et al. 2017, arXiv 1612.03144) with an extra level p6 by subsampling p5."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from ..layers import Conv2d
from .init import init_xavier
from .resnet import NormFactory


class FPN(nn.Module):
    """Top-down pathway over a bottom-up network.

    Args:
        bottom_up: backbone that returns ``{name: (N, C_i, H / s_i, W / s_i)}``.
        in_features: names of contiguous levels, high resolution first, such as res2 ... res5.
        in_channels, strides: of those levels.
        out_channels: C of every pyramid level.
        norm: norm of every convolution; bias only where there is none.
        fuse_type: ``"sum"`` or ``"avg"`` of lateral and top-down features.
    """

    def __init__(
        self,
        bottom_up: nn.Module,
        in_features: Sequence[str],
        in_channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int,
        norm: NormFactory,
        fuse_type: str = "sum",
    ) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        self.levels = tuple(stride.bit_length() - 1 for stride in strides)
        self.size_divisibility = strides[-1]
        self.fuse_type = fuse_type
        for level, channels in zip(self.levels, in_channels, strict=True):
            lateral_norm, output_norm = norm(out_channels), norm(out_channels)
            lateral = Conv2d(channels, out_channels, 1, bias=lateral_norm is None, norm=lateral_norm)
            output = Conv2d(
                out_channels, out_channels, 3, padding=1, bias=output_norm is None, norm=output_norm
            )
            init_xavier(lateral)
            init_xavier(output)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> ``{"p2": (N, C, H / 4, W / 4), ..., "p6": (N, C, H / 64, W / 64)}``."""
        bottom_up = self.bottom_up(x)
        with record_function("fpn"):
            return self._pyramid(bottom_up)

    def _pyramid(self, bottom_up: dict[str, Tensor]) -> dict[str, Tensor]:
        pyramid = {}
        top_down = None
        for level, name in reversed(list(zip(self.levels, self.in_features, strict=True))):
            lateral = getattr(self, f"fpn_lateral{level}")(bottom_up[name])
            if top_down is not None:
                lateral = lateral + F.interpolate(top_down, scale_factor=2.0, mode="nearest")
                if self.fuse_type == "avg":
                    lateral = lateral / 2
            top_down = lateral
            pyramid[f"p{level}"] = getattr(self, f"fpn_output{level}")(top_down)
        last = self.levels[-1]
        pyramid[f"p{last + 1}"] = F.max_pool2d(pyramid[f"p{last}"], kernel_size=1, stride=2)
        return dict(sorted(pyramid.items()))
