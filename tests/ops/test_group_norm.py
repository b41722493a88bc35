"""``group_norm`` with residual and ReLU against the formula of the paper in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gn_detect.ops import group_norm


def formula(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Equations 1, 2 and 7 of the paper."""
    grouped = x.double().reshape(len(x), groups, -1)
    mean = grouped.mean(dim=2, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(dim=2, keepdim=True)
    normalized = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    return normalized * weight.double().view(shape) + bias.double().view(shape)


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 5), (3, 8, 6, 7), (2, 8, 3, 4, 5)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_matches_the_formula(shape: tuple[int, ...], groups: int) -> None:
    if len(shape) == 2 and groups == 8:
        pytest.skip("one value in a group has no variance")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 1
    weight, bias = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    residual = torch.randn(shape, generator=generator)
    expected = formula(x, groups, weight, bias, 1e-5)
    torch.testing.assert_close(group_norm(x, groups, weight, bias).double(), expected, rtol=1e-4, atol=1e-5)
    fused = group_norm(x, groups, weight, bias, residual=residual, activation="relu")
    torch.testing.assert_close(fused.double(), (expected + residual).relu(), rtol=1e-4, atol=1e-5)


def test_gradients_and_inputs_survive_the_in_place_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)
    )
    weight, bias = (
        torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)
    )
    before = x.detach().clone(), residual.detach().clone()
    assert torch.autograd.gradcheck(
        lambda x, r, w, b: group_norm(x, 2, w, b, residual=r, activation="relu"), (x, residual, weight, bias)
    )
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_memory_format_and_empty_batch() -> None:
    x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    last = group_norm(x.contiguous(memory_format=torch.channels_last), 2, activation="relu")
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, group_norm(x, 2, activation="relu"), rtol=1e-5, atol=1e-5)
    assert group_norm(torch.zeros(0, 8, 5, 6), 2).shape == (0, 8, 5, 6)


def test_bad_arguments() -> None:
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="None or 'relu', not 'gelu'"):
        group_norm(x, 2, activation="gelu")
    with pytest.raises(ValueError, match=r"residual has shape \(1, 4, 2, 3\), x has \(1, 4, 2, 2\)"):
        group_norm(x, 2, residual=torch.zeros(1, 4, 2, 3))
