"""Choose scales of channels with which an image's group statistics vary least.

BatchNorm does not see the scale of its input: a convolution's output channel may be multiplied by any
number, and its running statistics with it, without a change of the function. A group norm sees it, because
the scales decide how much each channel counts in its group's mean and variance. For each layer alone, this
module chooses the scales under which the group norm's output differs least from BatchNorm's on measured
images. Nothing is regressed, so nothing shrinks: the new layer still equals BatchNorm wherever an image is
as expected.

A group whose statistics vary least may depend on one steady channel, scaled up. In a deep network the error
of that channel, from the layers before, then spreads to the whole group. Equal variances of all channels may
serve better there (MobileNetV2 with groups of 16). The outputs on held-out images decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import GroupNorm, WSConv2d
from .match import GroupStatistics, Run, keep_constants, matched_affine
from .source import SourceNorm

STEPS, LEARNING_RATE = 100, 0.1  # of Adam on the scales' logarithms; more change the error by less than 2%
PENALTY = 0.01  # on the squares of the logarithms: channels that hardly matter keep their scales
MAX_SAMPLES = 256  # images, or regions of interest, from which each layer's scales are chosen
DEAD = 1e-3  # part of the average group's variance; a group with less is not scaled up to the others


class ImageMoments(NamedTuple):
    """Mean and mean square of each channel in each image: (N, C) float32."""

    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class Balance:
    """Scales (C,) of a norm's input channels, and the statistics of its groups then; float64, on the CPU.

    Attributes:
        size: mean factor of the layer's weights, dead channels left out.
        layer: name of the convolution that was rescaled, if one was.
    """

    scales: Tensor
    statistics: GroupStatistics
    size: float = 1.0
    layer: str | None = None


class Measured(NamedTuple):
    """By name of a norm: the layer that alone feeds it, if there is one, and the moments of its input."""

    feeds: dict[str, str]
    moments: dict[str, ImageMoments]


def measure(
    original: nn.Module, names: Sequence[str], run: Run, batches: Sequence[Any], times: int = 1
) -> Measured:
    """Measure the norms ``names`` for :func:`balance`; ``run`` runs the model ``times`` times."""
    feeds = _find_feeding(original, names, lambda: run(original, batches[0]), times)
    return Measured(feeds, _image_moments(original, names, run, batches))


def balance(
    original: nn.Module,
    converted: nn.Module,
    sources: dict[str, SourceNorm],
    measured: Measured,
    *,
    equal: bool = False,
) -> dict[str, Balance]:
    """Rescale the convolutions before the norms of ``converted``, and match the norms to the new scales.

    Norms that no convolution feeds alone keep their input, and are matched to the measured statistics.

    Args:
        sources: the original's norms by name.
        equal: give all channels one variance, and seek no better scales.

    Returns:
        The change of each norm that was changed.
    """
    before, after = dict(original.named_modules()), dict(converted.named_modules())
    # If a convolution was trained since, its norm no longer continues the original's function.
    feeds = {
        norm: conv
        for norm, conv in measured.feeds.items()
        if torch.equal(before[conv].weight, after[conv].weight)
    }
    found = {}
    for name, moments in measured.moments.items():
        norm = after[name]
        assert isinstance(norm, GroupNorm)
        chosen = norm.eps if norm.eps != sources[name].eps else 0.0
        result = solve(moments, sources[name], norm.num_groups, eps=chosen, scales=name in feeds, equal=equal)
        rescaled = dataclasses.replace(sources[name], scale=sources[name].scale / result.scales)
        weight, bias = matched_affine(rescaled, result.statistics, norm.eps)
        if name in feeds:  # the scales give its channels one variance, or nearly
            _rescale(after[feeds[name]], result.scales)
        else:
            weight, bias, _ = keep_constants(sources[name], result.statistics, weight, bias)
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)
        found[name] = dataclasses.replace(result, layer=feeds.get(name))
    return found


def solve(
    moments: ImageMoments,
    source: SourceNorm,
    num_groups: int,
    *,
    eps: float = 0.0,
    scales: bool = True,
    equal: bool = False,
) -> Balance:
    """Return the scales that minimise the squared difference between the two norms' outputs on the images.

    With the mean m_i and variance v_i of a group of scaled channels in image i, and the expected m and v, the
    outputs differ in channel c by ``w/sigma ((r - 1) x + (m - m_i r) / s)``, ``r = sqrt(v / v_i)``. The mean
    square over the pixels follows from the channel's moments. m is the mean of m_i, and v such that r is 1 on
    average: an image's variance is less than that of all images together.

    Args:
        eps: of the new norm, if it is a considerable part of the variance. It is then included in all v, and
            the scales keep each group's average variance, so that eps stays the same part.
        scales: choose scales; otherwise all are 1, and only m and v are found.
        equal: give all channels one variance. Their outputs differ more on the images as the original sees
            them, but a group does not depend on few channels, whose errors it would spread.
    """
    mean, square = moments.mean, moments.square
    size = source.channels // num_groups
    start = torch.ones(source.channels)
    unscaled = _group_moments(moments, start, num_groups)[1].mean()
    if scales:
        start = (square.mean(0) - mean.mean(0).square()).clamp_min(0).add(source.eps).rsqrt()
    total = (source.scale / start.double()).square().sum()
    strength = (source.scale.square() / total.clamp_min(1e-30)).float()  # all weights may be zero
    variance = (square - mean.square()).clamp_min(0.0)
    larger = 1.0

    def group_statistics(scale: Tensor, found: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        means, variances = _group_moments(moments, scale, num_groups)
        if eps:  # until the scales are found, the part of each group that it will be
            variances = variances + (eps if found else eps / unscaled * variances.mean(0))
        return means, variances, means.mean(0), variances.rsqrt().mean(0).pow(-2)

    def error(scale: Tensor) -> Tensor:
        means, variances, m, v = group_statistics(scale)
        r = (v / variances).sqrt()
        shift = (m - means * r).repeat_interleave(size, 1) / scale
        r = r.repeat_interleave(size, 1) - 1
        return (strength * (variance * r.square() + (mean * r + shift).square())).sum(1).mean()

    logarithm = torch.zeros(source.channels, requires_grad=True)
    if scales and size > 1 and not equal:
        optimizer = torch.optim.Adam([logarithm], lr=LEARNING_RATE)
        with torch.enable_grad():
            for _ in range(STEPS):
                loss = error(start * logarithm.exp()) + PENALTY * logarithm.square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    with torch.no_grad():
        scale = start * logarithm.exp()
        if scales:  # the weights keep their average size, as the distillation's steps have one size
            scale = scale * scale.log().mean().neg().exp()
        if scales and eps:
            variances = _group_moments(moments, scale, num_groups)[1].mean(0)
            factors = (unscaled / variances.clamp_min(DEAD * variances.mean())).sqrt()
            scale = scale * factors.repeat_interleave(size)
            whole = variance.mean(0)
            larger = scale[whole > DEAD * whole.mean()].log().mean().exp().item()
        _, _, m, v = group_statistics(scale, found=True)
    return Balance(scale.double(), GroupStatistics(m.double(), v.double() - eps), float(f"{larger:.4g}"))


def _group_moments(moments: ImageMoments, scale: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance, (N, G) each, of the groups of each image's scaled channels."""
    means = (moments.mean * scale).view(len(moments.mean), num_groups, -1).mean(2)
    squares = (moments.square * scale.square()).view(len(moments.mean), num_groups, -1).mean(2)
    return means, (squares - means.square()).clamp_min(1e-6 * squares.detach().mean() + 1e-20)


def _rescale(conv: Any, scales: Tensor) -> None:
    with torch.no_grad():
        factor = scales.to(conv.weight.device)
        conv.weight.copy_(conv.weight.double() * factor.view(-1, *(1,) * (conv.weight.dim() - 1)))
        if conv.bias is not None:
            conv.bias.copy_(conv.bias.double() * factor)


def _find_feeding(
    model: nn.Module, norms: Sequence[str], run: Callable[[], Any], times: int = 1
) -> dict[str, str]:
    """Return the convolution or linear layer that feeds each norm, and apparently nothing else.

    ``run`` runs the model ``times`` times. A layer that is called more often is shared, and is left out. An
    output that a module's ``forward`` uses in an expression of its own is not seen here;
    :func:`gn_detect.convert.calibrate` checks the function for that.
    """
    weights: dict[Tensor | nn.Module, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            weights[parameter] = weights.get(parameter, 0) + 1
    layers = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
        and isinstance(module._parameters.get("weight"), nn.Parameter)
        and not isinstance(module, WSConv2d)  # its output does not see the scale of its weight
        and weights[module.weight] == 1
    }
    produced: dict[int, str] = {}
    held: list[Tensor] = []  # keeps all tensors that were seen, so that no identity is used twice
    calls: dict[str, int] = {}
    used: dict[int, list[str]] = {}
    with torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():

            def before(module: nn.Module, inputs: Any, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1
                if next(module.children(), None) is None or name in norms:
                    for value in inputs:
                        if isinstance(value, Tensor):
                            held.append(value)
                            used.setdefault(id(value), []).append(name)

            def after(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                if module in layers:
                    held.append(output)
                    produced[id(output)] = name

            hooks.enter_context(module.register_forward_pre_hook(before))
            hooks.enter_context(module.register_forward_hook(after))
        run()
    feeds = {}
    for identity, layer in produced.items():
        users = used.get(identity, [])
        if len(users) == 1 and users[0] in norms and calls[layer] == calls[users[0]] == times:
            feeds[users[0]] = layer
    for norm in norms:  # detectron2's Conv2d and ours call the norm that they hold
        layer = norm.rpartition(".")[0]
        if layer in layers.values() and calls.get(layer) == calls.get(norm) == times:
            feeds[norm] = layer
    return feeds


@torch.no_grad()
def _image_moments(
    model: nn.Module, names: Sequence[str], run: Run, batches: Sequence[Any]
) -> dict[str, ImageMoments]:
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    counts = dict.fromkeys(names, 0)
    share = -(-MAX_SAMPLES // len(batches))  # of a batch, which may hold many regions of one image
    with ExitStack() as hooks:
        for name in names:

            def record(_: nn.Module, inputs: Any, name: str = name) -> None:
                x = inputs[0].detach()
                x = x[:: max(1, len(x) // share)][: MAX_SAMPLES - counts[name]].float()
                if len(x):
                    counts[name] += len(x)
                    pixels = x.reshape(*x.shape[:2], -1)
                    found[name].append((pixels.mean(2).cpu(), pixels.square().mean(2).cpu()))

            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(record))
        for batch in batches:
            if min(counts.values(), default=0) >= MAX_SAMPLES:
                break
            run(model, batch)
    return {
        name: ImageMoments(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
        for name, pieces in found.items()
        if pieces
    }
