"""Weight Standardization in both dialects, and what is kept of it in inference."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_detect.layers import Conv2d, WSConv2d, fold_standardization, make_norm, standardize_convs
from gn_detect.ops import standardize_weight


def reference(weight: Tensor, kind: str, eps: float) -> Tensor:
    """The formulas of mmcv's ConvWS and of timm's StdConv2d, by autograd."""
    flat = weight.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    if kind == "WS":
        scale = centred.square().sum(1, keepdim=True).div(flat.shape[1] - 1).sqrt() + eps
    else:
        scale = (centred.square().mean(1, keepdim=True) + eps).sqrt()
    return (centred / scale).view(weight.shape)


@pytest.mark.parametrize("kind", ["WS", "StdConv"])
@pytest.mark.parametrize("eps", [1e-8, 1e-5, 0.3])
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (4, 7, 1, 1), (8, 1, 3, 3), (2, 3, 7, 5)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_against_float64(kind: str, eps: float, shape: tuple[int, ...], memory_format) -> None:
    torch.manual_seed(0)
    exact = (torch.randn(shape, dtype=torch.float64) * 0.05 + 0.02).requires_grad_()
    weight = exact.detach().float().contiguous(memory_format=memory_format).requires_grad_()
    gradient = torch.randn(shape, dtype=torch.float64)
    expected = reference(exact, kind, eps)
    found = standardize_weight(weight, kind, eps)
    assert found.stride() == weight.stride()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    expected.backward(gradient)
    found.backward(gradient.float())
    assert exact.grad is not None
    assert weight.grad is not None
    scale = exact.grad.abs().max().item()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize("kind", ["WS", "StdConv"])
def test_gradients_by_finite_differences(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: standardize_weight(w, kind, 0.1), weight)


@pytest.mark.parametrize("kind", ["WS", "StdConv"])
@pytest.mark.parametrize("value", [0.0, 0.3, 1e-38])
def test_a_constant_filter_has_finite_gradients(kind: str, value: float) -> None:
    weight = torch.full((2, 3, 3, 3), value, requires_grad=True)
    found = standardize_weight(weight, kind, 1e-5)
    found.backward(torch.randn(2, 3, 3, 3))
    assert found.abs().max() < 0.01
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["WS", "StdConv"])
def test_with_a_group_norm_against_float64(kind: str) -> None:
    """Forward and gradients of convolution, norm, residual and ReLU."""
    torch.manual_seed(0)
    conv = WSConv2d(6, 8, 3, padding=1, groups=2, bias=False, kind=kind, norm=make_norm("GN", 8, 4))
    conv.activation = "relu"
    x, residual = torch.randn(2, 6, 9, 11), torch.randn(2, 8, 9, 11)
    x.requires_grad_()
    conv(x, residual).square().sum().backward()
    wide, weight = (t.detach().double().requires_grad_() for t in (x, conv.weight))
    y = F.conv2d(wide, reference(weight, kind, conv.eps), padding=1, groups=2)
    F.relu(F.group_norm(y, 4) + residual.double()).square().sum().backward()
    for found, exact in ((x.grad, wide.grad), (conv.weight.grad, weight.grad)):
        assert found is not None
        assert exact is not None
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


def test_timm_computes_the_same() -> None:
    std_conv = pytest.importorskip("timm.layers").StdConv2d
    torch.manual_seed(0)
    theirs = std_conv(5, 7, 3, stride=2, eps=1e-8)
    ours = WSConv2d.from_conv(theirs, "StdConv", theirs.eps)
    x = torch.randn(2, 5, 12, 10)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def conv() -> WSConv2d:
    torch.manual_seed(0)
    return WSConv2d(3, 4, 3, bias=False).eval()


@torch.no_grad()
def test_the_weight_is_kept_until_it_changes() -> None:
    layer, x = conv(), torch.randn(1, 3, 8, 8)
    kept = layer.standardised_weight()
    assert layer.standardised_weight() is kept
    changes = {
        "in place": lambda: layer.weight.normal_(),
        "by a state dict": lambda: layer.load_state_dict({"weight": torch.randn(4, 3, 3, 3)}),
        "of memory": lambda: setattr(layer.weight, "data", torch.randn(4, 3, 3, 3)),
        "of format": lambda: setattr(
            layer.weight, "data", layer.weight.data.contiguous(memory_format=torch.channels_last)
        ),
        "of type": lambda: layer.double().float(),
        "of parameter": lambda: setattr(layer, "weight", nn.Parameter(torch.randn(4, 3, 3, 3))),
        "together": lambda: torch._foreach_mul_([layer.weight], 2.0).__class__,
    }
    for name, change in changes.items():
        change()
        expected = F.conv2d(x, reference(layer.weight, "WS", 1e-5))
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5, msg=name)
    layer.standardised_weight()
    layer.weight.data.normal_()  # without a trace, as a CUDA graph's
    layer.train()
    layer.eval()
    torch.testing.assert_close(layer(x), F.conv2d(x, reference(layer.weight, "WS", 1e-5)))


def test_nothing_is_kept_in_training_or_with_gradients() -> None:
    layer = conv()
    assert layer.standardised_weight().requires_grad
    layer.train()
    with torch.no_grad():
        assert layer.standardised_weight() is not layer.standardised_weight()
    with torch.inference_mode():
        layer.eval()(torch.randn(1, 3, 8, 8))
    layer(torch.randn(1, 3, 8, 8)).sum().backward()
    assert layer.weight.grad is not None


@torch.no_grad()
def test_copies_keep_nothing() -> None:
    layer = conv()
    layer.standardised_weight()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._cached is None
        assert torch.equal(other.standardised_weight(), layer.standardised_weight())


def test_autocast_rounds_the_standardised_weight() -> None:
    layer, x = conv(), torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    weight = standardize_weight(layer.weight, "WS", 1e-5).bfloat16()
    assert torch.equal(found, F.conv2d(x.bfloat16(), weight))


def test_half_precision_is_standardised_in_float32() -> None:
    weight = torch.randn(4, 3, 3, 3).bfloat16()
    assert torch.equal(
        standardize_weight(weight, "WS", 1e-5), standardize_weight(weight.float(), "WS", 1e-5).bfloat16()
    )


def test_exchange_with_plain_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Conv2d(3, 4, 3, norm=make_norm("GN", 4, 2)), nn.Conv2d(4, 4, 1))
    names, x = list(model.state_dict()), torch.randn(1, 3, 8, 8)
    weight = model[0].weight
    standardize_convs(model, "WS")
    assert [type(module) for module in model] == [WSConv2d, nn.Conv2d]
    assert model[0].weight is weight
    assert list(model.state_dict()) == names
    expected = model(x)
    fold_standardization(model)
    assert type(model[0]) is Conv2d
    assert torch.equal(model(x), expected)


def test_what_cannot_be_standardised_is_refused() -> None:
    with pytest.raises(ValueError, match="one value"):
        WSConv2d(1, 4, 1)
    with pytest.raises(ValueError, match="unknown"):
        WSConv2d(3, 4, 1, kind="Other")
