"""Deformable convolution against its definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gn_detect.layers import DeformConv2d, GroupNorm
from gn_detect.modeling.half_weights import half_weights
from gn_detect.modeling.resnet import BottleneckBlock, DeformBottleneckBlock

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"padding": 1},
    "dilated, of stride 2": {"padding": 2, "dilation": 2, "stride": 2},
    "groups of both kinds": {"padding": 1, "groups": 2, "offset_groups": 4},
}


def make(layout: dict[str, Any], modulated: bool, **kwargs: Any) -> tuple[DeformConv2d, list[Tensor]]:
    """A layer of 8 channels in float64, and its inputs: features, offsets of up to some cells, factors."""
    torch.manual_seed(0)
    layer = DeformConv2d(8, 6, 3, bias=False, **layout, **kwargs).double()
    x = torch.randn(2, 8, 6, 7, dtype=torch.float64)
    stride = layout.get("stride", 1)
    shape = len(x), layer.samples, -(-6 // stride), -(-7 // stride)
    offset = 2 * torch.randn(shape[0], 2 * shape[1], *shape[2:], dtype=torch.float64)
    return layer, [x, offset] + ([torch.rand(shape, dtype=torch.float64)] if modulated else [])


def by_definition(layer: DeformConv2d, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over the kernel of weight times factor times x between its four cells; outside x is 0."""
    images, channels, height, width = x.shape
    rows, columns = offset.shape[2:]
    stride, padding, dilation = layer.stride[0], int(layer.padding[0]), layer.dilation[0]
    sampled = torch.zeros(images, channels, 9, rows, columns, dtype=x.dtype)
    part = channels // layer.offset_groups
    for n, group, k, i, j in torch.cartesian_prod(
        *map(torch.arange, (images, layer.offset_groups, 9, rows, columns))
    ).tolist():
        sample = group * 9 + k
        place = torch.tensor([i, j]) * stride - padding + torch.tensor(divmod(k, 3)) * dilation
        y, z = (place + offset[n, 2 * sample : 2 * sample + 2, i, j]).tolist()
        own = slice(group * part, (group + 1) * part)
        for row in range(max(0, int(y // 1)), min(height - 1, int(y // 1) + 1) + 1):
            for column in range(max(0, int(z // 1)), min(width - 1, int(z // 1) + 1) + 1):
                share = (1 - abs(y - row)) * (1 - abs(z - column))
                sampled[n, own, k, i, j] += share * x[n, own, row, column]
        if mask is not None:
            sampled[n, own, k, i, j] *= mask[n, sample, i, j]
    split = sampled.view(images, layer.groups, -1, 9, rows, columns)
    weight = layer.weight.view(layer.groups, -1, channels // layer.groups, 9)
    return torch.einsum("ngckij,gock->ngoij", split, weight).flatten(1, 2)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_the_definition(layout: str, modulated: bool) -> None:
    """Gradients against finite differences, with respect to features, offsets, factors and weights."""
    layer, inputs = make(LAYOUTS[layout], modulated)
    torch.testing.assert_close(layer(*inputs), by_definition(layer, *inputs))
    weight = layer.weight.detach()

    def function(weight: Tensor, *inputs: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, {"weight": weight}, inputs)
        return found

    arguments = [tensor.clone().requires_grad_() for tensor in (weight, *inputs)]
    torch.autograd.gradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_an_offset_to_no_place(value: float) -> None:
    """An offset that is not finite gives an output of NaN, and a sample far away is 0."""
    layer, (x, offset, mask) = make(LAYOUTS["groups of both kinds"], True)
    expected, without = layer(x, offset, mask), mask.clone()
    without[1, 1, 2, 4] = 0
    if value == -1e30:
        expected = layer(x, offset, without)
    offset[1, 3, 2, 4] = value  # of the second sample
    found = layer(x, offset, mask)
    if value != -1e30:
        assert found[1, :, 2, 4].isnan().all()
        found[1, :, 2, 4] = expected[1, :, 2, 4]
    torch.testing.assert_close(found, expected)
    offset.requires_grad_()
    layer(x, offset, mask).nansum().backward()
    assert offset.grad is not None
    assert offset.grad.isfinite().all()
    assert offset.grad.count_nonzero() > offset.numel() / 4


def test_norm_residual_and_activation_follow() -> None:
    layer, inputs = make(LAYOUTS["plain"], True, norm=GroupNorm(2, 6).double(), activation="relu")
    residual = torch.randn(2, 6, 6, 7, dtype=torch.float64)
    plain, _ = make(LAYOUTS["plain"], True)
    expected = (layer.norm(plain(*inputs)) + residual).relu()
    torch.testing.assert_close(layer(*inputs, residual=residual), expected)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_autocast_samples_in_float32(format: torch.memory_format) -> None:
    layer, inputs = make(LAYOUTS["plain"], True)
    layer = layer.float()
    model = nn.ModuleList([layer, nn.Linear(2, 2)])
    x, offset, mask = (tensor.to(torch.bfloat16).contiguous(memory_format=format) for tensor in inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16), half_weights(model, torch.bfloat16):
        found = layer(x.requires_grad_(), offset, mask)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    expected = layer(x.float(), offset.float(), mask.float())
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)
    assert layer.weight.grad is not None
    assert (x.grad.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("modulated", [False, True])
def test_a_new_block_is_a_bottleneck(modulated: bool) -> None:
    """Offsets begin at 0, and the factors, which then are 1/2, with a weight of twice the size."""
    arguments = {"width": 8, "groups": 2, "dilation": 2, "stride_in_1x1": False}
    plain = BottleneckBlock(4, 16, 2, lambda c: GroupNorm(2, c), **arguments)
    block = DeformBottleneckBlock(
        4, 16, 2, lambda c: GroupNorm(2, c), **arguments, modulated=modulated, offset_groups=2
    )
    report = block.load_state_dict(plain.state_dict(), strict=False)
    assert report.missing_keys == ["conv2_offset.weight", "conv2_offset.bias"]
    assert report.unexpected_keys == []
    assert block.conv2_offset.weight.shape == (54 if modulated else 36, 8, 3, 3)
    x = torch.randn(2, 4, 9, 8)
    if modulated:
        block.conv2.weight.data *= 2
    torch.testing.assert_close(block(x), plain(x))


def test_offset_groups_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="3 offset groups .* 8 channels"):
        DeformConv2d(8, 8, 3, offset_groups=3)
