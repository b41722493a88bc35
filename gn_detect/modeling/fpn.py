"""Feature Pyramid Network (Lin et al. 2017, arXiv 1612.03144) with an extra level p6 by subsampling p5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from ..config.schema import FPN as FPNSettings
from ..layers import init_xavier, make_conv
from .resnet import NormFactory


class FPN(nn.Module):
    """Top-down pathway over a bottom-up network.

    Args:
        bottom_up: backbone that returns ``{name: (N, C_i, H / s_i, W / s_i)}``.
        settings: ``in_features`` are contiguous levels, high resolution first.
        levels: channels and stride of each of these levels.
        norm: makes the norm of a convolution from its number of channels.
        style: ``MODEL.CONV_STYLE``.
    """

    def __init__(
        self,
        bottom_up: nn.Module,
        settings: FPNSettings,
        levels: Sequence[tuple[int, int]],
        norm: NormFactory,
        style: str = "detectron2",
    ) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.settings = settings
        self.levels = tuple(stride.bit_length() - 1 for _, stride in levels)
        self.size_divisibility = levels[-1][1]
        width = settings.out_channels
        for level, (channels, _) in zip(self.levels, levels, strict=True):
            lateral, output = (
                make_conv(channels, width, 1, norm(width), style=style),
                make_conv(width, width, 3, norm(width), style=style),
            )
            init_xavier(lateral)
            init_xavier(output)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) to ``{"p2": (N, C, H / 4, W / 4), ..., "p6": (N, C, H / 64, W / 64)}``."""
        bottom_up = self.bottom_up(x)
        with record_function("fpn"):
            return self._pyramid(bottom_up)

    def _pyramid(self, bottom_up: dict[str, Tensor]) -> dict[str, Tensor]:
        pyramid = {}
        top_down = None
        for level, name in reversed(list(zip(self.levels, self.settings.in_features, strict=True))):
            lateral = getattr(self, f"fpn_lateral{level}")(bottom_up[name])
            if top_down is not None:
                lateral = lateral + _upsample(top_down)
                if self.settings.fuse_type == "avg":
                    lateral = lateral / 2
            top_down = lateral
            pyramid[f"p{level}"] = getattr(self, f"fpn_output{level}")(top_down)
        last = self.levels[-1]
        pyramid[f"p{last + 1}"] = F.max_pool2d(pyramid[f"p{last}"], kernel_size=1, stride=2)
        return dict(sorted(pyramid.items()))


def _upsample(x: Tensor) -> Tensor:
    """Repeat each cell of (N, C, H, W) four times; autocast would widen x on a GPU, to the same values."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
