"""A converted norm keeps the old one's hooks and activations, and reads variances of another eps."""

from __future__ import annotations

import io

import pytest
import torch
import torchvision
from torch import Tensor, nn

from gn_detect import UserError, fuse_relu
from gn_detect.convert import convert_norm
from gn_detect.layers import FrozenBatchNorm2d as OurFrozenBatchNorm2d

from .test_convert_norm import Detectron2FrozenBatchNorm2d, trained


def test_full_backward_hooks_are_called() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), trained(nn.BatchNorm2d(8)))
    seen = []
    model[1].register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output))
    model[1].register_full_backward_pre_hook(lambda module, grad_output: seen.append(grad_output))
    new, _ = convert_norm(model)
    new(torch.randn(1, 3, 8, 8)).sum().backward()
    assert len(seen) == 2
    assert torch.equal(seen[0][0], torch.ones(1, 8, 6, 6))


class BatchNormAct(nn.BatchNorm2d):
    """timm's layout."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_belongs_to_the_copy(inplace: bool) -> None:
    """It has parameters, which training the copy would change in the original."""
    act = nn.PReLU()
    model = nn.Sequential(trained(BatchNormAct(8, act)), trained(BatchNormAct(8, act))).eval()
    drop = model[0].drop
    new, _ = convert_norm(model, inplace=inplace)
    assert new[0].act is new[1].act
    assert (new[0].act is act) == (new[0].drop is drop) == inplace
    assert torch.equal(new[0].act.weight, act.weight)
    new[0].train()
    assert inplace or not drop.training


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Detectron2FrozenBatchNorm2d, OurFrozenBatchNorm2d])
def test_a_channel_that_hardly_varies_with_another_eps_taken_off(kind: type[nn.Module]) -> None:
    """Variances from a library with eps 0 are below 0: only their sum with eps is right."""
    norm = trained(kind(32)).eval()
    norm.running_var[3] = 1e-7
    norm.running_var.sub_(1e-5)
    assert norm.running_var.min() < 0
    converted, _ = convert_norm(norm, num_groups=2)
    assert converted.weight.isfinite().all()
    assert converted.bias.isfinite().all()
    same = trained(kind(32)).eval()
    same.running_var[3] = 1e-7
    same.eps = 0.0
    expected, _ = convert_norm(same, num_groups=2)
    torch.testing.assert_close(converted.bias, expected.bias, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(converted.weight, expected.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("var", "eps"), [(-1e-5, 1e-5), (-2e-5, 1e-5), (0.0, 0.0)])
def test_a_variance_by_which_the_norm_itself_cannot_divide(var: float, eps: float) -> None:
    norm = trained(nn.BatchNorm2d(4, eps=eps))
    norm.running_var[1] = var
    with pytest.raises(UserError, match="'0' has a running_var of .* which is not above 0"):
        convert_norm(nn.Sequential(norm))


@pytest.mark.parametrize("fused", [False, True])
def test_a_whole_converted_model_is_saved(fused: bool) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(torchvision.models.mobilenet_v2(), trained(BatchNormAct(8, nn.PReLU()))).eval()
    model, _ = convert_norm(source)
    model = fuse_relu(model) if fused else model
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    image, features = torch.rand(1, 3, 32, 32), torch.rand(1, 8, 4, 4)
    assert torch.equal(found[0](image), model[0](image))
    assert torch.equal(found[1](features), model[1](features))
