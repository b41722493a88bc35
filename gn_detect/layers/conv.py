"""Convolution, then normalisation, residual and ReLU: the unit of every block and head."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .norm import GroupNorm

Weighted = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


class Conv2d(nn.Conv2d):
    """nn.Conv2d that carries its norm (``norm`` in the state dict, as in detectron2) and its activation.

    Args:
        *args, **kwargs: arguments of nn.Conv2d.
        norm: normalisation layer or None.
        activation: None or ``"relu"``, applied last.
        norm_last: apply the norm after the activation; without a residual.
    """

    def __init__(
        self,
        *args: Any,
        norm: nn.Module | None = None,
        activation: str | None = None,
        norm_last: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation
        self.norm_last = norm_last

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (N, C_in, H, W) to ``activation(norm(conv(x)) + residual)``, (N, C_out, H', W')."""
        return self._finish(super().forward(x), residual)

    def _finish(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if self.norm_last and self.norm is not None:
            last: Tensor = self.norm(F.relu_(y) if self.activation == "relu" else y)
            return last
        if isinstance(self.norm, GroupNorm):  # one call for norm, residual and ReLU
            normalised: Tensor = self.norm(y, residual, self.activation)
            return normalised
        if self.norm is not None:
            y = self.norm(y)
        # In place: neither a convolution nor these norms read their own output in backward.
        if residual is not None:
            y = y.add_(residual)
        return F.relu_(y) if self.activation == "relu" else y


def make_conv(
    in_channels: int,
    out_channels: int,
    size: int,
    norm: nn.Module | None,
    activation: str | None = None,
    style: str = "detectron2",
) -> Conv2d:
    """Return a convolution that keeps height and width.

    Args:
        in_channels, out_channels: of the convolution.
        size: side of the kernel, odd.
        norm, activation: see :class:`Conv2d`.
        style: ``MODEL.CONV_STYLE``: ``"detectron2"`` has a bias only where there is no norm, and the
            activation last; ``"tensorpack"`` has a bias in any case, and the norm last.
    """
    is_tensorpacks = style == "tensorpack"
    return Conv2d(
        in_channels,
        out_channels,
        size,
        padding=size // 2,
        bias=norm is None or is_tensorpacks,
        norm=norm,
        activation=activation,
        norm_last=is_tensorpacks,
    )


def init_he(module: Weighted) -> None:
    """Fill with He's normal, fan out (He et al. 2015, arXiv 1502.01852), as before a ReLU; bias 0."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    _zero_bias(module)


def init_xavier(module: Weighted) -> None:
    """Fill with Caffe2's XavierFill: uniform with variance 1 / fan in; bias 0."""
    nn.init.kaiming_uniform_(module.weight, a=1)
    _zero_bias(module)


def init_normal(module: Weighted, std: float) -> None:
    """Fill with a zero-mean normal of standard deviation ``std``; bias 0."""
    nn.init.normal_(module.weight, std=std)
    _zero_bias(module)


def _zero_bias(module: Weighted) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)
