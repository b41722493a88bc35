"""Checkpoints without their model."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from gn_detect import UserError
from gn_detect.convert import convert_norm, convert_state_dict


def test_the_same_as_converting_the_model() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.train()(torch.randn(4, 3, 64, 64))
    expected, by_model = convert_norm(model)
    tensors, report = convert_state_dict(model.state_dict())
    assert list(tensors) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
    assert [layer.groups for layer in report.layers] == [layer.groups for layer in by_model.layers]
    assert (report.parameters_before, report.parameters_after) == (by_model.parameters_before,) * 2


def test_no_batch_norm_is_an_error() -> None:
    with pytest.raises(UserError, match="no BatchNorm with running statistics"):
        convert_state_dict(convert_norm(torchvision.models.resnet18())[0].state_dict())


def test_norms_of_all_kinds_in_one_file() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.PReLU(8))
    model.train()(torch.randn(4, 3, 8, 8))
    tensors = model.state_dict()
    tensors["1.alpha"] = torch.ones(1)  # of a subclass
    tensors |= {
        f"switchable.{key}": torch.ones(1, 8, 1, 1) for key in ("running_mean", "running_var", "weight")
    }
    tensors |= {f"counts.{key}": torch.ones(8, dtype=torch.int64) for key in ("running_mean", "running_var")}
    tensors |= {"scalar.running_mean": torch.tensor(0.0), "scalar.running_var": torch.tensor(1.0)}
    found, report = convert_state_dict(tensors)
    expected, _ = convert_norm(model)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor)
    assert list(found)[:7] == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight"]
    assert [layer.name for layer in report.layers] == ["1", "2"]
    assert set(found) - set(expected.state_dict()) == {
        name for name in tensors if name.startswith(("1.alpha", "switchable", "counts", "scalar"))
    }
    assert (
        "3 layers have running statistics and are no BatchNorm, such as 'switchable'" in report.warnings[-1]
    )


def test_the_layers_warnings_are_kept() -> None:
    tensors = nn.Sequential(nn.BatchNorm2d(32), nn.BatchNorm2d(32)).state_dict()
    assert "2 norms, from '0' on, hold no running statistics" in convert_state_dict(tensors)[1].warnings[0]


def test_half_precision_weights_beside_larger_statistics() -> None:
    norm = nn.BatchNorm2d(16)
    norm.running_var.mul_(1e6)
    norm.weight.data.fill_(0.5)
    tensors = {f"bn.{key}": value for key, value in norm.state_dict().items()}
    tensors["bn.weight"], tensors["bn.bias"] = tensors["bn.weight"].half(), tensors["bn.bias"].half()
    found, _ = convert_state_dict(tensors)
    assert found["bn.weight"].dtype == torch.float16
    torch.testing.assert_close(found["bn.weight"], torch.full((16,), 0.5, dtype=torch.float16))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("running_var", float("nan"), "'bn' has a running_var with values that are not finite"),
        ("running_var", -2.0, "'bn' has a running_var of -2"),
        ("weight", float("inf"), "'bn' has a weight with values that are not finite"),
    ],
)
def test_numbers_that_no_batch_norm_has(key: str, value: float, message: str) -> None:
    tensors = {f"bn.{name}": tensor.clone() for name, tensor in nn.BatchNorm2d(16).state_dict().items()}
    tensors[f"bn.{key}"][3] = value
    with pytest.raises(UserError, match=message):
        convert_state_dict(tensors)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_an_eps_that_is_none(eps: float) -> None:
    with pytest.raises(UserError, match="eps is"):
        convert_state_dict(torchvision.models.resnet18().state_dict(), eps=eps)


def test_copying_a_norm_without_affine_reports_it_once() -> None:
    tensors = nn.Sequential(nn.BatchNorm2d(16, affine=False)).state_dict()
    converted, report = convert_state_dict(tensors, init="copy")
    assert not converted
    assert [layer.name for layer in report.layers] == ["0"]


def test_batch_norms_with_eps_0() -> None:
    """Torchvision's published detectors: the group norms get an eps all the same."""
    norm = nn.BatchNorm2d(32, eps=0.0)
    norm.running_var.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    expected, by_model = convert_norm(nn.Sequential(norm))
    tensors, report = convert_state_dict(nn.Sequential(norm).state_dict(), eps=0.0)
    assert [layer.eps for layer in report.layers] == [layer.eps for layer in by_model.layers] == [1e-5]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.state_dict().items())
