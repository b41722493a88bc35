"""Checkpoints of other libraries in detectron2's names, which are ours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType

from torch import Tensor

from .checkpoint import Checkpoint
from .convention import TORCHVISION, InputConvention
from .names import caffe2, mmdetection, tensorpack, torchvision

BACKBONE = "backbone.bottom_up."  # prefix of a backbone's layers, as in a model with an FPN
CLASSIFIER = re.compile(r"(stem\.)?(fc|linear)\.(weight|bias)")  # ImageNet's, in detectron2's backbone files


@dataclass
class Translation:
    """A checkpoint in our names.

    Attributes:
        tensors: by name; those of a backbone begin with ``backbone.bottom_up.``.
        scheme: the library of the file's names: ``"detectron2"``, ``"Detectron"``, ``"torchvision"`` (and
            timm), ``"mmdetection"`` or ``"tensorpack"``.
        convention: the input that the file states or implies; None where it does neither.
        changes: changes of values, in words.
        left_out: names of the file that are of no use to a detector, such as ImageNet's classifier.
    """

    tensors: dict[str, Tensor]
    scheme: str = "detectron2"
    convention: InputConvention | None = None
    changes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def is_detector(self) -> bool:
        """Return whether it has an RPN or heads."""
        return any(name.startswith(("proposal_generator.", "roi_heads.")) for name in self.tensors)

    @property
    def is_backbone(self) -> bool:
        """Return whether it has a detector's backbone, with heads or alone."""
        return any(name.startswith(BACKBONE) for name in self.tensors)


def translate(checkpoint: Checkpoint) -> Translation:
    """Recognise the library by the names of the tensors, and give them ours.

    Sources of the names and of the order of classes: detectron2's ``checkpoint/c2_model_loading.py`` for
    Detectron's, the state dicts of torchvision, timm and mmdetection, and ``examples/FasterRCNN`` of
    tensorpack.
    """
    names = checkpoint.tensors
    library: ModuleType
    if _any_matches(names, r"(res_)?conv1_|res\d_\d+_branch|fpn_(inner_)?res\d|conv_rpn_|rpn_cls_logits_"):
        scheme, library = "Detectron", caffe2
    elif _any_matches(
        names, r"backbone\.(layer\d\.|conv1\.)|neck\.|roi_head\.|rpn_head\.|bbox_head\.|shared_head\."
    ):
        scheme, library = "mmdetection", mmdetection
    elif _any_matches(names, r"backbone\.body\.|layer\d\.\d+\."):
        # mmdetection's backbones have torchvision's names, but for the norms of GN models.
        scheme = "mmdetection" if _any_matches(names, r"gn1\.") else "torchvision"
        library = torchvision
    elif _any_matches(names, tensorpack.NAMES):
        scheme, library = "tensorpack", tensorpack
    else:
        return _translate_detectron2(checkpoint)
    result = Translation({}, scheme)
    changes = library.translate(checkpoint, result.tensors, result.left_out)
    result.changes = list(dict.fromkeys(changes))
    result.convention = checkpoint.metadata.input or library.convention(checkpoint)
    return result


def _translate_detectron2(checkpoint: Checkpoint) -> Translation:
    # Only a backbone alone gets a prefix: detectron2 stores it without one.
    names = list(checkpoint.tensors)
    is_backbone = all(re.match(r"(stem|res\d|fc|linear)\.", name) for name in names)
    prefix = BACKBONE if is_backbone else ""
    left_out = [name for name in names if is_backbone and CLASSIFIER.fullmatch(name)]
    convention = checkpoint.metadata.input
    if convention is None and checkpoint.metadata.author == "torchvision":
        convention = TORCHVISION
    tensors = {prefix + name: checkpoint.tensors[name] for name in names if name not in left_out}
    return Translation(tensors, convention=convention, left_out=left_out)


def _any_matches(names: Iterable[str], pattern: str) -> bool:
    return any(re.match(pattern, name) for name in names)
