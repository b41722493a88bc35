"""An eps that is a part of each layer's variance keeps more of the function, and survives calibration."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gn_detect import UserError, calibrate, convert_norm
from gn_detect.convert.balance import ImageMoments, balance, measure, solve
from gn_detect.convert.distillation import rates_of
from gn_detect.convert.source import read_norm
from gn_detect.layers import GroupNorm

GROUPS = {"num_groups": 2, "min_channels_per_group": 1}


@pytest.fixture
def original() -> nn.Module:
    """A small network, its statistics measured on images of very different contrast."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.BatchNorm2d(12, eps=1e-3),
        nn.ReLU(),
    )
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        for _ in range(100):
            model(images_of_any_contrast(16))
    return model.eval()


def images_of_any_contrast(count: int) -> Tensor:
    contrast = torch.exp(0.3 * torch.randn(count, 1, 1, 1))
    return contrast * torch.randn(count, 3, 12, 12) + 0.5 * torch.randn(count, 3, 1, 1)


def error(original: nn.Module, converted: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        expected = original(images)
        return ((converted(images) - expected).square().mean() / expected.var()).item()


def test_eps_is_the_part_of_the_expected_variance(original: nn.Module) -> None:
    converted, report = convert_norm(original, relative_eps=0.3, **GROUPS)
    for layer, index in zip(report.layers, (1, 4), strict=True):
        norm = original[index]
        means, variances = norm.running_mean.double().view(2, -1), norm.running_var.double().view(2, -1)
        expected = (variances.mean(1) + means.var(1, unbiased=False)).mean()
        assert layer.eps == pytest.approx(norm.eps + 0.3 * expected.item(), rel=1e-6)
        assert converted[index].eps == layer.eps


def test_keeps_more_of_the_function_the_larger(original: nn.Module) -> None:
    images = images_of_any_contrast(64)
    errors = [
        error(original, convert_norm(original, relative_eps=part, **GROUPS)[0], images)
        for part in (0.0, 0.1, 0.3, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0], "0.55 to 0.82 for ten seeds"


def test_of_nothing_changes_nothing(original: nn.Module) -> None:
    images = images_of_any_contrast(16)
    plain, with_part = (copy.deepcopy(original) for _ in range(2))
    plain, _ = convert_norm(plain, **GROUPS)
    with_part, _ = convert_norm(with_part, relative_eps=0.0, **GROUPS)
    for one, other in ((original, plain), (original, with_part)):
        calibrate(one, other, images, 2, batch_size=4, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), with_part.parameters(), strict=True))
    assert [plain[1].eps, plain[4].eps] == [1e-5, 1e-3]


def test_calibration_keeps_it_and_comes_closer(original: nn.Module) -> None:
    images = images_of_any_contrast(64)
    converted, report = convert_norm(original, relative_eps=0.3, **GROUPS)
    before = error(original, converted, images)
    eps = [layer.eps for layer in report.layers]
    calibrate(original, converted, images, 0, batch_size=8, report=report, augment=False, progress=False)
    assert "balanced" in report.similarity
    assert [converted[1].eps, converted[4].eps] == eps
    assert error(original, converted, images) < before


def test_rescaled_channels_leave_it_the_same_part() -> None:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(8).eval()
    scale = torch.rand(8) * 4 + 0.1
    mean, variance = torch.randn(40, 8), torch.rand(40, 8) * scale.square()
    moments = ImageMoments(mean, variance + mean.square())
    source = read_norm("norm", norm)
    assert source is not None
    eps = 0.7

    def group_variances(scales: Tensor) -> Tensor:
        means = (moments.mean * scales).view(40, 2, 4).mean(2)
        return (moments.square * scales.square()).view(40, 2, 4).mean(2) - means.square()

    found = solve(moments, source, 2, eps=eps)
    assert not torch.allclose(found.scales, torch.ones(8, dtype=torch.float64), atol=0.1)
    variances = group_variances(found.scales.float())
    torch.testing.assert_close(variances.mean(0), group_variances(torch.ones(8)).mean().expand(2))
    ratio = ((found.statistics.var.float() + eps) / (variances + eps)).sqrt()  # of the outputs' sizes
    torch.testing.assert_close(ratio.mean(0), torch.ones(2))


def test_dead_channels_do_not_change_the_part() -> None:
    """They are scaled up most, so that the others' variance is far below what it was until it is put back."""
    torch.manual_seed(2)
    norm = nn.BatchNorm2d(8).eval()
    alive = (torch.arange(8) < 3).float()
    mean, variance = torch.randn(40, 8) * alive, (torch.rand(40, 8) + 0.5) * alive * 50
    source = read_norm("norm", norm)
    assert source is not None
    moments = ImageMoments(mean, variance + mean.square())
    found = solve(moments, source, 1, eps=0.7)
    scales = found.scales.float()
    assert scales[3:].min() > 30 * scales[:3].max()
    # The layer's rate goes by the channels that are alive.
    assert found.size == pytest.approx(scales[:3].log().mean().exp().item(), rel=1e-3)

    def group_variance(scales: Tensor) -> Tensor:
        return ((moments.square * scales.square()).mean(1) - (mean * scales).mean(1).square()).mean()

    torch.testing.assert_close(group_variance(scales), group_variance(torch.ones(8)))


def test_weights_load_where_each_norm_has_its_eps(original: nn.Module) -> None:
    images = images_of_any_contrast(8)
    converted, report = convert_norm(original, relative_eps=0.3, **GROUPS)
    eps = {layer.name: layer.eps for layer in report.layers}
    again, _ = convert_norm(original, init="reset", eps=eps, **GROUPS)
    again.load_state_dict(converted.state_dict())
    torch.testing.assert_close(again(images), converted(images), rtol=0, atol=0)
    assert isinstance(again[1], GroupNorm)


def test_norms_without_statistics_keep_their_own(original: nn.Module) -> None:
    class AffineChannel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    _, report = convert_norm(AffineChannel(), relative_eps=0.3, **GROUPS)
    assert report.layers[0].eps == 1e-5
    assert "eps" in str(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"relative_eps": -0.1}, "relative_eps is -0.1"),
        ({"relative_eps": float("nan")}, "relative_eps is nan"),
        ({"relative_eps": 0.1, "eps": 1e-5}, "without eps"),
        ({"relative_eps": 0.1, "init": "copy"}, "init='match'"),
        ({"eps": {"1": 1e-5}}, "eps names no '4'"),
        ({"eps": {"1": 1e-5, "4": -0.1}}, "eps is -0.1"),
        ({"eps": -1.0}, "eps is -1.0"),
    ],
)
def test_clear_errors(original: nn.Module, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert_norm(original, **arguments, **GROUPS)
    assert isinstance(original[1], nn.BatchNorm2d)


def test_a_rescaled_layer_is_trained_in_proportion(original: nn.Module) -> None:
    """Adam's steps are of one length, so the rate of a layer shrinks with its weights."""
    converted, _ = convert_norm(original, relative_eps=1.0, **GROUPS)
    norms = {name: converted.get_submodule(name) for name in ("1", "4")}
    sources = {name: read_norm(name, original.get_submodule(name)) for name in norms}
    images = [images_of_any_contrast(32)]
    measured = measure(original, list(norms), lambda model, batch: model(batch), images)
    found = balance(original, converted, sources, measured)
    sizes = {converted.get_submodule(done.layer): done.size for done in found.values()}
    rates = rates_of(converted, list(norms.values()), 0.1, 0.5, sizes)
    rate = {parameter: rate.highest for rate in rates for parameter in rate.parameters}
    assert set(rate) == set(converted.parameters())
    for index in (0, 3):
        ratio = converted[index].weight.flatten(1).norm(dim=1) / original[index].weight.flatten(1).norm(dim=1)
        size = ratio.log().mean().exp().item()
        assert abs(size - 1) > 0.02, "0.06 and 0.11; nine other seeds: 0.017 to 0.32"
        assert (
            rate[converted[index].weight]
            == rate[converted[index].bias]
            == pytest.approx(0.1 * size, rel=1e-3)
        )
    assert {rate[parameter] for norm in norms.values() for parameter in norm.parameters()} == {0.5}
