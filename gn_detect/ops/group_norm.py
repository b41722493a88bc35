"""Group Normalization with an optional residual and ReLU (Wu & He 2018, arXiv 1803.08494, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``activation(GN(x) + residual)``.

    Args:
        x: (N, C, *), any floating dtype and memory format; N may be 0.
        num_groups: number of groups; must divide C.
        weight, bias: (C,) scale and shift, or None.
        eps: added to the variance of a group.
        residual: tensor of x's shape, added after the normalisation.
        activation: None or ``"relu"``.

    Returns:
        A tensor of x's shape.

    Raises:
        ValueError: an unknown activation, or a residual of another shape.
    """
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', not {activation!r}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}")
    y = F.group_norm(x, num_groups, weight, bias, eps)
    # In place: the backward of group_norm reads its input, never its output.
    if residual is not None:
        y = y.add_(residual)
    if activation == "relu":
        y = F.relu_(y)
    return y
