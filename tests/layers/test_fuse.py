"""``fuse_relu`` on models of several makes: the same function, the same state dict, fewer modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import gn_detect
from gn_detect.layers import Conv2d, GroupNorm, fuse_relu


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


@pytest.fixture
def relus(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Those that were called by themselves."""
    called: list[nn.Module] = []
    forward = nn.ReLU.forward
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: called.append(self) or forward(self, x))
    return called


def test_norm_and_relu_in_a_sequential(relus: list[nn.Module]) -> None:
    model, x = stack(), torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    fused = gn_detect.fuse_relu(model)
    assert [type(m) for m in fused] == [nn.Conv2d, GroupNorm, nn.Identity, nn.Conv2d, GroupNorm]
    found = outputs(fused, x)
    assert not relus, "the norm's kernel did it"
    for ours, theirs in zip(found, outputs(model, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert type(model[1]) is nn.GroupNorm and type(model) is nn.Sequential, "the original is untouched"
    fused.load_state_dict(model.state_dict())
    again = fuse_relu(fused)
    assert type(again) is type(fused)
    assert torch.equal(again(x), fused(x))


def test_the_norm_gives_what_the_relu_gave(relus: list[nn.Module]) -> None:
    """The places before the norm and from the ReLU on are as before, also in a loop over the layers."""
    model, x = stack(), torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    fused = fuse_relu(model)
    taps = {}
    for name, network in (("model", model), ("fused", fused)):
        taps[name], y = [], x
        for layer in network:
            y = layer(y)
            taps[name].append(y.clone())
    for index in (0, 2, 3, 4):
        torch.testing.assert_close(taps["fused"][index], taps["model"][index])
    torch.testing.assert_close(taps["fused"][1], taps["model"][2])
    torch.testing.assert_close(fused[:3](x), model[:3](x))


@pytest.mark.parametrize("index", [1, 2])
def test_a_hook_still_sees_what_it_saw(index: int) -> None:
    model, x = stack(), torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    model[index].register_forward_hook(lambda *given: seen.append(given[2].clone()))
    fused = fuse_relu(model)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(seen[0], seen[1])
    assert (seen[0].min() < 0) == (index == 1)
    assert type(fused[2]) is nn.ReLU


def test_the_old_name_warns(relus: list[nn.Module]) -> None:
    with pytest.warns(DeprecationWarning, match="renamed to fuse_relu"):
        fused = gn_detect.fuse(stack())
    fused(torch.randn(1, 3, 9, 9))
    assert not relus


@pytest.mark.parametrize("make", [stack, lambda: torchvision.ops.Conv2dNormActivation(
    3, 8, norm_layer=lambda c: nn.GroupNorm(4, c))], ids=["plain", "subclass"])  # fmt: skip
def test_copies_pickles_compiled_and_exported(make: Callable[[], nn.Sequential], tmp_path: Path) -> None:
    model, x = make().eval(), torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    fused, expected = fuse_relu(model), model(x)
    assert isinstance(fused, type(model))
    torch.save(fused, tmp_path / "whole.pth")
    others = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
    others.append(torch.load(tmp_path / "whole.pth", weights_only=False))
    for other in others:
        assert type(other) is type(fused)
        assert other[0] is not fused[0]
        torch.testing.assert_close(other(x), expected)
    torch.testing.assert_close(torch.compile(fused, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), expected)


def test_a_converted_models_relus(relus: list[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
    converted, _ = gn_detect.convert_norm(model)
    x = torch.randn(2, 3, 9, 9)
    expected = converted(x)
    relus.clear()
    torch.testing.assert_close(fuse_relu(converted)(x), expected)
    assert not relus


def test_in_place_keeps_the_parameters() -> None:
    model = stack()
    model[1].weight.requires_grad_(False)
    model.eval()
    parameters = list(model.parameters())
    assert fuse_relu(model, inplace=True) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not model[1].weight.requires_grad
    assert not model[1].training


def test_torchvision_models(relus: list[nn.Module]) -> None:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(8, channels, eps=1e-3)

    torch.manual_seed(0)
    models = [
        torchvision.models.resnet18(norm_layer=norm),
        torchvision.models.regnet_y_400mf(norm_layer=norm),
    ]
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for model in models:
        fused = fuse_relu(model)
        kinds = [type(m) for m in fused.modules()]
        assert kinds.count(nn.GroupNorm) == 0
        assert kinds.count(GroupNorm) > 10
        relus.clear()
        found = fused(x)
        alone = len(relus)
        torch.testing.assert_close(found, model(x))
    assert len(relus) - alone > alone + 20, "regnet's blocks are Sequentials"


@pytest.mark.parametrize("affine", [{}, {"affine": False}, {"bias": False}])
def test_settings_survive(affine: dict[str, bool]) -> None:
    try:
        norm = nn.GroupNorm(2, 6, 0.01, dtype=torch.float64, **affine)
    except TypeError:
        pytest.skip("this PyTorch's GroupNorm has no bias switch")
    fused = fuse_relu(norm)
    assert isinstance(fused, GroupNorm)
    assert fused.eps == 0.01
    assert fused.affine == norm.affine
    assert fused.state_dict().keys() == norm.state_dict().keys()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(fused(x), norm(x))


def test_shared_norms_hooks_and_blocks_of_their_own() -> None:
    norm, relu, x = nn.GroupNorm(2, 4), nn.ReLU(), torch.randn(2, 4, 3, 3)
    shared = nn.ModuleList([nn.Sequential(norm, relu), nn.Sequential(norm, nn.Tanh())])
    fused = fuse_relu(shared)
    assert fused[0][0] is fused[1][0] and type(fused[0][0]) is GroupNorm, "a shared norm stays shared"
    for ours, theirs in zip(fused, shared, strict=True):
        torch.testing.assert_close(ours(x), theirs(x))

    hooked = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU(), nn.GroupNorm(2, 4), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    hooked[3].register_forward_hook(lambda *_: None)
    assert [type(m) for m in fuse_relu(hooked)] == [nn.GroupNorm, nn.ReLU, GroupNorm, nn.ReLU]

    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x) + self[1](x)

    assert [type(m) for m in fuse_relu(Own(nn.GroupNorm(2, 4), nn.ReLU()))] == [GroupNorm, nn.ReLU]

    class Special(nn.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    assert type(fuse_relu(nn.Sequential(Special(2, 4), nn.ReLU()))[0]) is Special
    assert [type(m) for m in fuse_relu(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU6()))] == [
        GroupNorm,
        nn.ReLU6,
    ]


def test_other_kinds_of_containers() -> None:
    model = nn.ModuleDict({"a": nn.GroupNorm(2, 4), "b": nn.ModuleList([nn.GroupNorm(4, 4)])})
    fused = fuse_relu(model)
    assert type(fused["a"]) is GroupNorm
    assert type(fused["b"][0]) is GroupNorm


def test_detectron2_convolutions() -> None:
    wrappers = pytest.importorskip("detectron2.layers", reason="needs detectron2")
    conv = wrappers.Conv2d(3, 8, 3, norm=nn.GroupNorm(2, 8), activation=F.relu)
    fused, x = fuse_relu(conv), torch.randn(2, 3, 6, 6)
    assert fused.activation is None
    assert fused.norm.activation == "relu"
    torch.testing.assert_close(fused(x), conv(x))


def test_our_own_models_are_fused_already() -> None:
    conv = Conv2d(3, 8, 3, norm=nn.GroupNorm(2, 8), activation="relu")
    fused, x = fuse_relu(conv), torch.randn(2, 3, 6, 6)
    assert type(fused.norm) is GroupNorm
    torch.testing.assert_close(fused(x), conv(x))
