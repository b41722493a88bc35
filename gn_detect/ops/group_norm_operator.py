"""``gn_detect::group_norm`` as a PyTorch operator with its backward, for compile, export and autograd.

An operator cannot return None, so results that are not needed are empty tensors.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import kernels_run_on

Maybe = Tensor | None


def fused_group_norm(
    x: Tensor, num_groups: int, weight: Maybe, bias: Maybe, eps: float, residual: Maybe, relu: bool
) -> Tensor:
    """Compute ``relu(GN(x) + residual)`` by the operator, for valid arguments of ``ops.group_norm``."""
    last = _is_channels_last(x)
    x = _in_order(x, last)
    if residual is not None:
        residual = _in_order(residual, last)
    if torch.compiler.is_compiling():
        return torch.ops.gn_detect.group_norm(x, num_groups, weight, bias, eps, residual, relu)[0]
    return _GroupNorm.apply(x, num_groups, weight, bias, eps, residual, relu)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the statistics of tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _is_channels_last(x: Tensor) -> bool:
    """Return whether the channels of a pixel are neighbours in memory, and one pixel follows the other."""
    if x.is_contiguous():
        return False
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def _in_order(x: Tensor, channels_last: bool) -> Tensor:
    """Return ``x`` itself, or a copy with this memory order."""
    if not channels_last:
        return x.contiguous()
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _forward(
    x: Tensor, num_groups: int, weight: Maybe, bias: Maybe, eps: float, residual: Maybe, relu: bool
) -> tuple[Tensor, Tensor]:
    """Return y, and mean and rstd of each group in float32 (float64 for float64) as (2, N, G)."""
    last = _is_channels_last(x)
    x = _in_order(x, last)
    if x.numel() == 0:
        return torch.empty_like(x), _empty_statistics(x, num_groups).zero_()
    if not kernels_run_on(x.device):
        return _native_forward(x, num_groups, weight, bias, eps, residual, relu)
    for tensor in (weight, bias, residual):  # on this device kernels would read another address
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"all tensors must be on one device, not on {x.device} and {tensor.device}")
    weight, bias = _contiguous(weight), _contiguous(bias)
    residual = None if residual is None else _in_order(residual, last)
    return _kernels().forward(x, num_groups, weight, bias, eps, residual, relu, last)


def _forward_fake(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(_in_order(x, _is_channels_last(x))), _empty_statistics(x, num_groups)


def _backward(
    dy: Tensor,
    x: Tensor,
    y: Maybe,
    weight: Maybe,
    bias: Maybe,
    statistics: Tensor,
    relu: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of x, of the residual (with a ReLU; else it is dy), and of weight and bias (2, C)."""
    last = _is_channels_last(x)
    x, dy = _in_order(x, last), _in_order(dy, last)
    found: tuple[Maybe, ...]
    if x.numel() == 0:
        found = torch.empty_like(x), torch.empty_like(x), statistics.new_zeros((2, x.shape[1]))
    elif not kernels_run_on(x.device):
        found = _native_backward(dy, x, y, weight, bias, statistics, relu)
    else:
        y = None if y is None else _in_order(y, last)
        weight, bias = _contiguous(weight), _contiguous(bias)
        found = _kernels().backward(dy, x, y, weight, bias, statistics, relu, last, tuple(needs))
    dx, d_residual, d_affine = (
        t if t is not None and wanted else x.new_empty(0) for t, wanted in zip(found, needs, strict=True)
    )
    return dx, d_residual, d_affine


def _backward_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, statistics, _, needs = rest
    x = _in_order(x, _is_channels_last(x))
    return (
        torch.empty_like(x) if needs[0] else x.new_empty(0),
        torch.empty_like(x) if needs[1] else x.new_empty(0),
        statistics.new_empty((2, x.shape[1])) if needs[2] else x.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep x, mean and rstd, and y if a residual hides the sign of the ReLU's input."""
    x, ctx.num_groups, weight, bias, ctx.eps, residual, ctx.relu = inputs
    y, statistics = output
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, bias, statistics, y if ctx.relu and residual is not None else None)


def _gradients(ctx: Any, dy: Tensor, _: Maybe = None) -> tuple[Any, ...]:
    """Return the gradients of the operator's inputs."""
    x, weight, bias, statistics, y = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable_gradients(ctx, dy)
    needs_x, _, needs_weight, needs_bias, _, needs_residual, _ = ctx.needs_input_grad
    needs = [needs_x, needs_residual and ctx.relu, needs_weight or needs_bias]
    op = _backward if _is_plain(dy) else torch.ops.gn_detect.group_norm_backward.default
    dx, d_residual, d_affine = op(dy, x, y, weight, bias, statistics, ctx.relu, needs)
    if not ctx.relu:
        d_residual = dy
    d_weight, d_bias = d_affine.unbind() if needs[2] else (d_affine, d_affine)
    return (
        dx if needs_x else None,
        None,
        d_weight.to(weight.dtype) if needs_weight else None,
        d_bias.to(bias.dtype) if needs_bias else None,
        None,
        d_residual.to(ctx.residual_dtype) if needs_residual else None,
        None,
    )


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """Compute the same by PyTorch's operators, whose gradients have gradients."""
    x, weight, bias, _, y = ctx.saved_tensors
    dtypes = [t.dtype for t in (weight, bias) if t is not None]
    dtype = torch.promote_types(x.dtype, dtypes[0]) if dtypes else x.dtype
    z = F.group_norm(x.to(dtype), ctx.num_groups, weight, bias, ctx.eps)
    if ctx.relu:
        dy = torch.where((z if y is None else y) <= 0, 0, dy)
    inputs = {i: t for i, t in ((0, x), (2, weight), (3, bias)) if ctx.needs_input_grad[i]}
    gradients: list[Any] = [None] * 7
    if inputs:
        found = torch.autograd.grad(z, list(inputs.values()), dy.to(dtype), create_graph=True)
        for i, gradient in zip(inputs, found, strict=True):
            gradients[i] = gradient
    if ctx.needs_input_grad[5]:
        gradients[5] = dy.to(ctx.residual_dtype)
    return tuple(gradients)


# A compiler must call the operators with the memory order of its trace: their results have this order as
# well.
_EXACT_STRIDES = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)

torch.library.define(
    "gn_detect::group_norm",
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? residual, bool relu)"
    " -> (Tensor, Tensor)",
    tags=_EXACT_STRIDES,
)
torch.library.define(
    "gn_detect::group_norm_backward",
    "(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor statistics, bool relu,"
    " bool[3] needs) -> (Tensor, Tensor, Tensor)",
    tags=_EXACT_STRIDES,
)

torch.library.impl("gn_detect::group_norm", ("cuda", "cpu"), _forward)
torch.library.impl("gn_detect::group_norm_backward", ("cuda", "cpu"), _backward)
torch.library.register_fake("gn_detect::group_norm", _forward_fake)
torch.library.register_fake("gn_detect::group_norm_backward", _backward_fake)
torch.library.register_autograd("gn_detect::group_norm", _gradients, setup_context=_save)


def _is_plain(x: Tensor) -> bool:
    """Return whether nothing observes the operators: calls past PyTorch's dispatch are then 6 us cheaper."""
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing()
    return type(x) in (Tensor, torch.nn.Parameter) and not watched


class _GroupNorm(torch.autograd.Function):
    """The operator's gradient in eager mode, where its registration costs 13 us of host time more a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        op = _forward if _is_plain(inputs[0]) else torch.ops.gn_detect.group_norm.default
        output = op(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return _gradients(ctx, *gradients)


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    """Import the launches of the kernels where they run: Triton is not everywhere."""
    from .group_norm_triton import launch

    return launch


def _native_forward(
    x: Tensor, num_groups: int, weight: Maybe, bias: Maybe, eps: float, residual: Maybe, relu: bool
) -> tuple[Tensor, Tensor]:
    """Compute the operator without kernels: a program compiled or exported elsewhere, or an old GPU."""
    dtype = accumulator(x.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    y = F.group_norm(x.to(dtype), num_groups, weight, bias, eps)
    if residual is not None:
        y = y + residual
    if relu:
        y = F.relu(y)
    variance, mean = torch.var_mean(x.to(dtype).reshape(x.shape[0], num_groups, -1), dim=2, correction=0)
    return torch.empty_like(x).copy_(y), torch.stack([mean, (variance + eps).rsqrt()])


def _native_backward(
    dy: Tensor, x: Tensor, y: Maybe, weight: Maybe, bias: Maybe, statistics: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = statistics.reshape(2, x.shape[0], -1, 1)
    dtype = statistics.dtype
    samples, channels = x.shape[:2]
    xhat = ((x.to(dtype).reshape(samples, mean.shape[1], -1) - mean) * rstd).reshape(samples, channels, -1)
    scale = 1 if weight is None else weight.to(dtype)[:, None]
    shift = 0 if bias is None else bias.to(dtype)[:, None]
    dz = dy.to(dtype).reshape(xhat.shape)
    if relu:
        z = xhat * scale + shift if y is None else y.reshape(xhat.shape)
        dz = torch.where(z <= 0, 0, dz)
    d_affine = torch.stack([(dz * xhat).sum((0, 2)), dz.sum((0, 2))])
    groups = (samples, mean.shape[1], -1)
    d_xhat, xhat = (dz * scale).reshape(groups), xhat.reshape(groups)
    dx = rstd * (d_xhat - d_xhat.mean(2, keepdim=True) - xhat * (d_xhat * xhat).mean(2, keepdim=True))
    dx, dz = (torch.empty_like(x).copy_(t.reshape(x.shape)) for t in (dx, dz))
    return dx, dz, d_affine


def _contiguous(parameter: Maybe) -> Maybe:
    return None if parameter is None else parameter.contiguous()


def _empty_statistics(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty((2, x.shape[0], num_groups), dtype=accumulator(x.dtype))
