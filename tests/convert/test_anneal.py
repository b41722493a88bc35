"""Values and gradients of the norm between BatchNorm and GroupNorm agree with the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gn_detect.convert.anneal import Annealing
from gn_detect.convert.match import GroupStatistics
from gn_detect.layers import GroupNorm


def formula(x: Tensor, norm: GroupNorm, expected: GroupStatistics, share: float) -> Tensor:
    """Compute the formula in float64, with autograd's gradients."""
    x, weight, bias = x.double(), norm.weight.double(), norm.bias.double()
    var, mean = torch.var_mean(x.reshape(len(x), norm.num_groups, -1), 2, unbiased=False)
    mean = expected.mean + share * (mean - expected.mean)
    std = (expected.var + share * (var - expected.var) + norm.eps).sqrt()
    size = norm.num_channels // norm.num_groups
    mean, std = (v.repeat_interleave(size, 1).view(len(x), -1, *(1,) * (x.dim() - 2)) for v in (mean, std))
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    return (x - mean) / std * weight.view(per_channel) + bias.view(per_channel)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("shape", [(3, 8, 5, 4), (2, 8, 3, 4, 2), (5, 8)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_and_gradients(share: float, shape: tuple[int, ...], channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(2, 8)
    expected = GroupStatistics(torch.tensor([2.5, 3.5]).double(), torch.tensor([3.0, 6.0]).double())
    nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
    nn.init.normal_(norm.bias, generator=generator)
    x = torch.randn(shape, generator=generator) * 2 + 3
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    gradient = torch.randn(shape, generator=generator)
    annealing = Annealing({norm: expected})
    annealing.share = share
    with annealing.applied():
        found = norm(x)
    wanted = formula(x, norm, expected, share)
    # Rounding in float32 of sums of up to 400 numbers.
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(found, (x, norm.weight, norm.bias), gradient),
        torch.autograd.grad(wanted, (x, norm.weight, norm.bias), gradient.double()),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_constant_group_stays_finite() -> None:
    norm = GroupNorm(2, 8)
    annealing = Annealing({norm: GroupStatistics(torch.zeros(2), torch.ones(2))})
    annealing.share = 0.5
    x = torch.full((2, 8, 3, 3), 7.0, requires_grad=True)
    with annealing.applied():
        y = nn.functional.relu(norm(x), inplace=True)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
