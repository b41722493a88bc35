"""Calls the kernels: memory for their results, their grids and their tiles.

The kernels of a small norm run for 5 us, and the host must not take longer to launch them. So everything
that depends only on shapes and types is looked up (:class:`_Recipe`), and Triton binds the arguments of a
kernel, 10 to 40 us, only once (:class:`Launch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..group_norm_operator import Maybe, accumulator
from ..kernels import on_device
from . import backward as backward_kernels
from . import forward as forward_kernels
from .binding import Launch, compiled_kernels
from .plan import Plan, alignment, make_plan
from .tickets import tickets


@dataclass(frozen=True)
class _Recipe:
    """The part of a norm's launches that is the same for all tensors of some shapes and types.

    Attributes:
        sizes: arguments of the kernels: samples, samples of a program and runs of them (backward), pixels of
            a channel in units of its alignment, splits, tiles in a split; only those that the plan's kernels
            take.
        runs: rows of partial affine gradients.
        parts: partial results of a group.
        tickets: counters of the programs that have finished.
        first, second: the launches; only ``first`` with ``one_launch``.
    """

    one_launch: bool
    sizes: tuple[int, ...]
    runs: int
    parts: int
    tickets: int
    first: Launch
    second: Launch | None


def forward(
    x: Tensor,
    num_groups: int,
    weight: Maybe,
    bias: Maybe,
    eps: float,
    residual: Maybe,
    relu: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``y`` with x's strides, and mean and rstd as one (2, N, G) tensor.

    Args:
        x: (N, C, *), not empty, dense in the order (N, C, *) or, with ``channels_last``, (N, *, C).
        residual: tensor of x's shape and strides.
        weight, bias: (C,), contiguous.
        num_groups, eps, relu: see :func:`gn_detect.ops.group_norm`.
    """
    shape, device = x.shape, x.device
    others = (_dtype(residual), _dtype(weight), _dtype(bias))
    recipe = _recipe("forward", shape, x.dtype, others, device.index, num_groups, relu, channels_last)
    y = torch.empty_like(x)
    dtype = accumulator(x.dtype)
    statistics = torch.empty((2, shape[0], num_groups), dtype=dtype, device=device)
    sizes = recipe.sizes
    with on_device(device):
        if recipe.second is None:
            own: tuple[Maybe, ...] = (x, residual, weight, bias, y, statistics)
            recipe.first(forward_kernels.forward_groups, own, (*sizes, eps))
            return y, statistics
        partials = torch.empty((shape[0], num_groups, 2, recipe.parts), dtype=dtype, device=device)
        own = (x, statistics, partials, tickets(recipe.tickets, device))
        recipe.first(forward_kernels.partial_statistics, own, (*sizes, eps))
        recipe.second(forward_kernels.normalize, (x, residual, weight, bias, y, statistics), sizes)
    return y, statistics


def backward(
    dy: Tensor,
    x: Tensor,
    y: Maybe,
    weight: Maybe,
    bias: Maybe,
    statistics: Tensor,
    relu: bool,
    channels_last: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Maybe, Maybe, Maybe]:
    """Return gradients of x, of the residual, and of weight and bias as one (2, C) tensor.

    Args:
        dy: gradient of the output, with x's shape and strides.
        x, weight, bias, statistics, relu, channels_last: arguments and result of the forward.
        y: the output, with a residual and a ReLU.
        needs: a flag for each result. The residual's gradient is computed only with a ReLU, else it is dy.
    """
    shape, device = x.shape, x.device
    num_groups = statistics.shape[2]
    others = (_dtype(y), _dtype(dy), _dtype(weight), _dtype(bias))
    dtype, index = x.dtype, device.index
    recipe = _recipe("backward", shape, dtype, others, index, num_groups, relu, channels_last, needs)
    needs_x, needs_residual, needs_affine = needs
    dtype = statistics.dtype
    dx = torch.empty_like(x) if needs_x else None
    # The second launch of the split backward reads it instead of dy and y.
    keeps_residual = needs_residual or (needs_x and y is not None and not recipe.one_launch)
    d_residual = torch.empty_like(x) if keeps_residual else None
    inputs = (dy, x, y, weight, bias, statistics)
    with on_device(device):
        partials = sums = d_affine = counters = None
        if needs_affine or (needs_x and not recipe.one_launch):
            partials = torch.empty((recipe.runs, 2, shape[1]), dtype=dtype, device=device)
            counters = tickets(recipe.tickets, device)
            # The sums of a single run, or of a single sample, are those of all.
            sums = partials if recipe.one_launch else partials.new_empty((shape[0], 2, shape[1]))
            d_affine = sums.new_empty((2, shape[1])) if needs_affine and len(sums) > 1 else None
        if recipe.one_launch:
            own: tuple[Maybe, ...] = (*inputs, dx, d_residual, partials, d_affine, counters)
            recipe.first(backward_kernels.backward_groups, own, recipe.sizes)
        else:
            own = (*inputs, d_residual, partials, sums, d_affine, counters)
            recipe.first(backward_kernels.partial_gradients, own, recipe.sizes)
            if recipe.second is not None:
                dz = dy if d_residual is None else d_residual
                own = (dz, x, None, weight, bias, statistics, dx, sums)
                recipe.second(backward_kernels.input_gradient, own, recipe.sizes)
        if needs_affine and sums is not None and d_affine is None:
            d_affine = sums[0]
    return dx, d_residual, d_affine


@lru_cache(maxsize=4096)
def _recipe(
    direction: str,
    shape: torch.Size,
    dtype: torch.dtype,
    others: tuple[torch.dtype | None, ...],
    device: int | None,
    num_groups: int,
    relu: bool,
    channels_last: bool,
    needs: tuple[bool, ...] = (),
) -> _Recipe:
    """Plan the launches; ``others`` are dtypes of further tensors, for the backward that of ``y`` first."""
    backward = direction == "backward"
    samples, pixels = shape[0], shape[2:].numel()
    plan, units, common = _planned(direction, shape, dtype, num_groups, channels_last)
    runs = -(-samples // plan.samples)  # without a split; with one, each sample has its own sums
    key = (dtype, others, device, needs, runs > 1)
    with_relu = common | {"RELU": relu}
    if plan.one_launch:
        sizes: tuple[int, ...] = (samples, plan.samples, runs, units) if backward else (samples, units)
        constants = with_relu | {"ONE_TILE": plan.holds_all(pixels)}
        if backward:
            constants |= {"BLOCK_PARTS": plan.block_parts(direction), "STAGES": plan.stages}
        launch = _launch(runs * plan.tiles, constants, key)
        return _Recipe(True, sizes, runs, 1, plan.tiles, launch, None)
    parts = plan.splits * plan.pieces
    programs = samples * plan.tiles * plan.splits
    first_constants = (with_relu if backward else common) | {"BLOCK_PARTS": plan.block_parts(direction)}
    first = _launch(programs, first_constants, key)
    second = None
    if not backward or needs[0]:
        # In the backward with a residual and a ReLU, the first launch has applied the ReLU.
        applied = backward and (others[0] is not None or needs[1])
        second = _launch(programs, common | {"RELU": relu and not applied}, key)
    sizes = (samples, units, plan.splits, plan.split_tiles)
    counters = (samples + backward) * plan.tiles
    return _Recipe(False, sizes, samples * plan.splits, parts, counters, first, second)


def _launch(programs: int, constants: dict[str, Any], key: tuple[Any, ...]) -> Launch:
    # With more elements than 32 bits count, a launch's numbers may need 64 bits, which is another kernel.
    compiled = None if constants["WIDE"] else compiled_kernels((*key, *constants.items()))
    return Launch(programs, constants, compiled)


def _planned(
    direction: str, shape: torch.Size, dtype: torch.dtype, num_groups: int, channels_last: bool
) -> tuple[Plan, int, dict[str, Any]]:
    """Return the plan, pixels of a channel in units of their alignment, and the constants of all kernels."""
    samples, channels, pixels = shape[0], shape[1], shape[2:].numel()
    plan = make_plan(direction, samples, channels, pixels, num_groups, dtype.itemsize, channels_last)
    # In channels-last order pixels are no neighbours; one constant then saves compilations.
    aligned = 1 if channels_last else alignment(pixels, dtype.itemsize)
    constants = {
        "CHANNELS": channels,
        "GROUPS": num_groups,
        "ALIGNMENT": aligned,
        "BLOCK_GROUPS": plan.block_groups,
        "BLOCK_DEPTH": plan.block_depth,
        "BLOCK_PIXELS": plan.block_pixels,
        "CHANNELS_LAST": channels_last,
        "WIDE": channels * pixels >= 2**31,
        "num_warps": plan.num_warps,
        "maxnreg": plan.registers,
    }
    if not plan.one_launch:
        constants["STAGES"] = plan.stages
    return plan, pixels // aligned, constants


def _dtype(x: Maybe) -> torch.dtype | None:
    return None if x is None else x.dtype
