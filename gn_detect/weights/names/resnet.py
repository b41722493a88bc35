"""The parts that libraries share: names of ResNet layers, and class layers without the background.

Caffe2's names and torchvision's (also timm's and mmdetection's) become detectron2's.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

# COCO's 80 categories; torchvision's detectors have an output for each of 0 to 90.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]

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
    """Translate ``res2_0_branch2a_gn_s`` to ``res2.0.conv1.norm.weight``; None for other layers."""
    if stem := _CAFFE2_STEM.fullmatch(name):
        return f"stem.conv1.{_CAFFE2_LEAVES[stem[1]]}"
    if block := _CAFFE2_BLOCK.fullmatch(name):
        stage, index, branch, leaf = block.groups()
        return f"{stage}.{index}.{_CAFFE2_BRANCHES[branch]}.{_CAFFE2_LEAVES[leaf]}"
    return None


def caffe2_leaf(name: str, layer: str) -> str | None:
    """Return the end of our name for ``layer_gn_s`` and the like; None for another layer."""
    found = re.fullmatch(rf"{layer}_({_LEAF})", name)
    return None if found is None else _CAFFE2_LEAVES[found[1]]


def from_torchvision(name: str) -> str | None:
    """Translate ``layer1.0.bn1.weight`` to ``res2.0.conv1.norm.weight``; None for other layers."""
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


def from_rules(rules: list[tuple[str, str]], name: str) -> str | None:
    """Translate a name by the first rule that matches it; None without one.

    Args:
        rules: patterns, and our names as format strings: ``{0}`` and so on are the groups, and ``{level}``,
            ``{next}`` and ``{fc}`` follow from a number in the first group.
    """
    for pattern, ours in rules:
        if found := re.fullmatch(pattern, name):
            groups = found.groups()
            number = int(groups[0]) if groups[0].isdigit() else 0
            return ours.format(*groups, level=number + 2, next=number + 1, fc=number - 5)
    return None


def move_background(name: str, tensor: Tensor, *, coco_ids: bool = False) -> tuple[Tensor, list[str]]:
    """Convert a class layer whose first class is the background: logits get it last, the others lose it.

    Args:
        name: of the tensor, in our names.
        tensor: (K + 1, ...) logits, (4 (K + 1), ...) box deltas or (K + 1, ...) mask logits; class-agnostic
            box deltas, class-agnostic masks and other layers stay as they are.
        coco_ids: 91 classes are 0 to 90, of which :data:`COCO_IDS` stay; otherwise background and 90 others.

    Returns:
        The tensor, and the change in words.
    """
    if tensor.dim() == 0:  # of a damaged file
        return tensor, []
    if ".cls_score." in name:
        change = "background moved from the first class to the last"
        if coco_ids and len(tensor) == 91:
            return tensor[[*COCO_IDS, 0]], [f"{change}, and of 91 ids COCO's 80 categories taken"]
        return torch.cat([tensor[1:], tensor[:1]]), [change]
    if ".bbox_pred." in name and len(tensor) > 4 and len(tensor) % 4 == 0:
        rows = tensor.unflatten(0, (-1, 4))
        rows = rows[COCO_IDS] if coco_ids and len(rows) == 91 else rows[1:]
        return rows.flatten(0, 1), ["boxes of the background dropped"]
    if ".mask_head.predictor." in name and len(tensor) > 1:
        rows = tensor[COCO_IDS] if coco_ids and len(tensor) == 91 else tensor[1:]
        return rows, ["mask of the background dropped"]
    return tensor, []
