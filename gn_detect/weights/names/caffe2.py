"""Detectron's Caffe2 blobs: ``res2_0_branch2a_w``, ``fpn_inner_res5_2_sum_w``, ``head_conv1_gn_s``, ..."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..convention import DETECTRON_GN, DETECTRON_MSRA, DETECTRON_RESNEXT, InputConvention, plain_text
from .resnet import caffe2_leaf, from_caffe2, move_background

_LAYERS: list[tuple[str, str]] = [
    (r"conv_rpn(?:_fpn\d)?", "proposal_generator.rpn_head.conv"),
    (r"rpn_cls_logits(?:_fpn\d)?", "proposal_generator.rpn_head.objectness_logits"),
    (r"rpn_bbox_pred(?:_fpn\d)?", "proposal_generator.rpn_head.anchor_deltas"),
    (r"fc6", "roi_heads.box_head.fc1"),
    (r"fc7", "roi_heads.box_head.fc2"),
    (r"cls_score", "roi_heads.box_predictor.cls_score"),
    (r"bbox_pred", "roi_heads.box_predictor.bbox_pred"),
    (r"conv5_mask", "roi_heads.mask_head.deconv"),
    (r"mask_fcn_logits", "roi_heads.mask_head.predictor"),
]
_NUMBERED: list[tuple[str, str]] = [
    (r"fpn_inner_res(\d)_\d+_sum(?:_lateral)?", "backbone.fpn_lateral{}"),
    (r"fpn_res(\d)_\d+_sum", "backbone.fpn_output{}"),
    (r"head_conv(\d+)", "roi_heads.box_head.conv{}"),
    (r"_(?:\[mask\]|mask)_fcn(\d+)", "roi_heads.mask_head.mask_fcn{}"),
]
_CLASSIFIER = re.compile(r"(pred|fc1000|last_out_L\d+)_[wb]")


def translate(checkpoint: Checkpoint, tensors: dict[str, Tensor], left_out: list[str]) -> Iterator[str]:
    """Fill ``tensors`` and ``left_out``, and yield the changes of values in words."""
    for name, tensor in checkpoint.tensors.items():
        ours = _translated(name)
        if name.endswith("_momentum") or (ours is None and _CLASSIFIER.fullmatch(name)):
            left_out.append(name)
        elif ours == "stem.conv1.bias":
            # The norm after the convolution cancels it; Detectron never reads it.
            left_out.append(name)
        elif ours is None:
            tensors[name] = tensor
        else:
            if ours.startswith(("stem.", "res")):
                ours = f"backbone.bottom_up.{ours}"
            tensors[ours], change = move_background(ours, tensor)
            yield from change
    yield from _complete_affine_norms(checkpoint, tensors)


def convention(checkpoint: Checkpoint) -> InputConvention:
    """Return BGR; the rest follows from the norm and from the groups of the 3x3 convolutions.

    A ResNeXt with whole BatchNorms is detectron2's copy, which wants a deviation; Detectron's has it folded.
    """
    names = checkpoint.tensors
    found = DETECTRON_GN if any("_gn_" in name for name in names) else DETECTRON_MSRA
    narrow, wide = names.get("res2_0_branch2b_w"), names.get("res2_0_branch2a_w")
    if narrow is not None and wide is not None and narrow.dim() == 4 and wide.dim() == 4:
        groups = len(wide) // max(1, narrow.shape[1])
        if groups > 1:
            whole = any(name.endswith(("_bn_running_mean", "_bn_rm")) for name in names)
            found = DETECTRON_RESNEXT if whole else replace(found, stride_in_1x1=False)
    text = plain_text(checkpoint.metadata.others, "cfg")
    stated = re.search(r"STRIDE_1X1:\s*(true|false)", text, re.IGNORECASE)
    return found if stated is None else replace(found, stride_in_1x1=stated[1].lower() == "true")


def _translated(name: str) -> str | None:
    ours = from_caffe2(name)
    if ours is not None:
        return ours
    for pattern, layer in _LAYERS:
        if leaf := caffe2_leaf(name, pattern):
            return f"{layer}.{leaf}"
    for pattern, layer in _NUMBERED:
        found = re.match(pattern, name)
        if found and (leaf := caffe2_leaf(name, re.escape(found[0]))):
            return f"{layer.format(found[1])}.{leaf}"
    return None


def _complete_affine_norms(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> list[str]:
    """Add mean 0 and variance 1 to scales and shifts that stand for a frozen BatchNorm, as detectron2 does.

    The eps that is added to that variance makes scales smaller by 5e-6 of themselves than in Detectron.
    """
    owners = [
        ours.removesuffix(".weight")
        for name in checkpoint.tensors
        if name.endswith("_bn_s") and (ours := f"backbone.bottom_up.{_translated(name)}") in tensors
    ]
    missing = [owner for owner in owners if f"{owner}.running_mean" not in tensors]
    for owner in missing:
        scale = tensors[f"{owner}.weight"]
        tensors[f"{owner}.running_mean"] = torch.zeros_like(scale)
        tensors[f"{owner}.running_var"] = torch.ones_like(scale)
    return [f"{len(missing)} scales and shifts made frozen BatchNorms"] if missing else []
