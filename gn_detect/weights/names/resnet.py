"""Names of ResNet layers: Caffe2's and torchvision's (also timm's and mmdetection's) to detectron2's."""

from __future__ import annotations

import re

_CAFFE2_BRANCHES = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_CAFFE2_LEAVES = {
    "w": "weight",
    "b": "bias",
    "gn_s": "norm.weight",
    "gn_b": "norm.bias",
    "bn_s": "norm.weight",
    "bn_b": "norm.bias",
    "bn_gamma": "norm.weight",
    "bn_beta": "norm.bias",
    "bn_rm": "norm.running_mean",
    "bn_riv": "norm.running_var",  # a variance, whatever its name says
    "bn_running_mean": "norm.running_mean",
    "bn_running_var": "norm.running_var",
}
_LEAF = "|".join(sorted(_CAFFE2_LEAVES, key=len, reverse=True))
_CAFFE2_STEM = re.compile(rf"(?:res_)?conv1_({_LEAF})")
_CAFFE2_BLOCK = re.compile(rf"(res\d)_(\d+)_(branch1|branch2[abc])_({_LEAF})")

_STEM_NORM = re.compile(r"(?:bn|gn)1\.(\w+)")
_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(.+)")
_NORM = re.compile(r"(?:bn|gn)(\d)\.(\w+)")
_CONV = re.compile(r"conv(\d)\.weight")


def from_caffe2(name: str) -> str | None:
    """``res2_0_branch2a_gn_s`` -> ``res2.0.conv1.norm.weight``; None for what is no layer of a ResNet."""
    if stem := _CAFFE2_STEM.fullmatch(name):
        return f"stem.conv1.{_CAFFE2_LEAVES[stem[1]]}"
    if block := _CAFFE2_BLOCK.fullmatch(name):
        stage, index, branch, leaf = block.groups()
        return f"{stage}.{index}.{_CAFFE2_BRANCHES[branch]}.{_CAFFE2_LEAVES[leaf]}"
    return None


def caffe2_leaf(name: str, layer: str) -> str | None:
    """The end of our name for ``layer_gn_s`` and the like; None for another layer."""
    found = re.fullmatch(rf"{layer}_({_LEAF})", name)
    return None if found is None else _CAFFE2_LEAVES[found[1]]


def from_torchvision(name: str) -> str | None:
    """``layer1.0.bn1.weight`` -> ``res2.0.conv1.norm.weight``; None for what is no layer of a ResNet."""
    if name == "conv1.weight":
        return "stem.conv1.weight"
    if stem := _STEM_NORM.fullmatch(name):
        return f"stem.conv1.norm.{stem[1]}"
    block = _BLOCK.fullmatch(name)
    if block is None:
        return None
    stage, index, rest = f"res{int(block[1]) + 1}", block[2], block[3]
    if conv := _CONV.fullmatch(rest):
        return f"{stage}.{index}.conv{conv[1]}.weight"
    if norm := _NORM.fullmatch(rest):
        return f"{stage}.{index}.conv{norm[1]}.norm.{norm[2]}"
    if rest == "downsample.0.weight":
        return f"{stage}.{index}.shortcut.weight"
    if rest.startswith("downsample.1."):
        return f"{stage}.{index}.shortcut.norm.{rest.removeprefix('downsample.1.')}"
    return None
