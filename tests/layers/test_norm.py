"""Norm layers by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gn_detect.layers import NORM_NAMES, Conv2d, FrozenBatchNorm2d, GroupNorm, LayerNorm2d, is_norm, make_norm


def make_input() -> torch.Tensor:
    return torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1


def test_group_norm_is_nn_group_norm() -> None:
    ours, theirs = GroupNorm(4, 8), nn.GroupNorm(4, 8)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.GroupNorm)
    torch.testing.assert_close(ours(make_input()), theirs(make_input()))
    assert repr(GroupNorm(4, 8, activation="relu")).endswith(", activation=relu)")


@pytest.mark.parametrize("name", [name for name in NORM_NAMES if name not in ("", "SyncBN")])
def test_every_name_normalises(name: str) -> None:
    norm = make_norm(name, 8, num_groups=4)
    assert norm is not None
    assert is_norm(norm)
    y = norm(make_input())
    assert y.shape == (2, 8, 5, 6)
    group = {"BN": (0, 2, 3), "GN1": (1, 2, 3), "IN": (2, 3), "LN": (1,)}.get(name)
    if group:
        torch.testing.assert_close(y.mean(group), torch.zeros_like(y.mean(group)), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            y.var(group, unbiased=False), torch.ones_like(y.mean(group)), atol=1e-3, rtol=0
        )


def test_names_without_a_layer() -> None:
    assert make_norm("", 8) is None
    assert isinstance(make_norm("SyncBN", 8), nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="unknown norm 'XN'; choose one of '', 'BN'"):
        make_norm("XN", 8)
    with pytest.raises(
        ValueError, match="40 channels cannot be split into 32 groups; set MODEL.GN.NUM_GROUPS"
    ):
        make_norm("GN", 40)


def test_ln_is_over_channels_at_each_pixel() -> None:
    x = make_input()
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (8,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(LayerNorm2d(8)(x), expected)


def test_frozen_batch_norm_without_weights_is_the_identity() -> None:
    x = make_input()
    torch.testing.assert_close(FrozenBatchNorm2d(8)(x), x, rtol=1e-6, atol=1e-6)


def test_frozen_batch_norm_is_batch_norm_in_evaluation_mode() -> None:
    norm = nn.BatchNorm2d(8)
    for _ in range(3):
        norm(make_input())
    nn.init.normal_(norm.weight)
    frozen = FrozenBatchNorm2d.from_batch_norm(norm)
    norm.eval()
    assert not list(frozen.parameters())
    x = make_input()
    torch.testing.assert_close(frozen(x), norm(x), rtol=1e-5, atol=1e-5)
    x.requires_grad_()
    gradient = torch.autograd.grad(frozen(x).square().sum(), x)[0]
    torch.testing.assert_close(
        gradient, torch.autograd.grad(norm(x).square().sum(), x)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["", "BN", "FrozenBN", "GN", "GN1", "IN", "LN"])
def test_convolution_norm_residual_relu(name: str) -> None:
    torch.manual_seed(0)
    unit = Conv2d(8, 8, 3, padding=1, bias=name == "", norm=make_norm(name, 8, 4), activation="relu")
    if unit.norm is not None and name != "FrozenBN":
        nn.init.normal_(unit.norm.weight)
    plain = make_norm(name, 8, 4)
    if plain is not None:
        plain.load_state_dict(unit.norm.state_dict())
    x, residual = make_input().requires_grad_(), make_input().flip(0).requires_grad_()
    kept = residual.detach().clone()

    y = F.conv2d(x, unit.weight, unit.bias, padding=1)
    y = F.relu((y if plain is None else plain(y)) + residual)
    fused = unit(x, residual)
    torch.testing.assert_close(fused, y, rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, kept)
    for ours, expected in zip(
        torch.autograd.grad(fused.square().sum(), (x, residual, unit.weight)),
        torch.autograd.grad(y.square().sum(), (x, residual, unit.weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


def test_a_norm_that_is_exchanged_keeps_the_activation() -> None:
    unit = Conv2d(8, 8, 1, norm=nn.BatchNorm2d(8), activation="relu")
    unit.norm = GroupNorm(2, 8)
    assert (unit(make_input()) >= 0).all()


def test_state_dict_names_are_detectron2s() -> None:
    unit = Conv2d(8, 8, 1, bias=False, norm=make_norm("GN", 8, 4))
    assert set(unit.state_dict()) == {"weight", "norm.weight", "norm.bias"}
