"""Calls the kernels: memory for their results, their grids and their tiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import backward as backward_kernels
from . import forward as forward_kernels
from .plan import Plan, alignment, make_plan, power_of_two


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """``y`` with x's strides, and mean and rstd as one (2, N, G) tensor.

    Args:
        x: (N, C, *), not empty, dense in the order (N, C, *) or, with ``channels_last``, (N, *, C).
        residual: of x's shape and strides.
        weight, bias: (C,), contiguous.
        num_groups, eps, relu: as in :func:`gn_detect.ops.group_norm`.
    """
    plan, sizes, common = _arguments("forward", x, num_groups, channels_last)
    y = torch.empty_like(x)
    statistics = x.new_empty((2, x.shape[0], num_groups), dtype=_accumulator(x))
    grid = (x.shape[0] * plan.tiles * plan.splits,)
    with _on_device(x):
        if plan.one_launch:
            forward_kernels.forward_groups[grid](
                x,
                residual,
                weight,
                bias,
                y,
                statistics,
                *sizes,
                eps,
                RELU=relu,
                ONE_TILE=plan.holds_all(_pixels(x)),
                **common,
            )
            return y, statistics
        parts = plan.splits * plan.pieces
        partials = statistics.new_empty((x.shape[0], num_groups, 2, parts))
        split = (plan.splits, plan.split_tiles)
        forward_kernels.partial_statistics[grid](x, partials, sizes[1], *split, **common)
        forward_kernels.normalize[grid](
            x,
            residual,
            weight,
            bias,
            y,
            statistics,
            partials,
            *sizes,
            *split,
            eps,
            RELU=relu,
            BLOCK_PARTS=power_of_two(parts),
            **common,
        )
    return y, statistics


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    relu: bool,
    channels_last: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, of the residual, and of weight and bias as one (2, C) tensor.

    Args:
        dy: gradient of the output, with x's shape and strides.
        x, weight, bias, relu, channels_last: of the forward.
        y: the output, where there were a residual and a ReLU.
        statistics: of the forward.
        needs: which of the three results are wanted; the residual's where there was a ReLU, else it is dy.
    """
    num_groups = statistics.shape[2]
    plan, sizes, common = _arguments("backward", x, num_groups, channels_last)
    needs_x, needs_residual, needs_affine = needs
    dx = torch.empty_like(x) if needs_x else None
    d_residual = torch.empty_like(x) if needs_residual or (needs_x and y is not None) else None
    runs = -(-x.shape[0] // plan.samples) if plan.one_launch else x.shape[0] * plan.splits
    partials = statistics.new_empty((runs, 2, x.shape[1])) if needs_affine else None
    inputs = (weight, bias, statistics)
    with _on_device(x):
        if plan.one_launch:
            d_residual = d_residual if needs_residual else None
            backward_kernels.backward_groups[(runs * plan.tiles,)](
                dy,
                x,
                y,
                *inputs,
                dx,
                d_residual,
                partials,
                sizes[0],
                plan.samples,
                sizes[1],
                RELU=relu,
                ONE_TILE=plan.holds_all(_pixels(x)),
                **common,
            )
        else:
            parts = plan.splits * plan.pieces
            of_groups = statistics.new_empty((x.shape[0], num_groups, 2, parts)) if needs_x else None
            grid = (x.shape[0] * plan.tiles * plan.splits,)
            split = (plan.splits, plan.split_tiles)
            backward_kernels.partial_gradients[grid](
                dy, x, y, *inputs, d_residual, partials, of_groups, *sizes, *split, RELU=relu, **common
            )
            if needs_x:
                # With d_residual the ReLU is behind us.
                if d_residual is not None:
                    dy, relu = d_residual, False
                backward_kernels.input_gradient[grid](
                    dy,
                    x,
                    None,
                    *inputs,
                    dx,
                    of_groups,
                    *sizes,
                    *split,
                    RELU=relu,
                    BLOCK_PARTS=power_of_two(parts),
                    **common,
                )
        d_affine = partials.sum(0) if partials is not None else None
    return dx, d_residual, d_affine


def _arguments(
    direction: str, x: Tensor, num_groups: int, channels_last: bool
) -> tuple[Plan, tuple[int, int], dict[str, Any]]:
    """The plan, the sizes that change from image to image, and the kernels' common constants."""
    pixels = _pixels(x)
    samples, channels = x.shape[:2]
    itemsize = x.element_size()
    plan = make_plan(direction, samples, channels, pixels, num_groups, itemsize, channels_last)
    aligned = alignment(pixels, itemsize)
    common = {
        "CHANNELS": channels,
        "GROUPS": num_groups,
        # In channels-last order the pixels lie no neighbours; one constant then saves compilations.
        "ALIGNMENT": 1 if channels_last else aligned,
        "BLOCK_GROUPS": plan.block_groups,
        "BLOCK_DEPTH": plan.block_depth,
        "BLOCK_PIXELS": plan.block_pixels,
        "CHANNELS_LAST": channels_last,
        "WIDE": channels * pixels >= 2**31,
        "num_warps": plan.num_warps,
    }
    return plan, (samples, pixels if channels_last else pixels // aligned), common


def _pixels(x: Tensor) -> int:
    return x.shape[2:].numel()


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be x's."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
