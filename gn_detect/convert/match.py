"""The weight and bias with which a GroupNorm continues a BatchNorm, and the statistics that they need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .source import SourceNorm

Run = Callable[[nn.Module, Any], Any]  # runs a model on a batch

# A channel is constant if its standard deviation after BatchNorm is below this part of its weight (without
# eps it would be the weight), and its variance before BatchNorm below this part of its group's. A group norm
# would multiply it by a hundred times its weight, and with it the error in the expected group mean.
CONSTANT_OUTPUT, CONSTANT_OF_GROUP = 0.3, 1e-4


@dataclass(frozen=True)
class GroupStatistics:
    """Expected mean and variance of each group: (G,) float64."""

    mean: Tensor
    var: Tensor


def expected_statistics(
    norm: SourceNorm, num_groups: int, measured: tuple[Tensor, Tensor] | None = None
) -> GroupStatistics | None:
    """Return the statistics of groups over all images, by the law of total variance.

    The variance in one image is lower, by the variance of the images' means.

    Args:
        measured: mean and variance of each channel, (C,), in place of the norm's running statistics.

    Returns:
        None if the channels' statistics are unknown.
    """
    mean, var = measured if measured is not None else (norm.mean, norm.var)
    if mean is None or var is None:
        return None
    means, variances = mean.view(num_groups, -1), var.view(num_groups, -1)
    return GroupStatistics(means.mean(1), variances.mean(1) + means.var(1, unbiased=False))


def matched_affine(norm: SourceNorm, statistics: GroupStatistics, eps: float) -> tuple[Tensor, Tensor]:
    """Return the weight and bias, (C,) float64, of the GroupNorm that equals ``norm`` on such groups.

    ``scale * x + shift`` with ``x = m + sqrt(v + eps) * normalised``.
    """
    channels = norm.channels // len(statistics.mean)
    mean = statistics.mean.repeat_interleave(channels)
    std = (statistics.var + eps).sqrt().repeat_interleave(channels)
    return norm.scale * std, norm.shift + norm.scale * mean


def keep_constants(
    norm: SourceNorm, statistics: GroupStatistics, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Return weight and bias under which constant channels stay constant, and the number of these.

    BatchNorm gives such a channel next to nothing but its bias, although its weight is not 0.
    """
    if norm.var is None:
        return weight, bias, 0
    group = statistics.var.repeat_interleave(norm.channels // len(statistics.var))
    output = (norm.var.sqrt() * norm.scale).abs()
    constant = (output < CONSTANT_OUTPUT * norm.weight.abs()) & (norm.var < CONSTANT_OF_GROUP * group)
    return weight.masked_fill(constant, 0.0), torch.where(constant, norm.bias, bias), int(constant.sum())


class RunningMoments:
    """Mean and variance of each channel over all values that were added, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        """Count the values of (N, C, *)."""
        values = x.detach().transpose(0, 1).flatten(1).double()
        self.count += values.shape[1]
        self.total = self.total + values.sum(1)
        self.squares = self.squares + values.square().sum(1)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance, (C,) float64 each, on the CPU."""
        mean = torch.as_tensor(self.total / self.count).cpu()
        square = torch.as_tensor(self.squares / self.count).cpu()
        return mean, (square - mean.square()).clamp_min(0.0)


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and restore each module's own mode afterwards."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def measure_moments(
    model: nn.Module,
    names: Sequence[str],
    batches: Iterable[Any],
    run: Run = lambda model, batch: model(batch),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and variance, (C,) float64, of each channel of the named layers' inputs.

    Layers that are never called are absent. The model runs in evaluation mode.

    Raises:
        UserError: there are no batches.
    """
    moments = {name: RunningMoments() for name in names}
    count = 0
    with evaluation_mode(model), ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name: moments[name].add(inputs[0])
            )
            hooks.enter_context(hook)
        for batch in batches:
            run(model, batch)
            count += 1
    if not count:
        raise UserError(
            "calibration-images",
            "there are no images to measure the statistics from; give some, or images=None",
        )
    return {name: found.result() for name, found in moments.items() if found.count}
