"""mmdetection's Faster and Mask R-CNN, before version 2 and since."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from ..checkpoint import Checkpoint
from ..convention import DETECTRON_GN, TORCHVISION, InputConvention
from ..mmdetection_config import refuse_unknown_convs
from .resnet import from_rules, from_torchvision, move_background

_LAYERS: list[tuple[str, str]] = [
    (r"neck\.lateral_convs\.(\d)\.conv\.(\w+)", "backbone.fpn_lateral{level}.{1}"),
    (r"neck\.lateral_convs\.(\d)\.(?:bn|gn)\.(\w+)", "backbone.fpn_lateral{level}.norm.{1}"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(\w+)", "backbone.fpn_output{level}.{1}"),
    (r"neck\.fpn_convs\.(\d)\.(?:bn|gn)\.(\w+)", "backbone.fpn_output{level}.norm.{1}"),
    (r"rpn_head\.rpn_conv\.(\w+)", "proposal_generator.rpn_head.conv.{0}"),
    (r"rpn_head\.rpn_cls\.(\w+)", "proposal_generator.rpn_head.objectness_logits.{0}"),
    (r"rpn_head\.rpn_reg\.(\w+)", "proposal_generator.rpn_head.anchor_deltas.{0}"),
    (r"bbox_head\.shared_convs\.(\d)\.conv\.(\w+)", "roi_heads.box_head.conv{next}.{1}"),
    (r"bbox_head\.shared_convs\.(\d)\.(?:bn|gn)\.(\w+)", "roi_heads.box_head.conv{next}.norm.{1}"),
    (r"bbox_head\.shared_fcs\.(\d)\.(\w+)", "roi_heads.box_head.fc{next}.{1}"),
    (r"bbox_head\.fc_cls\.(\w+)", "roi_heads.box_predictor.cls_score.{0}"),
    (r"bbox_head\.fc_reg\.(\w+)", "roi_heads.box_predictor.bbox_pred.{0}"),
    (r"mask_head\.convs\.(\d)\.conv\.(\w+)", "roi_heads.mask_head.mask_fcn{next}.{1}"),
    (r"mask_head\.convs\.(\d)\.(?:bn|gn)\.(\w+)", "roi_heads.mask_head.mask_fcn{next}.norm.{1}"),
    (r"mask_head\.upsample\.(\w+)", "roi_heads.mask_head.deconv.{0}"),
    (r"mask_head\.conv_logits\.(\w+)", "roi_heads.mask_head.predictor.{0}"),
]


def translate(checkpoint: Checkpoint, tensors: dict[str, Tensor], left_out: list[str]) -> Iterator[str]:
    """Fill ``tensors`` and ``left_out``, and yield the changes of values in words.

    Raises:
        UserError: the file's config has convolutions of an unknown kind.
    """
    refuse_unknown_convs(checkpoint)
    # Since version 2 the heads are in roi_head, and the background is the last class.
    background_first = any(name.startswith("bbox_head.") for name in checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        ours = _translated(name)
        if name.startswith("ema_"):  # buffers of a training hook
            left_out.append(name)
        elif ours is None:
            tensors[name] = tensor
        else:
            tensors[ours], change = move_background(ours, tensor) if background_first else (tensor, [])
            yield from change


def convention(checkpoint: Checkpoint) -> InputConvention:
    """Return the convention in the file's config; otherwise Detectron's for GN models, or torchvision's."""
    grouped = any(re.match(r"backbone\.(gn1|layer1\.0\.gn1)\.", name) for name in checkpoint.tensors)
    found = DETECTRON_GN if grouped else TORCHVISION
    text = checkpoint.metadata.mmdetection_config
    mean, std = (_numbers(text, key) for key in ("mean", "std"))
    order = re.search(r"(?:to_rgb|bgr_to_rgb)\s*=\s*(True|False)", text)
    if mean and std and order:
        found = replace(found, format="RGB" if order[1] == "True" else "BGR", pixel_mean=mean, pixel_std=std)
    if style := re.search(r"style\s*=\s*['\"](pytorch|caffe)['\"]", text):
        found = replace(found, stride_in_1x1=style[1] == "caffe")
    return found


def _numbers(text: str, key: str) -> tuple[float, ...] | None:
    found = re.search(rf"\b{key}\s*=\s*\[\s*([\d.]+)\s*,\s*([\d.]+)\s*,\s*([\d.]+)\s*\]", text)
    return None if found is None else tuple(float(number) for number in found.groups())


def _translated(name: str) -> str | None:
    plain = name.removeprefix("roi_head.")
    for part in ("backbone.", "shared_head."):  # the latter: res5 of a model without a pyramid
        if plain.startswith(part):
            ours = from_torchvision(plain.removeprefix(part))
            return None if ours is None else f"backbone.bottom_up.{ours}"
    return from_rules(_LAYERS, plain)
