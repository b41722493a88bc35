"""Checkpoints without their model."""

from __future__ import annotations

import pytest
import torch
import torchvision

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
