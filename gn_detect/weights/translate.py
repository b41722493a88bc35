"""Checkpoints of Detectron, torchvision, timm and mmdetection in detectron2's names, which are ours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from .checkpoint import Checkpoint
from .convention import TORCHVISION, InputConvention
from .names import caffe2 as caffe2_names
from .names import mmdetection as mmdetection_names
from .names import torchvision as torchvision_names

BACKBONE = "backbone.bottom_up."
"""Before the names of a backbone's layers, as in a model with an FPN."""


CLASSIFIER = re.compile(r"(stem\.)?(fc|linear)\.(weight|bias)")
"""Of ImageNet, as detectron2 names it in a file of a backbone."""


@dataclass
class Translation:
    """A checkpoint in our names.

    Attributes:
        tensors: by name; those of a backbone begin with ``backbone.bottom_up.``.
        scheme: whose names the file has: ``"detectron2"``, ``"Detectron"``, ``"torchvision"`` (and timm) or
            ``"mmdetection"``.
        convention: what the file says or implies about input; None where it does neither.
        changes: what was done to values, in words.
        left_out: names of the file that mean nothing to a detector, such as ImageNet's classifier.
    """

    tensors: dict[str, Tensor]
    scheme: str = "detectron2"
    convention: InputConvention | None = None
    changes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def is_detector(self) -> bool:
        """Return whether it has an RPN or heads, so is more than a backbone or another library's model."""
        return any(name.startswith(("proposal_generator.", "roi_heads.")) for name in self.tensors)

    @property
    def is_backbone(self) -> bool:
        """Return whether it has a detector's backbone, with heads or alone."""
        return any(name.startswith(BACKBONE) for name in self.tensors)


def translate(checkpoint: Checkpoint) -> Translation:
    """Tell whose names the tensors have, and give them ours.

    Sources of the names and of the order of classes: detectron2's ``checkpoint/c2_model_loading.py`` for
    Detectron's, and the state dicts of torchvision, timm and mmdetection.
    """
    names = checkpoint.tensors
    if _any_matches(names, r"(res_)?conv1_|res\d_\d+_branch|fpn_(inner_)?res\d|conv_rpn_|rpn_cls_logits_"):
        result = Translation({}, "Detectron")
        found: Iterable[str] = caffe2_names.translate(checkpoint, result.tensors, result.left_out)
        result.convention = caffe2_names.convention(checkpoint)
    elif _any_matches(
        names, r"backbone\.(layer\d\.|conv1\.)|neck\.|roi_head\.|rpn_head\.|bbox_head\.|shared_head\."
    ):
        result = Translation({}, "mmdetection")
        found = mmdetection_names.translate(checkpoint, result.tensors, result.left_out)
        result.convention = mmdetection_names.convention(checkpoint)
    elif _any_matches(names, r"backbone\.body\.|layer\d\.\d+\."):
        # mmdetection's backbones have torchvision's names, but for the norms of GN models.
        result = Translation({}, "mmdetection" if _any_matches(names, r"gn1\.") else "torchvision")
        found = torchvision_names.translate(checkpoint, result.tensors, result.left_out)
        result.convention = torchvision_names.convention(checkpoint)
    else:
        return _of_detectron2(checkpoint)
    result.changes = list(dict.fromkeys(found))
    result.convention = checkpoint.metadata.input or result.convention
    return result


def _of_detectron2(checkpoint: Checkpoint) -> Translation:
    """Names stay, but for a backbone alone, which detectron2 stores without a prefix."""
    names = list(checkpoint.tensors)
    left_out: list[str] = []
    prefix = ""
    if all(re.match(r"(stem|res\d|fc|linear)\.", name) for name in names):
        prefix = BACKBONE
        left_out = [name for name in names if CLASSIFIER.fullmatch(name)]
    convention = checkpoint.metadata.input
    if convention is None and checkpoint.metadata.author == "torchvision":
        convention = TORCHVISION
    tensors = {prefix + name: checkpoint.tensors[name] for name in names if name not in left_out}
    return Translation(tensors, convention=convention, left_out=left_out)


def _any_matches(names: Iterable[str], pattern: str) -> bool:
    expression = re.compile(pattern)
    return any(expression.match(name) for name in names)
