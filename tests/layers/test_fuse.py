"""``fuse`` on models of several makes: the same function, the same state dict, fewer modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import gn_detect
from gn_detect.layers import Conv2d, GroupNorm, fuse


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)
    )
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def test_norm_and_relu_in_a_sequential() -> None:
    model, x = stack(), torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    fused = gn_detect.fuse(model)
    assert [type(m) for m in fused] == [nn.Conv2d, GroupNorm, nn.Identity, nn.Conv2d, GroupNorm]
    assert fused[1].activation == "relu" and fused[4].activation is None
    for ours, theirs in zip(outputs(fused, x), outputs(model, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert type(model[1]) is nn.GroupNorm, "the original is untouched"
    fused.load_state_dict(model.state_dict())


def test_in_place_keeps_the_parameters() -> None:
    model = stack()
    model[1].weight.requires_grad_(False)
    model.eval()
    parameters = list(model.parameters())
    assert fuse(model, inplace=True) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model[1].weight.requires_grad and not model[1].training


def test_torchvision_models() -> None:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(8, channels, eps=1e-3)

    torch.manual_seed(0)
    models = [
        torchvision.models.resnet18(norm_layer=norm),
        torchvision.models.regnet_y_400mf(norm_layer=norm),
    ]
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for model in models:
        fused = fuse(model)
        kinds = [type(m) for m in fused.modules()]
        assert kinds.count(nn.GroupNorm) == 0 and kinds.count(GroupNorm) > 10
        torch.testing.assert_close(fused(x), model(x))
    with_relu = [m for m in fused.modules() if isinstance(m, GroupNorm) and m.activation]
    assert len(with_relu) > 20, "regnet's blocks are Sequentials"


@pytest.mark.parametrize("affine", [{}, {"affine": False}, {"bias": False}])
def test_settings_survive(affine: dict[str, bool]) -> None:
    try:
        norm = nn.GroupNorm(2, 6, 0.01, dtype=torch.float64, **affine)
    except TypeError:
        pytest.skip("this PyTorch's GroupNorm has no bias switch")
    fused = fuse(norm)
    assert isinstance(fused, GroupNorm) and fused.eps == 0.01 and fused.affine == norm.affine
    assert fused.state_dict().keys() == norm.state_dict().keys()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(fused(x), norm(x))


def test_uncertain_relus_stay() -> None:
    norm, relu = nn.GroupNorm(2, 4), nn.ReLU()
    shared = nn.ModuleList([nn.Sequential(norm, relu), nn.Sequential(norm, nn.Tanh())])
    fused = fuse(shared)
    assert fused[0][0] is fused[1][0] and type(fused[0][0]) is GroupNorm, "a shared norm stays shared"
    assert fused[0][0].activation is None and type(fused[0][1]) is nn.ReLU

    hooked = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(2, 4), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    hooked[3].register_forward_hook(lambda *_: None)
    assert [type(m) for m in fuse(hooked)] == [nn.GroupNorm, nn.ReLU, GroupNorm, nn.ReLU]

    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x) + self[1](x)

    assert [type(m) for m in fuse(Own(nn.GroupNorm(2, 4), nn.ReLU()))] == [GroupNorm, nn.ReLU]

    class Special(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    assert type(fuse(nn.Sequential(Special(2, 4), nn.ReLU()))[0]) is Special
    assert [type(m) for m in fuse(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU6()))] == [GroupNorm, nn.ReLU6]


def test_other_kinds_of_containers() -> None:
    model = nn.ModuleDict({"a": nn.GroupNorm(2, 4), "b": nn.ModuleList([nn.GroupNorm(4, 4)])})
    fused = fuse(model)
    assert type(fused["a"]) is GroupNorm and type(fused["b"][0]) is GroupNorm


def test_detectron2_convolutions() -> None:
    wrappers = pytest.importorskip("detectron2.layers", reason="needs detectron2")
    conv = wrappers.Conv2d(3, 8, 3, norm=nn.GroupNorm(2, 8), activation=F.relu)
    fused, x = fuse(conv), torch.randn(2, 3, 6, 6)
    assert fused.activation is None and fused.norm.activation == "relu"
    torch.testing.assert_close(fused(x), conv(x))


def test_our_own_models_are_fused_already() -> None:
    conv = Conv2d(3, 8, 3, norm=nn.GroupNorm(2, 8), activation="relu")
    fused, x = fuse(conv), torch.randn(2, 3, 6, 6)
    assert type(fused.norm) is GroupNorm
    torch.testing.assert_close(fused(x), conv(x))
