"""Group Normalization with an optional residual and ReLU (Wu & He 2018, arXiv 1803.08494, section 3).

On an NVIDIA GPU one operator computes all of it, with the kernels of ``group_norm_triton``. Elsewhere
PyTorch's own operators do. ``GN_DETECT_FUSED=0`` in the environment turns the operator off.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .group_norm_operator import Maybe, fused_group_norm

# Pixels of a channel from which the kernels' 32-bit numbers may overflow: the parts of a split, 512 at most,
# are rounded up to whole tiles of up to 2**13 pixels.
TOO_MANY_PIXELS = 2**31 - 2**24

# Use the operator on a GPU.
FUSED = os.environ.get("GN_DETECT_FUSED", "1") != "0" and find_spec("triton") is not None


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
    """Return ``activation(GN(x) + residual)``.

    Statistics are in float32 (float64 for float64). The result has x's dtype, also under autocast.

    Args:
        x: (N, C, *), any floating dtype and memory format; N may be 0.
        num_groups: number of groups; must divide C.
        weight, bias: (C,) scale and shift, or None.
        eps: added to the variance of a group.
        residual: tensor of x's shape, added after the normalisation.
        activation: None or ``"relu"``.

    Returns:
        A tensor of x's shape, dtype and memory format.

    Raises:
        ValueError: the activation is unknown, the residual has another shape, or x has a single element.
        RuntimeError: C is not divisible, or weight or bias are not (C,), as from ``F.group_norm``.
    """
    if activation is not None and activation != "relu":
        raise ValueError(f"activation must be None or 'relu', not {activation!r}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}")
    arguments = (x, num_groups, weight, bias, eps, residual, activation is not None)
    if _use_operator(x) and _is_valid(x, num_groups, weight, bias):
        return fused_group_norm(*arguments)
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _native(*arguments)
    if device == "cpu":  # this operator works in float32 inside, without a float32 copy of x
        with torch.autocast(device, enabled=False):
            return _native(*arguments)
    return _native(*arguments).to(x.dtype)  # autocast runs group_norm in float32


def _use_operator(x: Tensor) -> bool:
    """Exclude tensors of torch.func and forward-mode gradients, for which PyTorch has its own rules."""
    return FUSED and x.is_cuda and (torch.compiler.is_compiling() or not _is_transformed())


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _is_valid(x: Tensor, num_groups: int, weight: Maybe, bias: Maybe) -> bool:
    """Return whether the operator accepts the arguments; ``F.group_norm`` computes others or raises."""
    if x.dim() < 2 or not x.is_floating_point() or num_groups < 1:
        return False
    if x.shape[2:].numel() >= TOO_MANY_PIXELS:
        return False
    channels = x.size(1)
    if channels % num_groups or x.numel() == num_groups:  # the latter: a single element in a group and sample
        return False
    for parameter in (weight, bias):
        if parameter is not None and (
            parameter.dim() != 1 or parameter.numel() != channels or parameter.device != x.device
        ):
            return False
    return True


def _native(
    x: Tensor, num_groups: int, weight: Maybe, bias: Maybe, eps: float, residual: Maybe, relu: bool
) -> Tensor:
    y = F.group_norm(x, num_groups, weight, bias, eps)
    # In place: the backward of group_norm reads its input, never its output.
    if residual is not None:
        keep = torch.compiler.is_compiling() or _is_transformed()
        y = (y + residual).to(y.dtype) if keep else y.add_(residual)
    return F.relu_(y) if relu else y
