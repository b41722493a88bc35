"""Deformable convolution (Dai et al. 2017, arXiv 1703.06211; Zhu et al. 2018, arXiv 1811.11168)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from .conv import Conv2d

_OUTSIDE = 1e6  # cells; a sample outside the map is 0


class DeformConv2d(Conv2d):
    """A convolution without a bias that reads each sample of its kernel at an offset of its own.

    Its state dict is that of :class:`Conv2d`. It computes in the dtype of its weight, also under autocast:
    torchvision has no kernel in half precision for a CPU, and half precision cannot tell neighbouring
    places apart.

    Args:
        *args, **kwargs: arguments of :class:`Conv2d`.
        offset_groups: parts of the input channels that have offsets of their own.

    Raises:
        ValueError: ``offset_groups`` does not divide the input channels.
    """

    def __init__(self, *args: Any, offset_groups: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.in_channels % offset_groups:
            raise ValueError(
                f"{offset_groups} offset groups of a deformable convolution do not divide its "
                f"{self.in_channels} channels"
            )
        self.offset_groups = offset_groups

    @property
    def samples(self) -> int:
        """Return the number of samples of each output, in all offset groups."""
        height, width = self.kernel_size
        return self.offset_groups * height * width

    def forward(  # type: ignore[override]
        self, x: Tensor, offset: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Map (N, C_in, H, W) to ``activation(norm(conv(x)) + residual)``, (N, C_out, H', W').

        Args:
            x: features.
            offset: (N, 2 * samples, H', W') in cells, (y, x) of each sample in turn, by offset groups.
            mask: (N, samples, H', W') factors of the samples, or None.
            residual: (N, C_out, H', W') or None.
        """
        dtype, device = self.weight.dtype, x.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                y = self._convolve(x.to(dtype), offset.to(dtype), None if mask is None else mask.to(dtype))
            return self._finish(y.to(x.dtype), residual)
        return self._finish(self._convolve(x, offset, mask), residual)

    def _convolve(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        # torchvision reads any memory at an offset that is not a number. So an offset that is not finite
        # becomes one outside the map, and the output of its place is not a number.
        lost = offset.detach().isfinite().logical_not()
        offset = offset.masked_fill(lost, _OUTSIDE)
        layout: Any = self.stride, self.padding, self.dilation
        y: Tensor = deform_conv2d(x, offset, self.weight, self.bias, *layout, mask)
        return y.masked_fill_(lost.any(1, keepdim=True), torch.nan)
