"""From BatchNorm to GroupNorm by degrees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import GroupNorm, GroupNormAct
from .match import GroupStatistics, expected_statistics
from .source import SourceNorm


class Annealing:
    """Norms whose statistics go from the expected ones (``share`` 0, BatchNorm) to an image's own (1).

    With the matching weight and bias the model starts as exactly the original, and what is trained follows
    while the function is bent towards GroupNorm: no step has far to go.
    """

    def __init__(self, norms: dict[GroupNorm, GroupStatistics]) -> None:
        self.share = 1.0
        self._norms = norms

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the norms compute with ``share``; afterwards they are themselves again."""
        for norm, statistics in self._norms.items():
            # On the instance, so that names, parameters and hooks of the model stay as they are.
            vars(norm)["forward"] = _Forward(self, norm, statistics)
        try:
            yield
        finally:
            for norm in self._norms:
                del vars(norm)["forward"]


class _Forward:
    def __init__(self, annealing: Annealing, norm: GroupNorm, statistics: GroupStatistics) -> None:
        self.annealing, self.norm = annealing, norm
        device = norm.weight.device
        self.mean = statistics.mean.to(device, torch.float32)
        self.var = statistics.var.to(device, torch.float32)

    def __call__(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        norm, share = self.norm, self.annealing.share
        if share >= 1:
            return type(norm).forward(norm, x, residual, activation)
        y = _blended_norm(x, norm, self.mean, self.var, share)
        y = y if residual is None else y + residual
        if (norm.activation or activation) == "relu":
            y = F.relu(y)
        return norm.act(norm.drop(y)) if isinstance(norm, GroupNormAct) else y


def _blended_norm(x: Tensor, norm: GroupNorm, mean: Tensor, var: Tensor, share: float) -> Tensor:
    """(N, C, *), with (G,) expected statistics."""
    values = x.float().reshape(x.shape[0], norm.num_groups, -1)
    own_var, own_mean = torch.var_mean(values, 2, unbiased=False)
    mean = torch.lerp(mean.expand_as(own_mean), own_mean, share)
    std = (torch.lerp(var.expand_as(own_var), own_var, share) + norm.eps).sqrt()
    channels = norm.num_channels // norm.num_groups
    scale = norm.weight / std.repeat_interleave(channels, 1)
    shift = norm.bias - mean.repeat_interleave(channels, 1) * scale
    per_channel = scale.shape + (1,) * (x.dim() - 2)
    return (x * scale.view(per_channel) + shift.view(per_channel)).to(x.dtype)


def statistics_of(
    source: SourceNorm, norm: nn.GroupNorm, measured: tuple[Tensor, Tensor] | None
) -> GroupStatistics | None:
    """What ``norm``'s groups are expected to have; None where the original's statistics are unknown."""
    mean, var = measured if measured is not None else (source.mean, source.var)
    return None if mean is None or var is None else expected_statistics(mean, var, norm.num_groups)
