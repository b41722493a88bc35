"""tensorpack's ResNets, and its Faster, Mask and Cascade R-CNN with an FPN (examples/FasterRCNN).

Its convolutions are HWIO and its fully connected layers IO. The background is the first class of scores and
boxes, and masks have none. Box deltas, anchors and the order of flattening are detectron2's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from ..checkpoint import Checkpoint
from ..convention import TENSORPACK, InputConvention
from .resnet import from_rules, move_background

NAMES = r"conv0/W|group\d/block\d+/|fpn/|rpn/conv0/|fastrcnn/|cascade_rcnn_stage\d/|maskrcnn/"

_BLOCK = r"group(\d)/block(\d+)/(conv\d|convshortcut)"
_LEAVES = {
    "W": "weight",
    "b": "bias",
    "gamma": "weight",
    "beta": "bias",
    "mean/EMA": "running_mean",
    "variance/EMA": "running_var",
}
_LAYERS: list[tuple[str, str]] = [
    (r"fpn/lateral_1x1_c(\d)", "backbone.fpn_lateral{0}"),
    (r"fpn/gn_c(\d)", "backbone.fpn_lateral{0}.norm"),
    (r"fpn/posthoc_3x3_p(\d)", "backbone.fpn_output{0}"),
    (r"fpn/gn_p(\d)", "backbone.fpn_output{0}.norm"),
    (r"(rpn)/conv0", "proposal_generator.rpn_head.conv"),
    (r"(rpn)/class", "proposal_generator.rpn_head.objectness_logits"),
    (r"(rpn)/box", "proposal_generator.rpn_head.anchor_deltas"),
    (r"conv(\d)", "conv{next}"),
    (r"gn(\d)", "conv{next}.norm"),
    (r"(fc)", "fc1"),
    (r"fc([67])", "fc{fc}"),
    (r"maskrcnn/fcn(\d)", "roi_heads.mask_head.mask_fcn{next}"),
    (r"maskrcnn/gn(\d)", "roi_heads.mask_head.mask_fcn{next}.norm"),
    (r"(maskrcnn)/deconv", "roi_heads.mask_head.deconv"),
    (r"(maskrcnn)/conv", "roi_heads.mask_head.predictor"),
]
_BRANCHES = {"convshortcut": "shortcut"}
_OUTPUTS = {"class": "cls_score", "box": "bbox_pred"}
# ImageNet's classifier, and what a training leaves in its checkpoints.
_LEFT_OUT = re.compile(r"linear/[Wb]|global_step|learning_rate|.*/(Momentum|AccumGrad|EMA)|EMA/.*")


def translate(checkpoint: Checkpoint, tensors: dict[str, Tensor], left_out: list[str]) -> Iterator[str]:
    """Fill ``tensors`` and ``left_out``, and yield the changes of values in words."""
    for name, tensor in checkpoint.tensors.items():
        plain = name.removesuffix(":0")
        leaf = next((leaf for leaf in _LEAVES if plain.endswith(f"/{leaf}")), None)
        layer = None if leaf is None else _layer(plain.removesuffix(f"/{leaf}"))
        if layer is not None and leaf is not None:
            ours = f"{layer}.{_LEAVES[leaf]}"
            values = _in_our_layout(tensor) if leaf == "W" else tensor
            if ".box_predictor." in ours:
                values, change = move_background(ours, values)
                yield from change
            tensors[ours] = values
        elif _LEFT_OUT.fullmatch(plain):
            left_out.append(name)
        else:
            tensors[name] = tensor


def convention(checkpoint: Checkpoint) -> InputConvention:
    """Return BGR with ImageNet's mean and deviation, the stride on the 3x3."""
    return TENSORPACK


def _layer(name: str) -> str | None:
    """Translate ``group0/block0/conv1/gn`` to ``backbone.bottom_up.res2.0.conv1.norm``, or return None."""
    body, _, last = name.rpartition("/")
    norm = ".norm" if last in ("gn", "bn") else ""
    convolution = body if norm else name
    if convolution == "conv0":
        return f"backbone.bottom_up.stem.conv1{norm}"
    if block := re.fullmatch(_BLOCK, convolution):
        stage, index, layer = block.groups()
        return f"backbone.bottom_up.res{int(stage) + 2}.{index}.{_BRANCHES.get(layer, layer)}{norm}"
    if box := re.fullmatch(r"(?:fastrcnn|cascade_rcnn_stage(\d)(?:/head)?)/(.+)", name):
        stage = "" if box[1] is None else f".{int(box[1]) - 1}"
        outputs = box[2].removeprefix("outputs/")
        if outputs != box[2]:
            return f"roi_heads.box_predictor{stage}.{_OUTPUTS[outputs]}" if outputs in _OUTPUTS else None
        layer = from_rules(_LAYERS, box[2])
        return None if layer is None else f"roi_heads.box_head{stage}.{layer}"
    return from_rules(_LAYERS, name)


def _in_our_layout(weight: Tensor) -> Tensor:
    """Return HWIO as OIHW, and so the HWOI of an upsampling layer as PyTorch's IOHW; IO as OI."""
    if weight.dim() == 4:
        return weight.permute(3, 2, 0, 1)
    return weight.t() if weight.dim() == 2 else weight
