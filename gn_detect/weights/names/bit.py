"""BiT's published ``.npz`` files (Kolesnikov et al. 2020, arXiv 1912.11370) in the names of timm's ResNetV2.

Names are those of google-research/big_transfer; kernels are (H, W, I, O).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

_FIRST = "resnet/root_block/standardized_conv2d/kernel"
_OTHERS = {
    _FIRST: "stem.conv.weight",
    "resnet/group_norm/gamma": "norm.weight",
    "resnet/group_norm/beta": "norm.bias",
    "resnet/head/conv2d/kernel": "head.fc.weight",
    "resnet/head/conv2d/bias": "head.fc.bias",
}
_LEAVES = {
    "standardized_conv2d/kernel": "conv{}.weight",
    "group_norm/gamma": "norm{}.weight",
    "group_norm/beta": "norm{}.bias",
}
_BLOCK = re.compile(r"resnet/block(\d+)/unit(\d+)/([abc])/(.+)")


def is_bit(names: Collection[str]) -> bool:
    """Return whether these are the names of a BiT file."""
    return _FIRST in names


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with timm's names and layout, kernels as (O, I, H, W); unknown names stay."""
    return {
        _translated(name): tensor.permute(3, 2, 0, 1).contiguous() if tensor.dim() == 4 else tensor
        for name, tensor in tensors.items()
    }


def _translated(name: str) -> str:
    if name in _OTHERS:
        return _OTHERS[name]
    block = _BLOCK.fullmatch(name)
    if block is None:
        return name
    stage, unit, layer, leaf = block.groups()
    place = f"stages.{int(stage) - 1}.blocks.{int(unit) - 1}."
    if leaf == "proj/standardized_conv2d/kernel":
        return f"{place}downsample.conv.weight"
    return place + _LEAVES[leaf].format("abc".index(layer) + 1) if leaf in _LEAVES else name
