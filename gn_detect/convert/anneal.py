"""Blend BatchNorm's statistics into GroupNorm's, by degrees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layers import GroupNorm, GroupNormAct
from ..ops import frozen_batch_norm
from .match import GroupStatistics

_TINY = 1e-12  # under the root of a group's own variance: a constant group must not divide by zero


class Annealing:
    """Norms that compute with expected statistics (``share`` 0, BatchNorm), an image's own (1), or between.

    With the matched weight and bias the model starts as exactly the original. While its function is bent
    towards GroupNorm the trained weights follow, a short way in each step.
    """

    def __init__(self, norms: dict[GroupNorm, GroupStatistics], share: float = 1.0) -> None:
        self.share = share
        self._norms = norms

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the norms compute with ``share``; afterwards they are themselves again."""
        for norm, statistics in self._norms.items():
            mean, var = (v.to(norm.weight.device, torch.float32) for v in (statistics.mean, statistics.var))
            # On the instance, so that names, parameters and hooks of the model stay the same.
            vars(norm)["forward"] = partial(self._forward, norm, mean, var)
        try:
            yield
        finally:
            for norm in self._norms:
                del vars(norm)["forward"]

    def _forward(
        self,
        norm: GroupNorm,
        mean: Tensor,
        var: Tensor,
        x: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        if self.share >= 1 or not x.numel():
            return type(norm).forward(norm, x, residual, activation)
        values, weight, bias = x.float().contiguous(), norm.weight.float(), norm.bias.float()
        y = _BlendedNorm.apply(values, weight, bias, mean, var, self.share, norm.eps).view_as(x).to(x.dtype)
        y = y if residual is None else y + residual
        if (norm.activation or activation) == "relu":
            y = F.relu(y)
        return norm.act(norm.drop(y)) if isinstance(norm, GroupNormAct) else y


class _BlendedNorm(torch.autograd.Function):
    """``weight (x - M) / S + bias``, with ``M`` and ``S^2 - eps`` between expected and own statistics.

    Written out because it takes most of a calibration's time: PyTorch's group norm gives the statistics many
    times faster than ``var_mean``, its batch norm in evaluation mode applies them in one pass, and its group
    norm's backward gives the sums over pixels.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, share: float, eps: float
    ) -> Tensor:
        samples, channels = x.shape[:2]
        groups, pixels = len(mean), math.prod(x.shape[2:])
        _, own_mean, own_rstd = torch.native_group_norm(
            x, None, None, samples, channels, pixels, groups, _TINY
        )
        own_var = (own_rstd.pow(-2) - _TINY).clamp_min(0.0)
        blended_mean = torch.lerp(mean.expand_as(own_mean), own_mean, share)
        blended_var = torch.lerp(var.expand_as(own_var), own_var, share)

        def per_channel(value: Tensor) -> Tensor:  # (N, G) -> (N * C,)
            return value.repeat_interleave(channels // groups, 1).flatten()

        y = frozen_batch_norm(
            x.reshape(1, samples * channels, pixels),
            per_channel(blended_mean),
            per_channel(blended_var),
            weight.repeat(samples),
            bias.repeat(samples),
            eps,
        )
        ctx.save_for_backward(x, weight, own_mean, blended_mean, (blended_var + eps).rsqrt())
        ctx.share = share
        return y  # (1, N * C, pixels): a view made in here could not be changed in place by what follows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, own_mean, mean, rstd = ctx.saved_tensors
        samples, channels = x.shape[:2]
        groups, pixels = mean.shape[1], math.prod(x.shape[2:])
        gradient = gradient.contiguous().view_as(x)
        # Every sample's channels as channels of one sample, so that the sums are of each sample alone.
        _, scaled, total = torch.ops.aten.native_group_norm_backward(
            gradient.view(1, samples * channels, pixels),
            x.view(1, samples * channels, pixels),
            mean.view(1, -1),
            rstd.view(1, -1),
            weight.repeat(samples),
            1,
            samples * channels,
            pixels,
            samples * groups,
            [False, True, True],
        )
        by_weight = scaled.view(samples, channels)  # sum over pixels of gradient * (x - M) / S
        by_bias = total.view(samples, channels)

        def per_group(value: Tensor) -> Tensor:  # (N, C) -> (N, G): the mean over the group's values
            return (value * weight).view(samples, groups, -1).sum(2) / (pixels * (channels // groups))

        # Through V_own = mean((x - M_own)^2) and M_own, of which M and V contain the share.
        slope = -ctx.share * per_group(by_weight) * rstd.square()
        offset = -ctx.share * per_group(by_bias) * rstd - slope * own_mean
        own = rstd.repeat_interleave(channels // groups, 1) * weight
        shape = (samples, channels, *(1,) * (x.dim() - 2))
        slope, offset = (v.repeat_interleave(channels // groups, 1).view(shape) for v in (slope, offset))
        by_x = torch.addcmul(offset, x, slope).addcmul_(gradient, own.view(shape))
        return by_x, by_weight.sum(0), by_bias.sum(0), None, None, None, None
