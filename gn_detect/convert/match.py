"""The scale and shift with which a GroupNorm continues a BatchNorm's function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .source import SourceNorm

CONSTANT_OUTPUT, CONSTANT_OF_GROUP = 0.3, 1e-4
"""Constant is a channel whose standard deviation behind BatchNorm is below this part of its weight (without
eps it would be the weight), and whose variance before it is below this part of its group's.

A group norm would multiply it by a hundred times its weight, and with it what an image's group mean differs
from the expected, which is more than the channel had to tell."""


@dataclass(frozen=True)
class GroupStatistics:
    """What a group norm is expected to subtract and to divide by: (G,) float64 each."""

    mean: Tensor
    var: Tensor


def expected_statistics(mean: Tensor, var: Tensor, num_groups: int) -> GroupStatistics:
    """Mean and variance over the channels of each group, from those of its channels (law of total variance).

    The variance is that of all images together; one image's is lower by what the images' means differ.

    Args:
        mean, var: (C,) of each channel over images and pixels.
    """
    means, variances = mean.view(num_groups, -1), var.view(num_groups, -1)
    return GroupStatistics(means.mean(1), variances.mean(1) + means.var(1, unbiased=False))


def matched_affine(norm: SourceNorm, statistics: GroupStatistics, eps: float) -> tuple[Tensor, Tensor]:
    """Weight and bias, (C,) float64 each, of the GroupNorm that equals ``norm`` where an image's groups have
    exactly these statistics.

    ``scale * x + shift`` with ``x = m + sqrt(v + eps) * normalised``.
    """
    channels = norm.channels // len(statistics.mean)
    mean = statistics.mean.repeat_interleave(channels)
    std = (statistics.var + eps).sqrt().repeat_interleave(channels)
    return norm.scale * std, norm.shift + norm.scale * mean


def constant_channels(norm: SourceNorm, statistics: GroupStatistics) -> Tensor:
    """(C,) bool: those that BatchNorm gives next to nothing but their bias, though their weight is not 0."""
    if norm.var is None:
        return torch.zeros(norm.channels, dtype=torch.bool)
    group = statistics.var.repeat_interleave(norm.channels // len(statistics.var))
    output = (norm.var.sqrt() * norm.scale).abs()
    return (output < CONSTANT_OUTPUT * norm.weight.abs()) & (norm.var < CONSTANT_OF_GROUP * group)
