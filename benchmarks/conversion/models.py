"""The architectures of the real pretrained BatchNorm models on which the converter is measured.

Names of modules follow the published files, so that their weights load with ``strict=True``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from gn_detect.weights import read_checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Pretrained:
    """A real model in evaluation mode, and the input that it expects.

    Attributes:
        model: (N, 3, size, size) normalised RGB -> (N, D): logits, or features of a model without a head.
        size: side of the input in pixels.
        mean, std: of RGB values in 0..1.
    """

    model: nn.Module
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(name: str, weights: Path) -> Pretrained:
    """One of :data:`NAMES` with its weights from the folder ``weights``."""
    if name == "mobilenet_v2":
        model: nn.Module = torchvision.models.mobilenet_v2()
        model.classifier = nn.Identity()
        path = weights / "mobilenet_v2_imagenet" / "mobilenet_v2_features_torchvision_keys.pth"
        return _load(model, path, 160, IMAGENET_MEAN, IMAGENET_STD)
    if name == "efficientnet_lite0":
        path = weights / "efficientnet_lite0_imagenet" / "efficientnet-lite0-57934424.pth"
        return _load(EfficientNetLite0(), path, 160, (127 / 255,) * 3, (128 / 255,) * 3)
    if name.startswith("cifar_resnet"):
        depth = int(name.removeprefix("cifar_resnet"))
        (path,) = (weights / "resnet_cifar10_bn").glob(f"resnet{depth}-*.th")
        return _load(CifarResNet(depth), path, 32, IMAGENET_MEAN, IMAGENET_STD)
    kind = name.removeprefix("resnet20_")
    path = weights / "resnet20_cifar10_gn_bn" / f"resnet20_cifar10_{kind}.pth"
    return _load(PairResNet20(kind[:2]), path, 32, (0.0,) * 3, (1.0,) * 3)


NAMES = (
    "mobilenet_v2",
    "efficientnet_lite0",
    *(f"cifar_resnet{depth}" for depth in (20, 32, 44, 56)),
    *(f"resnet20_{norm}_bs{batch}" for norm in ("bn", "gn") for batch in (2, 32)),
)


def _load(
    model: nn.Module, path: Path, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Pretrained:
    model.load_state_dict(read_checkpoint(path).tensors, strict=True)
    return Pretrained(model.eval(), size, mean, std)


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2, with shortcuts of kind A: every second pixel, zero channels."""

    def __init__(
        self, depth: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, classes: int = 10
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = norm(16)
        blocks = (depth - 2) // 6
        channels = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            layer = []
            for i in range(blocks):
                layer.append(CifarBlock(channels, width, 2 if stage > 1 and i == 0 else 1, norm))
                channels = width
            self.add_module(f"layer{stage}", nn.Sequential(*layer))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class CifarBlock(nn.Module):
    def __init__(
        self, in_channels: int, channels: int, stride: int, norm: Callable[[int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = norm(channels)
        self.stride, self.added = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.added // 2
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + shortcut)


class PairResNet20(nn.Module):
    """The ResNet-20 trained with BN and with GN of 8 groups: biases, no norm in the stem."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        channels = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            layer = []
            for i in range(3):
                layer.append(PairBlock(channels, width, 2 if stage > 1 and i == 0 else 1, norm))
                channels = width
            self.add_module(f"layer{stage}", nn.Sequential(*layer))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class PairBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = SamePadConv2d(in_channels, channels, 3, stride)
        self.conv2 = SamePadConv2d(channels, channels, 3, 1)
        self.norm1, self.norm2 = (
            nn.BatchNorm2d(channels, eps=1e-3, track_running_stats=True)
            if norm == "bn"
            else nn.GroupNorm(8, channels)
            for _ in range(2)
        )
        self.downsample = nn.Conv2d(in_channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class SamePadConv2d(nn.Conv2d):
    """TensorFlow's ``same``: ceil(size / stride) outputs, the odd pixel of padding at the end."""

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        total = [max((math.ceil(length / s) - 1) * s + k - length, 0) for length in x.shape[2:]]
        (top, left) = (n // 2 for n in total)
        x = F.pad(x, (left, total[1] - left, top, total[0] - top))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class EfficientNetLite0(nn.Module):
    """Tan 2020: EfficientNet-B0 without squeeze-and-excitation, with ReLU6; 1000 classes."""

    # (expansion, channels, blocks, stride, kernel) of each stage
    STAGES = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SamePadConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, channels = [], 32
        for expansion, width, count, stride, kernel in self.STAGES:
            for i in range(count):
                blocks.append(LiteBlock(channels, width, expansion, kernel, stride if i == 0 else 1))
                channels = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


class LiteBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        middle = in_channels * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(in_channels, middle, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(middle, eps=1e-3)
        self._depthwise_conv = SamePadConv2d(middle, middle, kernel, stride, groups=middle, bias=False)
        self._bn1 = nn.BatchNorm2d(middle, eps=1e-3)
        self._project_conv = nn.Conv2d(middle, channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(channels, eps=1e-3)
        self.expands, self.adds = expansion > 1, stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return y + x if self.adds else y


def normalise(images: Tensor, pretrained: Pretrained) -> Tensor:
    """(N, 3, H, W) uint8 RGB -> float32 as the model expects."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (pretrained.mean, pretrained.std))
    return (images.float() / 255 - mean) / std
