"""ResNet and ResNeXt (He et al. 2016; Xie et al. 2017) in detectron2's layout and names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from ..layers import Conv2d, FrozenBatchNorm2d
from .init import init_he

NormFactory = Callable[[int], nn.Module | None]

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and 34)."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = Conv2d(
            in_channels, out_channels, 3, stride, 1, bias=False, norm=norm(out_channels), activation="relu"
        )
        self.conv2 = Conv2d(
            out_channels, out_channels, 3, 1, 1, bias=False, norm=norm(out_channels), activation="relu"
        )
        self.shortcut = _make_shortcut(in_channels, out_channels, stride, norm)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""
        residual = x if self.shortcut is None else self.shortcut(x)
        return self.conv2(self.conv1(x), residual)


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (ResNet-50 and deeper, ResNeXt).

    Args:
        stride_in_1x1: put the stride on the first 1x1 (the original MSRA models) and not on the 3x3.
        num_groups: groups of the 3x3 convolution (ResNeXt's cardinality).
        dilation: of the 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int,
        norm: NormFactory,
        stride_in_1x1: bool = False,
        num_groups: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        width = bottleneck_channels
        self.conv1 = Conv2d(
            in_channels, width, 1, stride_1x1, bias=False, norm=norm(width), activation="relu"
        )
        self.conv2 = Conv2d(
            width,
            width,
            3,
            stride_3x3,
            padding=dilation,
            dilation=dilation,
            groups=num_groups,
            bias=False,
            norm=norm(width),
            activation="relu",
        )
        self.conv3 = Conv2d(width, out_channels, 1, bias=False, norm=norm(out_channels), activation="relu")
        self.shortcut = _make_shortcut(in_channels, out_channels, stride, norm)
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""
        residual = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(self.conv2(self.conv1(x)), residual)


class Stem(nn.Module):
    """7x7 convolution of stride 2, norm, ReLU and 3x3 max pooling: stride 4."""

    def __init__(self, out_channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = Conv2d(3, out_channels, 7, 2, 3, bias=False, norm=norm(out_channels), activation="relu")
        _init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H / 4, W / 4)."""
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class ResNet(nn.Module):
    """Stem and stages ``res2`` ... ``res5``.

    Args:
        stem: of stride 4.
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
        frozen = ["stem", "res2", "res3", "res4", "res5"][:freeze_at]
        self.frozen_stages = tuple(name for name in frozen if hasattr(self, name))
        for name in self.frozen_stages:
            freeze(getattr(self, name))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) normalised images -> the features named in ``out_features``."""
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


def freeze(module: nn.Module) -> None:
    """No parameter of ``module`` is trained, and its BN uses and keeps its running statistics."""
    for parameter in module.parameters():
        parameter.requires_grad = False
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(parent, name, FrozenBatchNorm2d.from_batch_norm(child))


def make_stage(
    index: int,
    num_blocks: int,
    *,
    depth: int,
    in_channels: int,
    out_channels: int,
    bottleneck_channels: int,
    norm: NormFactory,
    stride_in_1x1: bool,
    num_groups: int,
    dilation: int = 1,
) -> nn.Sequential:
    """Blocks of stage ``res<index>``; only the first has a stride and a projection shortcut."""
    stride = 1 if index == 2 or dilation == 2 else 2
    blocks: list[nn.Module] = []
    for _ in range(num_blocks):
        if depth < 50:
            blocks.append(BasicBlock(in_channels, out_channels, stride=stride, norm=norm))
        else:
            blocks.append(
                BottleneckBlock(
                    in_channels,
                    out_channels,
                    bottleneck_channels=bottleneck_channels,
                    stride=stride,
                    norm=norm,
                    stride_in_1x1=stride_in_1x1,
                    num_groups=num_groups,
                    dilation=dilation,
                )
            )
        in_channels, stride = out_channels, 1
    return nn.Sequential(*blocks)


def _make_shortcut(in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> Conv2d | None:
    if in_channels == out_channels:
        return None
    return Conv2d(in_channels, out_channels, 1, stride, bias=False, norm=norm(out_channels))


@torch.no_grad()
def _init_convolutions(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, Conv2d):
            init_he(module)
