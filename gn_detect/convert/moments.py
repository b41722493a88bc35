"""What a model's layers see, measured on images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

Run = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch."""


class RunningMoments:
    """Mean and variance of each channel over everything that was added, in float64."""

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
        """(C,) float64 each, on the CPU."""
        mean = torch.as_tensor(self.total / self.count).cpu()
        square = torch.as_tensor(self.squares / self.count).cpu()
        return mean, (square - mean.square()).clamp_min(0.0)


@torch.no_grad()
def measure_moments(
    model: nn.Module,
    names: Sequence[str],
    images: Iterable[Any],
    run: Run = lambda model, batch: model(batch),
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each channel of the inputs of the named layers.

    Args:
        model: run in evaluation mode; its mode is then put back.
        images: batches that it accepts.

    Returns:
        (C,) float64 each by name; layers that were never called are absent.

    Raises:
        UserError: there are no images.
    """
    moments = {name: RunningMoments() for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: moments[name].add(inputs[0])
        )
        for name in names
    ]
    modes = {module: module.training for module in model.modules()}
    batches = 0
    try:
        model.eval()
        for batch in images:
            run(model, batch)
            batches += 1
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not batches:
        raise UserError("there are no images to measure the statistics from; give some, or images=None")
    return {name: found.result() for name, found in moments.items() if found.count}
