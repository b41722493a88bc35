"""Parents that read the statistics of their BatchNorm are refused by name and type; all others convert."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gn_detect import UserError
from gn_detect.convert import convert_norm, convert_state_dict
from gn_detect.layers import GroupNorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch.ao.nn.intrinsic.qat as qat
    import torch.ao.quantization as quantization
    import torch.nn.intrinsic.qat as old_qat


def quantized(kind: type[nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(3, 8, 1, qconfig=quantization.get_default_qat_qconfig("fbgemm"))


class Pair(nn.Module):
    """A convolution and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Folds(Pair):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        shift = self.bn.bias + (self.conv.bias - self.bn.running_mean) * scale
        return F.conv2d(x, self.conv.weight * scale.view(-1, 1, 1, 1), shift)


class FoldsInMethod(Folds):
    def forward(self, x: Tensor) -> Tensor:
        return self._inner(x) if self.training else super().forward(x)

    def _inner(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var)


class FoldsInProperty(Pair):
    @property
    def mean(self) -> Tensor:
        return self.bn.running_mean

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) - self.mean.view(1, -1, 1, 1)


def fold(norm: nn.BatchNorm2d) -> Tensor:
    return norm.running_var


class FoldsInFunction(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) / fold(self.bn).view(1, -1, 1, 1)


class FoldsWithPyTorch(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return fuse_conv_bn_eval(self.conv, self.bn)(x)


class FoldsWithPyTorchByPath(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.utils.fusion.fuse_conv_bn_eval(self.conv, self.bn)(x)


class ReadsByName(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) - self.bn.running_mean.view(1, -1, 1, 1)


def logged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def inner(*arguments: Tensor) -> Tensor:
        return function(*arguments)

    return inner


class Decorated(Pair):
    @logged
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) - self.bn.running_mean.view(1, -1, 1, 1)


class Grandparent(nn.Module):
    """Reads two levels below."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair.conv(x) - self.pair.bn.running_mean.view(1, -1, 1, 1)


READERS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: functools.partial(quantized, getattr(qat, name))
        for name in ("ConvBn1d", "ConvBn2d", "ConvBn3d", "ConvBnReLU1d", "ConvBnReLU2d", "ConvBnReLU3d")
    },
    "LinearBn1d": lambda: qat.LinearBn1d(3, 8, qconfig=quantization.get_default_qat_qconfig("fbgemm")),
    "ConvBnReLU2d of torch.nn": lambda: quantized(old_qat.ConvBnReLU2d),
    **{kind.__name__: kind for kind in (Folds, FoldsInMethod, FoldsInProperty, FoldsInFunction)},
    **{kind.__name__: kind for kind in (FoldsWithPyTorch, FoldsWithPyTorchByPath, ReadsByName, Decorated)},
    "Grandparent": Grandparent,
}


@pytest.mark.parametrize("name", READERS)
def test_a_parent_that_reads_statistics_is_refused(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model.add_module("block", READERS[name]())
    before = str(model)
    with pytest.raises(UserError) as caught:
        convert_norm(model, inplace=True)
    message, kind = str(caught.value), name.split(" ")[0]
    assert message.startswith(f"'block' is a {kind}, which reads the running_")
    assert "\n" not in message
    assert "exclude='block.*'" in message
    assert str(model) == before
    converted, report = convert_norm(model, exclude="block.*")
    assert [layer.name for layer in report.layers] == ["1"]
    assert type(converted[1]) is GroupNorm


def test_the_model_itself_may_be_the_reader() -> None:
    with pytest.raises(UserError, match="the Folds reads the running_.* of its BatchNorm 'bn'.*exclude='bn'"):
        convert_norm(Folds())


def test_a_model_prepared_for_quantization() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        fused = quantization.fuse_modules_qat(model, [["0", "1", "2"]])
        assert len(convert_norm(fused)[1].layers) == 1, "a container, which calls its norm"
        prepared = quantization.prepare_qat(fused)
    with pytest.raises(UserError, match="'0' is a ConvBnReLU2d, which reads"):
        convert_norm(prepared)


@pytest.mark.parametrize("prefix", ["", "model.block."])
def test_the_state_dict_of_a_quantization_aware_layer_is_refused(prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in quantized(qat.ConvBnReLU2d).state_dict().items()}
    with pytest.raises(UserError, match=f"is a quantization-aware layer .*BatchNorm '{prefix}bn'"):
        convert_state_dict(state)


class Reparameterised(Pair):
    """RepVGG's and MobileOne's way: a method that ``forward`` does not call folds the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))

    def reparameterize(self) -> Tensor:
        return self.bn.running_mean


class OwnStatistics(Pair):
    """Keeps its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) - self.running_mean.view(1, -1, 1, 1)


class Overrides(FoldsInMethod):
    """Reads nothing, unlike its parents."""

    def forward(self, x: Tensor) -> Tensor:
        return self._inner(x)

    def _inner(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class CallsFunctional(Pair):
    """A name of PyTorch's functions is no reading."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(F.batch_norm(self.bn(self.conv(x)), None, None, training=True))


@pytest.mark.parametrize("kind", [Pair, Reparameterised, OwnStatistics, Overrides, CallsFunctional])
def test_others_convert(kind: type[nn.Module]) -> None:
    converted, report = convert_norm(nn.Sequential(kind()))
    assert [layer.name for layer in report.layers] == ["0.bn"]
    assert converted(torch.randn(2, 3, 4, 4)).shape == (2, 8, 4, 4)


@pytest.mark.parametrize("name", ["repvgg_a0", "levit_128"])
def test_timms_models_that_can_fold_their_norms_convert(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    assert convert_norm(timm.create_model(name), inplace=True)[1].layers
