"""``convert_norm``: what it finds, what it keeps, what it refuses, and that the formula holds."""

from __future__ import annotations

import copy
import json

import hypothesis.strategies as st
import pytest
import torch
import torchvision
from hypothesis import given, settings
from torch import Tensor, nn

from gn_detect import UserError
from gn_detect.convert import convert_norm
from gn_detect.layers import FrozenBatchNorm2d as OurFrozenBatchNorm2d
from gn_detect.layers import GroupNorm, GroupNormAct, choose_groups


def trained(norm: nn.Module, seed: int = 0) -> nn.Module:
    """Give a norm statistics and an affine, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]:
        if tensor is not None and tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator)
            tensor.data.copy_(values + 0.5 if name != "running_mean" else values * 4 - 2)
    return norm


def with_expected_statistics(norm: nn.Module, groups: int, dims: int) -> Tensor:
    """Images in each of which every channel has exactly the running mean and variance."""
    shape = (3, norm.num_features, *(4,) * dims)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).flatten(2)
    x = (x - x.mean(2, keepdim=True)) / x.var(2, unbiased=False, keepdim=True).sqrt()
    x = x * norm.running_var.double().sqrt()[:, None] + norm.running_mean.double()[:, None]
    return x.view(shape)


def broken(key: str, value: float) -> nn.Module:
    norm = trained(nn.BatchNorm2d(4))
    getattr(norm, key).data[1] = value
    norm.running_mean[2] = 10.0  # so that a group's variance is above 1
    return norm


class BatchNormSubclass(nn.BatchNorm2d):
    """Many libraries have one."""


class Detectron2FrozenBatchNorm2d(nn.Module):
    """All four tensors are buffers, as in detectron2."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


class SquaredBatchNorm(Detectron2FrozenBatchNorm2d):
    """The tensors are the same, the function is not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class AffineChannel(nn.Module):
    """Caffe2's: statistics are folded into the scale and the shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


BATCH_NORMS = {
    "1d": (nn.BatchNorm1d, 1),
    "2d": (nn.BatchNorm2d, 2),
    "3d": (nn.BatchNorm3d, 3),
    "sync": (nn.SyncBatchNorm, 2),
    "subclass": (BatchNormSubclass, 2),
    "torchvision frozen": (torchvision.ops.FrozenBatchNorm2d, 2),
    "our frozen": (OurFrozenBatchNorm2d, 2),
    "detectron2 frozen": (Detectron2FrozenBatchNorm2d, 2),
}


@pytest.mark.parametrize("name", BATCH_NORMS)
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_equals_batch_norm_where_an_image_is_as_expected(name: str, eps: float) -> None:
    make, dims = BATCH_NORMS[name]
    norm = trained(make(32, eps=eps)).double().eval()
    norm.num_features = 32
    new, report = convert_norm(norm, num_groups=4)
    x = with_expected_statistics(norm, 4, dims)
    expected = nn.functional.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=eps
    )
    torch.testing.assert_close(new(x), expected, rtol=1e-5, atol=1e-5)
    assert (report.layers[0].groups, report.layers[0].eps) == (2, eps)  # 16 channels in each group
    assert new.weight.dtype == torch.float64


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, 48),
    num_groups=st.integers(1, 64),
    smallest=st.integers(1, 64),
    seed=st.integers(0, 1000),
    part=st.sampled_from([0.0, 0.3, 2.0]),
)
def test_exact_match_for_any_channels_and_groups(
    channels: int, num_groups: int, smallest: int, seed: int, part: float
) -> None:
    norm = trained(nn.BatchNorm2d(channels), seed).double().eval()
    new, _ = convert_norm(norm, num_groups=num_groups, min_channels_per_group=smallest, relative_eps=part)
    x = with_expected_statistics(norm, new.num_groups, 2)
    torch.testing.assert_close(new(x), norm(x), rtol=1e-5, atol=1e-5)


def trees() -> st.SearchStrategy[nn.Module]:
    """Modules of norms, convolutions and activations in containers in containers."""
    leaves = st.sampled_from(["bn", "conv", "relu", "gn", "frozen"]).map(_leaf)
    return st.recursive(
        leaves,
        lambda children: st.lists(children, min_size=1, max_size=3).map(lambda c: nn.Sequential(*c)),
        max_leaves=8,
    )


def _leaf(kind: str) -> nn.Module:
    return {
        "bn": lambda: trained(nn.BatchNorm2d(8)),
        "frozen": lambda: trained(Detectron2FrozenBatchNorm2d(8)),
        "conv": lambda: nn.Conv2d(8, 8, 1),
        "relu": nn.ReLU,
        "gn": lambda: trained(nn.GroupNorm(2, 8)),
    }[kind]()


@settings(max_examples=40, deadline=None)
@given(model=trees(), groups=st.sampled_from([1, 2, 4]))
def test_any_tree_converts_once_and_round_trips(model: nn.Module, groups: int) -> None:
    before = copy.deepcopy(model.state_dict())
    once, _ = convert_norm(model, num_groups=groups, min_channels_per_group=1)
    twice, report = convert_norm(once, num_groups=groups, min_channels_per_group=1)
    assert report.layers == []
    assert str(once) == str(twice)
    kept = [
        name for name in before if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    assert list(once.state_dict()) == kept
    x = torch.randn(2, 8, 5, 5)
    other, _ = convert_norm(model, num_groups=groups, min_channels_per_group=1, init="reset")
    other.load_state_dict(once.state_dict())
    torch.testing.assert_close(other.eval()(x), once.eval()(x), rtol=0, atol=0)
    for name, tensor in model.state_dict().items():  # the original is untouched
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in once.modules())


def test_group_rule() -> None:
    assert [choose_groups(c, 32, 16) for c in (8, 16, 24, 64, 256, 512, 2048)] == [1, 1, 1, 4, 16, 32, 32]
    assert choose_groups(96, 32) == 32
    assert choose_groups(40, 32) == 20
    assert choose_groups(7, 32) == 7
    assert choose_groups(64, group_size=16) == 4
    norm = trained(nn.BatchNorm2d(24)).eval()
    assert convert_norm(norm, "GN1")[0].num_groups == 1
    assert convert_norm(norm, "IN")[0].num_groups == 24
    with pytest.raises(UserError, match=r"24 channels cannot be split into groups of 16; .* exclude"):
        convert_norm(nn.Sequential(norm), group_size=16)


class Branched(nn.Module):
    """A shared norm, and norms kept in a plain list, a dict and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.first = trained(nn.BatchNorm2d(8))
        self.again = self.first
        self.layers = nn.ModuleList([trained(nn.BatchNorm2d(8), 1)])
        self.named = nn.ModuleDict({"a": trained(nn.BatchNorm2d(8), 2)})
        self.plain = [self.layers[0]]
        self.table = {"x": (self.first, 3)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.first(x))
        return self.named["a"](self.plain[0](self.table["x"][0](x)))


def test_shared_and_contained_norms() -> None:
    model, _ = convert_norm(Branched(), num_groups=2, min_channels_per_group=1)
    assert model.first is model.again is model.table["x"][0]
    assert model.plain[0] is model.layers[0]
    assert all(isinstance(m, GroupNorm) for m in (model.first, model.layers[0], model.named["a"]))
    model(torch.randn(1, 8, 4, 4)).sum().backward()
    assert model.first.weight.grad is not None


def test_keeps_mode_type_hooks_and_everything_else() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), trained(nn.BatchNorm2d(8)), nn.Dropout()).to(torch.bfloat16)
    model[1].eval()
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    new, _ = convert_norm(model)
    assert (new.training, new[1].training, new[1].weight.dtype) == (True, False, torch.bfloat16)
    new(torch.randn(1, 3, 8, 8, dtype=torch.bfloat16))
    assert seen == [1]
    assert isinstance(model[1], nn.BatchNorm2d)
    weight = model[0].weight
    same, _ = convert_norm(model, inplace=True)
    assert same is model
    assert model[0].weight is weight
    assert isinstance(model[1], GroupNorm)


def test_requires_grad() -> None:
    frozen = trained(nn.BatchNorm2d(8)).requires_grad_(False)
    assert convert_norm(frozen)[0].weight.requires_grad
    kept, report = convert_norm(frozen, requires_grad=None)
    assert not kept.weight.requires_grad
    assert not report.layers[0].trainable
    half = trained(nn.BatchNorm2d(8))
    half.weight.requires_grad_(False)
    kept, _ = convert_norm(half, requires_grad=None)
    assert (kept.weight.requires_grad, kept.bias.requires_grad) == (False, True)
    buffers = trained(torchvision.ops.FrozenBatchNorm2d(8))
    assert convert_norm(buffers)[0].weight.requires_grad


def test_include_exclude_and_dry_run() -> None:
    model = nn.Sequential(*(trained(nn.BatchNorm2d(8)) for _ in range(3)))
    new, report = convert_norm(model, exclude="1")
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert isinstance(new[1], nn.BatchNorm2d)
    assert [layer.name for layer in convert_norm(model, include=["2"])[1].layers] == ["2"]
    same, report = convert_norm(model, dry_run=True)
    assert same is model
    assert isinstance(model[0], nn.BatchNorm2d)
    assert len(report.layers) == 3
    frozen = nn.Sequential(nn.Conv2d(3, 8, 1), trained(torchvision.ops.FrozenBatchNorm2d(8)))
    dry, real = convert_norm(frozen, dry_run=True)[1], convert_norm(frozen)[1]
    assert dry == real
    assert (dry.parameters_before, dry.parameters_after) == (32, 48)
    with pytest.raises(UserError, match="'head.*' fits no module"):
        convert_norm(model, exclude="head.*")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LazyBatchNorm2d()), "'0' is a LazyBatchNorm2d without shape"),
        (nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), "'0' is a BatchNorm2d without running"),
        (nn.Sequential(trained(SquaredBatchNorm(4))), "'0' .* computes something else; leave it out"),
        (nn.Sequential(nn.BatchNorm2d(4, device="meta")), "'0' is on the meta device"),
        (
            nn.Sequential(broken("running_var", float("nan"))),
            "'0' has a running_var with values that are not fin",
        ),
        (nn.Sequential(broken("bias", float("inf"))), "'0' has a bias with values that are not finite"),
        (
            nn.Sequential(broken("running_var", -1.0)),
            "'0' has a running_var of -1 and an eps of 1e-05, and divides by the root of their sum",
        ),
        (nn.Sequential(broken("weight", 6e4).half()), "'0' needs weights up to .* float16 does not hold"),
    ],
)
def test_refusals_leave_the_model_alone(model: nn.Module, message: str) -> None:
    before = str(model)
    with pytest.raises(UserError, match=message):
        convert_norm(model, inplace=True)
    assert str(model) == before


def test_affine_only_norms_are_measured_on_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), trained(AffineChannel(32))).eval()
    images = [torch.randn(4, 3, 16, 16) for _ in range(4)]
    blind, report = convert_norm(model)
    assert "hold no running statistics" in report.warnings[0]
    assert "images=" in report.warnings[0]
    assert report.layers[0].init == "copy, no statistics"
    measured, report = convert_norm(model, images=images)
    assert report.layers[0].init == "match, measured"
    assert not report.warnings
    expected = model(images[0])

    def error(new: nn.Module) -> float:
        return ((new(images[0]) - expected).norm() / expected.norm()).item()

    assert error(measured) < 0.2 < error(blind)


def test_timm_batch_norm_with_activation() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("efficientnet_b0", pretrained=False).eval()
    kinds = {name: type(m).__name__ for name, m in model.named_modules()}
    assert "BatchNormAct2d" in kinds.values()
    new, _ = convert_norm(model)
    acts = 0
    for name, module in new.named_modules():
        if kinds[name] == "BatchNormAct2d":
            activation = model.get_submodule(name).act
            if isinstance(activation, nn.Identity):  # of the projections
                assert type(module) is GroupNorm
            else:
                assert type(module) is GroupNormAct
                assert type(module.act) is type(activation)
                acts += 1
    assert acts > 20
    new(torch.randn(1, 3, 64, 64)).sum().backward()


def test_batch_norm_act_equals_the_original_where_expected() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for activation in (nn.ReLU, nn.SiLU):
        norm = trained(timm.layers.BatchNormAct2d(16, act_layer=activation)).double().eval()
        new, _ = convert_norm(norm, num_groups=2, min_channels_per_group=1)
        x = with_expected_statistics(norm, 2, 2)
        torch.testing.assert_close(new(x), norm(x.clone()), rtol=1e-5, atol=1e-5)


def test_report_as_table_json_and_dict(tmp_path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), trained(nn.BatchNorm2d(32)))
    _, report = convert_norm(model)
    table = str(report)
    assert "1      BatchNorm2d  32  2       1e-05  match  yes" in table
    assert "1 norms; 960 parameters before, 960 after" in table
    report.save(tmp_path / "report.json")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["layers"][0]["groups"] == 2


def test_video_resnet_trains_on_one_clip() -> None:
    torch.manual_seed(0)
    video = torchvision.models.video.resnet
    layers = [[video.Conv3DSimple] * 4, [1, 1, 1, 1]]
    resnet = video.VideoResNet(video.BasicBlock, *layers, video.BasicStem, num_classes=3)
    model, report = convert_norm(resnet)
    assert len(report.layers) == 12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clip, label = torch.randn(1, 3, 4, 24, 24), torch.tensor([1])
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(clip), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("relative_eps", [0.0, 1.0])
def test_channels_that_hardly_vary_stay_constants(relative_eps: float) -> None:
    """GN would multiply a dead filter (MobileNetV2 has dozens) by hundreds of times its weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.normal_()
    images = torch.randn(64, 3, 12, 12) * torch.rand(64, 1, 1, 1).add(0.5)
    model[1].momentum = 1.0
    model.train()(images)
    model.eval()
    new, report = convert_norm(model, num_groups=1, relative_eps=relative_eps)
    assert report.layers[0].constant == 3
    assert "3 channels in 1 norms, from '1' on, hardly vary" in str(report)
    assert torch.equal(new[1].weight[:3], torch.zeros(3))
    assert torch.equal(new[1].bias[:3], model[1].bias[:3])
    with torch.no_grad():
        expected = model(images)
        error = ((new(images) - expected).norm() / expected.norm()).item()
    assert error < 0.2, "0.76 and 1.57 with the formula's weights"


def test_small_variances_are_alive_where_eps_or_the_group_is_smaller() -> None:
    norm = trained(nn.BatchNorm2d(32, eps=1e-3))
    norm.running_var.mul_(1e-4).clamp_(min=1e-6)
    norm.running_mean.zero_()
    assert convert_norm(norm)[1].layers[0].constant == 0, "all are small, none compared with the others"
    norm = trained(nn.BatchNorm2d(32, eps=0.0))
    norm.running_var[0] = 1e-8
    assert convert_norm(norm)[1].layers[0].constant == 0, "BatchNorm divides it by its own deviation"


def test_afresh_a_norm_without_affine_takes_matched_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), trained(nn.BatchNorm2d(8, affine=False)))
    matched, _ = convert_norm(model)
    fresh, _ = convert_norm(model, init="reset")
    fresh.load_state_dict(matched.state_dict())
    assert convert_norm(model, init="copy")[0][1].weight is None


def test_uninitialised_layers_next_to_norms() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), trained(nn.BatchNorm2d(4)))
    new, report = convert_norm(model)
    assert isinstance(new[1], GroupNorm)
    assert report.parameters_after == 8
    assert new(torch.randn(1, 3, 4, 4)).shape == (1, 4, 4, 4)


def test_groups_of_one_number_give_a_warning() -> None:
    model = nn.Sequential(nn.Linear(4, 8), trained(nn.BatchNorm1d(8)))
    assert "of one channel" in convert_norm(model, "IN")[1].warnings[0]
    assert not convert_norm(model)[1].warnings
