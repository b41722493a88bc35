"""torchvision's and timm's ResNets, and torchvision's Faster and Mask R-CNN, versions 1 and 2."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from ..checkpoint import Checkpoint
from ..convention import DETECTRON_GN, TORCHVISION, InputConvention
from .resnet import from_rules, from_torchvision, move_background

_HEADS: list[tuple[str, str]] = [
    (r"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?(weight|bias)", "backbone.fpn_lateral{level}.{1}"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?(weight|bias)", "backbone.fpn_output{level}.{1}"),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.1\.(\w+)", "backbone.fpn_lateral{level}.norm.{1}"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.1\.(\w+)", "backbone.fpn_output{level}.norm.{1}"),
    (r"rpn\.head\.conv\.(weight|bias)", "proposal_generator.rpn_head.conv.{0}"),
    (r"rpn\.head\.conv\.(\d)\.0\.(weight|bias)", "proposal_generator.rpn_head.conv.conv{0}.{1}"),
    (r"rpn\.head\.cls_logits\.(\w+)", "proposal_generator.rpn_head.objectness_logits.{0}"),
    (r"rpn\.head\.bbox_pred\.(\w+)", "proposal_generator.rpn_head.anchor_deltas.{0}"),
    (r"roi_heads\.box_head\.fc([67])\.(\w+)", "roi_heads.box_head.fc{fc}.{1}"),
    (r"roi_heads\.box_head\.(\d)\.0\.(weight|bias)", "roi_heads.box_head.conv{next}.{1}"),
    (r"roi_heads\.box_head\.(\d)\.1\.(\w+)", "roi_heads.box_head.conv{next}.norm.{1}"),
    (r"roi_heads\.box_head\.\d\.(weight|bias)", "roi_heads.box_head.fc1.{0}"),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.(\w+)", "roi_heads.mask_head.mask_fcn{0}.{1}"),
    (r"roi_heads\.mask_head\.(\d)\.0\.(weight|bias)", "roi_heads.mask_head.mask_fcn{next}.{1}"),
    (r"roi_heads\.mask_head\.(\d)\.1\.(\w+)", "roi_heads.mask_head.mask_fcn{next}.norm.{1}"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(\w+)", "roi_heads.mask_head.deconv.{0}"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(\w+)", "roi_heads.mask_head.predictor.{0}"),
]
FROZEN_EPS = 1e-5  # of our frozen BatchNorm

_CLASSIFIER = re.compile(r"(fc|head\.fc|classifier)\.(weight|bias)")


def translate(checkpoint: Checkpoint, tensors: dict[str, Tensor], left_out: list[str]) -> Iterator[str]:
    """Fill ``tensors`` and ``left_out``, and yield the changes of values in words."""
    names = checkpoint.tensors
    deep_rpn = "rpn.head.conv.1.0.weight" in names
    for name, tensor in names.items():
        if _CLASSIFIER.fullmatch(name):
            left_out.append(name)
        elif ours := from_torchvision(name.removeprefix("backbone.body.")):
            tensors[f"backbone.bottom_up.{ours}"] = tensor
        else:
            ours = from_rules(_HEADS, name) or name
            if not deep_rpn:
                ours = ours.replace(".rpn_head.conv.conv0.", ".rpn_head.conv.")
            tensors[ours], change = move_background(ours, tensor, coco_ids=True)
            yield from change
    yield from _fold_eps(checkpoint, tensors)


def convention(checkpoint: Checkpoint) -> InputConvention:
    """Return RGB with ImageNet's mean and deviation, the stride on the 3x3."""
    # mmdetection's copies of Detectron's GN backbones have torchvision's names, but for the norms.
    if any(re.match(r"gn1\.|layer1\.0\.gn1\.", name) for name in checkpoint.tensors):
        return DETECTRON_GN
    return TORCHVISION


def computes_with_eps_0(checkpoint: Checkpoint) -> bool:
    """Return whether these are torchvision's published detectors of version 1, whose BatchNorms have eps 0.

    Those with MobileNetV3, and the trained BatchNorms of version 2, have another.
    """
    names = checkpoint.tensors
    classes = names.get("roi_heads.box_predictor.cls_score.bias")
    anchors = names.get("head.classification_head.cls_logits.bias")  # RetinaNet's, nine in each place
    published = (classes is not None and len(classes) == 91) or (anchors is not None and len(anchors) == 819)
    normed = any(re.match(r"backbone\.fpn\.\w+\.\d\.1\.|head\.\w+\.conv\.0\.1\.", name) for name in names)
    return published and not normed and "backbone.body.layer1.0.bn1.running_var" in names


def _fold_eps(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> list[str]:
    # With the eps of our frozen BatchNorm their function would differ.
    if not computes_with_eps_0(checkpoint):
        return []
    names = [name for name in tensors if name.endswith(".running_var")]  # one at least
    for name in names:
        tensors[name] = tensors[name] - FROZEN_EPS
    return [f"eps 0 of torchvision's published detectors folded into {len(names)} frozen BatchNorms"]
