"""Convolution, then normalisation, residual and ReLU: the unit of every block and head."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .norm import GroupNorm


class Conv2d(nn.Conv2d):
    """nn.Conv2d that carries its norm (``norm`` in the state dict, as in detectron2) and its activation.

    Args:
        *args, **kwargs: of nn.Conv2d.
        norm: normalisation layer or None.
        activation: None or ``"relu"``, applied last.
    """

    def __init__(
        self, *args: Any, norm: nn.Module | None = None, activation: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C_in, H, W) -> ``activation(norm(conv(x)) + residual)``, (N, C_out, H', W')."""
        y = super().forward(x)
        if isinstance(self.norm, GroupNorm):  # one call for norm, residual and ReLU
            normalised: Tensor = self.norm(y, residual, self.activation)
            return normalised
        if self.norm is not None:
            y = self.norm(y)
        # In place: neither a convolution nor these norms read their own output in backward.
        if residual is not None:
            y = y.add_(residual)
        return F.relu_(y) if self.activation == "relu" else y
