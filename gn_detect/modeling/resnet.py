"""ResNet and ResNeXt (He et al. 2016; Xie et al. 2017) in detectron2's layout and names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from ..config.schema import ResNets
from ..layers import Conv2d, DeformConv2d, init_he
from .freezing import freeze

NormFactory = Callable[[int], nn.Module | None]

STAGES = ("res2", "res3", "res4", "res5")
BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}  # depth -> blocks in each stage


def _conv(
    in_channels: int,
    out_channels: int,
    size: int,
    norm: NormFactory,
    stride: int = 1,
    *,
    groups: int = 1,
    dilation: int = 1,
    activation: str | None = "relu",
    layer: Callable[..., Conv2d] = Conv2d,
) -> Conv2d:
    return layer(
        in_channels,
        out_channels,
        size,
        stride,
        padding=size // 2 * dilation,
        dilation=dilation,
        groups=groups,
        bias=False,
        norm=norm(out_channels),
        activation=activation,
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and 34)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride)
        self.conv2 = _conv(out_channels, out_channels, 3, norm)
        self.shortcut = _make_shortcut(in_channels, out_channels, stride, norm)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        residual = x if self.shortcut is None else self.shortcut(x)
        return self.conv2(self.conv1(x), residual)


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (ResNet-50 and deeper, ResNeXt).

    ``width``, ``groups`` (ResNeXt's cardinality) and ``dilation`` are those of the 3x3 convolution.
    ``stride_in_1x1`` puts the stride on the first 1x1 (the original MSRA models) and not on the 3x3.
    ``middle`` makes the 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: NormFactory,
        *,
        width: int,
        groups: int,
        dilation: int,
        stride_in_1x1: bool,
        middle: Callable[..., Conv2d] = Conv2d,
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(in_channels, width, 1, norm, stride_1x1)
        self.conv2 = _conv(width, width, 3, norm, stride_3x3, groups=groups, dilation=dilation, layer=middle)
        self.conv3 = _conv(width, out_channels, 1, norm)
        self.shortcut = _make_shortcut(in_channels, out_channels, stride, norm)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        residual = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(self.conv2(self.conv1(x)), residual)


class DeformBottleneckBlock(BottleneckBlock):
    """A bottleneck whose 3x3 convolution is deformable; another one computes its offsets, at first 0.

    With ``modulated`` the last third of the offsets' channels are the logits of the samples' factors.
    Other arguments are those of :class:`BottleneckBlock`.
    """

    conv2: DeformConv2d

    def __init__(self, *args: Any, modulated: bool, offset_groups: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, middle=partial(DeformConv2d, offset_groups=offset_groups))
        conv = self.conv2
        self.modulated = modulated
        channels = conv.samples * (3 if modulated else 2)
        layout: Any = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        self.conv2_offset = nn.Conv2d(conv.in_channels, channels, *layout)
        for parameter in self.conv2_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        residual = x if self.shortcut is None else self.shortcut(x)
        x = self.conv1(x)
        offset, mask = self.conv2_offset(x), None
        if self.modulated:
            offset, mask = offset.split([2 * self.conv2.samples, self.conv2.samples], dim=1)
            mask = mask.sigmoid()
        return self.conv3(self.conv2(x, offset, mask), residual)


class Stem(nn.Module):
    """7x7 convolution of stride 2, norm, ReLU and 3x3 max pooling: stride 4."""

    def __init__(self, out_channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = _conv(3, out_channels, 7, norm, 2)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to (N, C, H / 4, W / 4)."""
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class ResNet(nn.Module):
    """Stem and stages ``res2`` ... ``res5``.

    Args:
        stem: module of stride 4.
        stages: name -> blocks, in order.
        out_features: stages whose outputs are returned.
        freeze_at: 1 freezes the stem, 2 the stem and res2, and so on.
        activation_checkpointing: keep only the inputs of the blocks, and compute each block again in the
            backward pass (Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(
        self,
        stem: Stem,
        stages: dict[str, nn.Sequential],
        out_features: Sequence[str],
        freeze_at: int,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.activation_checkpointing = activation_checkpointing
        for name, blocks in stages.items():
            self.add_module(name, blocks)
        self.stage_names = tuple(stages)
        self.out_features = tuple(out_features)
        frozen = ("stem", *STAGES)[:freeze_at]
        self.frozen_stages = tuple(name for name in frozen if hasattr(self, name))
        for name in self.frozen_stages:
            freeze(getattr(self, name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map (N, 3, H, W) normalised images to the features named in ``out_features``."""
        features = {}
        with record_function("backbone"):
            x = self.stem(x)
            for name in self.stage_names:
                x = self._stage(name, x)
                if name in self.out_features:
                    features[name] = x
        return features

    def _stage(self, name: str, x: Tensor) -> Tensor:
        blocks = getattr(self, name)
        if not (self.activation_checkpointing and torch.is_grad_enabled()) or name in self.frozen_stages:
            return blocks(x)
        for block in blocks:  # there is no dropout, so no random state to restore
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return x


def make_stage(
    settings: ResNets, name: str, in_channels: int, norm: NormFactory, dilation: int = 1
) -> nn.Sequential:
    """Return the blocks of stage ``name``; only the first has a stride and a projection shortcut."""
    index = STAGES.index(name)
    out_channels = settings.res2_out_channels * 2**index
    width = settings.num_groups * settings.width_per_group * 2**index
    stride = 1 if name == "res2" or dilation == 2 else 2
    bottleneck: Callable[..., BottleneckBlock] = BottleneckBlock
    if settings.deform_on_per_stage[index]:
        bottleneck = partial(
            DeformBottleneckBlock,
            modulated=settings.deform_modulated,
            offset_groups=settings.deform_num_groups,
        )
    blocks: list[nn.Module] = []
    for _ in range(BLOCKS[settings.depth][index]):
        if settings.depth < 50:
            blocks.append(BasicBlock(in_channels, out_channels, stride, norm))
        else:
            blocks.append(
                bottleneck(
                    in_channels,
                    out_channels,
                    stride,
                    norm,
                    width=width,
                    groups=settings.num_groups,
                    dilation=dilation,
                    stride_in_1x1=settings.stride_in_1x1,
                )
            )
        in_channels, stride = out_channels, 1
    return nn.Sequential(*blocks)


def _make_shortcut(in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> Conv2d | None:
    if in_channels == out_channels:
        return None
    return _conv(in_channels, out_channels, 1, norm, stride, activation=None)


@torch.no_grad()
def _init_convolutions(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, Conv2d):
            init_he(module)
