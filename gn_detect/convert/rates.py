"""How long a calibration's steps are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..layers import GroupNorm

ANNEALED = 0.3
"""Fraction of the steps over which the statistics go from BatchNorm's to GroupNorm's."""

WARMED_UP = 0.1
"""Part of the steps over which the learning rate rises: before them the model has its smallest loss."""

ADAM_EPS = 1e-5
"""Before the first step the model is the original but for rounding: its gradients are about
1e-8, later 1e-3. With the usual 1e-8 a whole step would go where the rounding points."""


@dataclass(frozen=True)
class Rate:
    """The highest learning rate of some parameters."""

    parameters: list[nn.Parameter]
    highest: float


def rates_of(
    model: nn.Module,
    norms: Sequence[GroupNorm],
    learning_rate: float,
    of_norms: float,
    sizes: Mapping[nn.Module, float],
) -> list[Rate]:
    """Of all parameters to train: ``of_norms`` for those of ``norms``, ``learning_rate`` for the others.

    Adam's steps are of one length however large a weight is: where a layer was rescaled, to ``sizes`` of
    what it was, they are, too.
    """
    affine = {parameter for norm in norms for parameter in norm.parameters()}
    rescaled = {
        parameter: size for layer, size in sizes.items() for parameter in layer.parameters(recurse=False)
    }
    rates: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = of_norms if parameter in affine else learning_rate * rescaled.get(parameter, 1.0)
            rates.setdefault(rate, []).append(parameter)
    return [Rate(parameters, highest) for highest, parameters in rates.items()]


def schedule(done: float) -> float:
    """Of the learning rate: a linear rise, then half a cosine; ``done`` is a fraction of the steps.

    It falls once the norms are what they will be.
    """
    fallen = max(0.0, (done - ANNEALED) / (1 - ANNEALED))
    return min(1.0, (done + 0.1 * WARMED_UP) / WARMED_UP) * 0.5 * (1 + math.cos(math.pi * fallen))
