"""Load a checkpoint into a model: all is compared first, and the model changes only when it fits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..text import printable
from .checkpoint import Checkpoint, read_checkpoint
from .convention import InputConvention, as_command_line
from .names.bit import is_bit
from .names.library import library_convention, refuse_other_padding, trunk_of, trunk_tensors
from .norm_settings import norms_of, refuse_lost_norms, refuse_other_groups, set_norm_eps
from .standardization import (
    conv_keys,
    differing_conv_keys,
    is_known,
    refuse_other_convs,
    set_conv_eps,
)
from .translate import BACKBONE, CLASSIFIER, Translation, translate

if TYPE_CHECKING:
    from ..config import Config

# Layers with output channels for each class; fine-tuning on other classes starts them afresh.
PREDICTORS = re.compile(
    r"^roi_heads\.(box_predictor\.(?:\d+\.)?(cls_score|bbox_pred)|mask_head\.predictor)\."
)
# Buffers that follow from the configuration, or count batches: absent or extra, they change no result.
BOOKKEEPING = re.compile(r"(^|\.)(num_batches_tracked|pixel_mean|pixel_std|cell_anchors\.\d+)$")
BACKBONE_SHARE = 0.9  # of a backbone's tensors; with fewer, most of the pretraining is lost
MATCHED_SHARE = 0.5  # of the model's tensors, or of the file's, must match for fine-tuning


@dataclass(frozen=True)
class Mismatch:
    """A tensor whose shapes disagree, or that does not fit for another ``reason``."""

    name: str
    file_shape: tuple[int, ...]
    model_shape: tuple[int, ...]
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name} is {self.reason}"
        return f"{self.name} is {self.file_shape} in the file and {self.model_shape} in the model"


@dataclass
class LoadReport:
    """The result of :func:`load_weights`; ``str(report)`` is a summary of a few lines.

    Attributes:
        path: the checkpoint.
        matched: names that were loaded.
        missing: names of the model that the file lacks; they keep their initial values.
        unexpected: names of the file that the model lacks; they were not read.
        mismatched: predictor layers of other classes; they keep their initial values.
        reshaped: names of tensors whose shapes differ by ones at the end, such as those of a linear layer in
            the model and of a 1x1 convolution in the file; they were loaded and are in ``matched``, too.
        ignored: buffers that change no result and were on one side only.
        converted: changes of values, such as moving the background's class, in words.
        scheme, left_out, convention: see :class:`Translation`.
    """

    path: Path
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    scheme: str = "detectron2"
    converted: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    convention: InputConvention | None = None

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        lines = [f"loaded {len(self.matched)} of {total} tensors from {self.path}"]
        if self.scheme != "detectron2":
            lines.append(f"  names of {self.scheme} translated")
        lines += [f"  {change}" for change in self.converted]
        if self.reshaped:
            lines.append(f"  {len(self.reshaped)} reshaped: {_some(self.reshaped)}")
        if self.mismatched:
            lines.append(f"  {len(self.mismatched)} start afresh, made for other classes:")
            lines += [f"    {mismatch}" for mismatch in self.mismatched]
        if self.missing:
            lines.append(f"  {len(self.missing)} not in the file, start afresh: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"  {len(self.unexpected)} in the file only, not used: {_some(self.unexpected)}")
        if self.left_out:
            lines.append(f"  {len(self.left_out)} are of no use to a detector: {_some(self.left_out)}")
        return "\n".join(map(printable, lines))


@torch.no_grad()
def load_weights(
    model: nn.Module,
    source: str | Path | Checkpoint,
    *,
    for_training: bool = False,
    config: Config | None = None,
    class_names: Sequence[str] | None = None,
) -> LoadReport:
    """Copy a checkpoint's tensors into the parameters and buffers that they belong to.

    Names of Detectron, torchvision, timm, BiT, mmdetection and tensorpack are translated. Values are cast to
    the model's types and devices. If the file has the eps of GroupNorms (see ``gn-detect convert
    --relative-eps``), the model gets it, whatever MODEL.GN.EPS is. If it has their numbers of groups, the
    model must have the same, and their eps is 1e-5 unless the file has another. If it says which weights are
    standardised (``MODEL.RESNETS.CONV``), they must be so in the model. When an error is raised the model is
    as it was.

    Args:
        model: names as in detectron2's state dicts.
        source: a file that :func:`read_checkpoint` reads, or its result.
        for_training: True for a starting point: tensors that are absent on one side are reported, and
            predictor layers of another number of classes start afresh; of a backbone 90% must be there. False
            for evaluation or resuming: every tensor of the model must be in the file, and the other way
            round, except for heads that the model lacks as a whole (a mask head when masks are switched off).
        config: of the model; its input must be that of the file.
        class_names: of the model by label. With ``for_training``, predictor layers of a file with as many
            other classes start afresh.

    Raises:
        UserError: the file cannot be read, belongs to another architecture, number of classes, kind of
            normalisation, convolution or number of groups, was trained with other input than the config has,
            or has values that are not finite. The message names the first keys and shapes, or the config keys
            to set.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    own = model.state_dict()
    translation = _translated(checkpoint, own, config)
    norms = norms_of(checkpoint, translation.tensors)
    groups, eps, convs = norms.group_norm_groups, norms.norm_eps, norms.weight_standardization
    checkpoint = replace(checkpoint, tensors=dict(translation.tensors))
    report = _compare(own, checkpoint)
    if for_training and class_names is not None:
        _drop_other_classes(report, checkpoint, list(class_names))
    report.scheme, report.converted = translation.scheme, translation.changes
    report.left_out, report.convention = translation.left_out, translation.convention
    _refuse_other_architecture(report, checkpoint, own)
    _refuse_other_norm(report, own)
    refuse_other_convs(model, checkpoint, convs, checkpoint.tensors, report.matched)
    _refuse_other_style(report, own)
    refuse_lost_norms(model, checkpoint, groups.keys() | eps.keys())
    fresh = {name.removesuffix(".weight") for name in report.missing}
    refuse_other_groups(model, checkpoint, {n: value for n, value in groups.items() if n not in fresh})
    if for_training:
        _refuse_poor_backbone(report, own)
    else:
        _refuse_incomplete(report, own)
    if config is not None and report.convention is not None:
        if keys := report.convention.differing_keys(config):
            raise UserError(
                "other-input",
                f"{report.path} was trained with other input than the config has, and would load and then "
                f"find little; add --fix-config, or set {as_command_line(keys)}",
            )
    _refuse_not_finite(report, checkpoint)
    for name in report.matched:
        own[name].copy_(checkpoint.tensors[name])
    if changed := set_norm_eps(model, {name: value for name, value in eps.items() if name not in fresh}):
        report.converted = [*report.converted, f"{len(changed)} norms have the file's eps: {_some(changed)}"]
    if changed := set_conv_eps(model, {name: found for name, found in convs.items() if name not in fresh}):
        change = f"{len(changed)} standardised weights have the file's eps: {_some(changed)}"
        report.converted = [*report.converted, change]
    return report


def implied_keys(cfg: Config, source: str | Path | Checkpoint) -> dict[str, Any]:
    """Return the config keys of input and convolutions that a checkpoint needs and ``cfg`` has otherwise.

    These are format, mean, deviation and stride, and the ``CONV`` keys.

    Raises:
        UserError: the file cannot be read.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
    translation = translate(checkpoint)
    convention = checkpoint.metadata.input or library_convention(cfg) or translation.convention
    keys = {} if convention is None else convention.differing_keys(cfg)
    if is_known(checkpoint):
        convs = norms_of(checkpoint, translation.tensors).weight_standardization
        keys |= differing_conv_keys(cfg, conv_keys(convs, translation.tensors))
    return keys


def _translated(checkpoint: Checkpoint, own: dict[str, Tensor], config: Config | None) -> Translation:
    """Give tensors the model's names. If most names fit as they are, they stay: any module may be loaded."""
    trunk = trunk_of(own)
    if trunk is not None and trunk_of(checkpoint.tensors) is None:  # a classifier, for a library's backbone
        if config is not None:
            refuse_other_padding(config, checkpoint)
        names = {name.removeprefix(trunk) for name in own if name.startswith(trunk)}
        tensors, left_out = trunk_tensors(checkpoint, names)
        tensors = {trunk + name: tensor for name, tensor in tensors.items()}
        published = None if config is None else library_convention(config)
        if tensors:
            convention = checkpoint.metadata.input or published
            scheme = "BiT" if is_bit(checkpoint.tensors) else "torchvision or timm"
            return Translation(tensors, scheme, convention, left_out=left_out)
    if len(own.keys() & checkpoint.stored) > len(own.keys() & checkpoint.tensors):
        checkpoint = replace(checkpoint, tensors=checkpoint.stored)  # the model has the file's wrapper, too
    if len(own.keys() & checkpoint.tensors) > len(checkpoint.tensors) / 2:
        left_out = [name for name in checkpoint.tensors if CLASSIFIER.fullmatch(name) and name not in own]
        tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in left_out}
        return Translation(tensors, convention=checkpoint.metadata.input, left_out=left_out)
    translation = translate(checkpoint)
    if not any(name.startswith("backbone.") for name in own):  # a backbone alone
        bare = {name.removeprefix(BACKBONE): tensor for name, tensor in translation.tensors.items()}
        return replace(translation, tensors=bare)
    has_pyramid = any(name.startswith(BACKBONE) for name in own)
    has_res5_head = any(name.startswith("roi_heads.res5.") for name in own)

    def place(name: str) -> str:
        if has_res5_head and name.startswith(f"{BACKBONE}res5."):
            return "roi_heads." + name.removeprefix(BACKBONE)
        return name if has_pyramid else re.sub(f"^{re.escape(BACKBONE)}", "backbone.", name)

    placed = {place(name): tensor for name, tensor in translation.tensors.items()}
    return replace(translation, tensors=placed)


def _compare(own: dict[str, Tensor], checkpoint: Checkpoint) -> LoadReport:
    report = LoadReport(checkpoint.path)
    for name, tensor in own.items():
        if name not in checkpoint.tensors:
            (report.ignored if BOOKKEEPING.search(name) else report.missing).append(name)
        elif _without_ones(checkpoint.tensors[name]) != _without_ones(tensor):
            shapes = tuple(checkpoint.tensors[name].shape), tuple(tensor.shape)
            report.mismatched.append(Mismatch(name, *shapes))
        else:
            report.matched.append(name)
            if checkpoint.tensors[name].shape != tensor.shape:
                report.reshaped.append(name)
                checkpoint.tensors[name] = checkpoint.tensors[name].reshape(tensor.shape)
    for name in checkpoint.tensors:
        if name not in own:
            (report.ignored if BOOKKEEPING.search(name) else report.unexpected).append(name)
    return report


def _without_ones(tensor: Tensor) -> list[int]:
    # The shape without the ones at its end.
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape


def _drop_other_classes(report: LoadReport, checkpoint: Checkpoint, class_names: list[str]) -> None:
    # With other classes of the same number, or in another order, the file's predictors mean nothing.
    found = checkpoint.metadata.class_names
    if len(found) != len(class_names) or found == class_names:
        return
    for name in [name for name in report.matched if PREDICTORS.search(name)]:
        report.matched.remove(name)
        shape = tuple(checkpoint.tensors[name].shape)
        report.mismatched.append(Mismatch(name, shape, shape, "of other classes"))


def _refuse_other_architecture(report: LoadReport, checkpoint: Checkpoint, own: dict[str, Tensor]) -> None:
    def is_of_classes(mismatch: Mismatch) -> bool:
        same_inputs = mismatch.file_shape[1:] == mismatch.model_shape[1:]
        return same_inputs and PREDICTORS.search(mismatch.name) is not None

    others = [mismatch for mismatch in report.mismatched if not is_of_classes(mismatch)]
    if others:
        raise UserError(
            "other-network",
            f"{report.path} does not fit the model: {others[0]}"
            + (f", and {len(others) - 1} more" if len(others) > 1 else "")
            + "; use the configuration that the checkpoint was trained with, or another checkpoint",
        )
    known = len(report.matched) + len(report.mismatched)
    if known < MATCHED_SHARE * min(len(own), len(checkpoint.tensors)) or not report.matched:
        raise UserError(
            "other-network",
            f"{report.path} is of another architecture, or names its tensors in another way: {known} of "
            f"the model's {len(own)} tensors are in it; the file has {_some(report.unexpected)}, the model "
            f"wants {_some(report.missing)}; give a checkpoint of this configuration with detectron2's names",
        )


def _refuse_poor_backbone(report: LoadReport, own: dict[str, Tensor]) -> None:
    def is_of_backbone(name: str) -> bool:
        # No classifier has the offsets of deformable convolutions, which begin at 0.
        is_extra = ".fpn_" in name or ".conv2_offset." in name
        return name.startswith("backbone.") and not is_extra and not BOOKKEEPING.search(name)

    wanted = [name for name in own if is_of_backbone(name)]
    missing = [name for name in report.missing if is_of_backbone(name)]
    if len(missing) > (1 - BACKBONE_SHARE) * len(wanted):
        raise UserError(
            "other-network",
            f"{report.path} has only {len(wanted) - len(missing)} of the backbone's {len(wanted)} tensors; "
            f"it lacks {_some(missing)}; give a checkpoint of this backbone, or set MODEL.RESNETS or "
            "MODEL.BACKBONE.MODEL as in it",
        )


def _refuse_other_norm(report: LoadReport, own: dict[str, Tensor]) -> None:
    # GroupNorm and BatchNorm have scales of the same name and shape, but of another meaning.
    matched = set(report.matched)
    for name in report.missing + report.unexpected:
        owner, _, leaf = name.rpartition(".")
        if leaf == "running_mean" and f"{owner}.weight" in matched:
            batch, group = ("the model", "the file") if name in own else ("the file", "the model")
            raise UserError(
                "other-norm",
                f"{report.path} was trained with another norm: {owner} is a BatchNorm in {batch} and "
                f"not in {group}; set MODEL.RESNETS.NORM, MODEL.BACKBONE.NORM and the other NORM keys as in "
                "training, or make a GroupNorm checkpoint of it with gn-detect convert",
            )


def _refuse_other_style(report: LoadReport, own: dict[str, Tensor]) -> None:
    # The tensors without the biases would load, and compute another function.
    matched = set(report.matched)
    for name in report.missing + report.unexpected:
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" and f"{owner}.norm.weight" in matched:
            style, place = ("detectron2", "the model") if name in own else ("tensorpack", "the file")
            raise UserError(
                "other-network",
                f"{report.path} has convolutions of another style: {owner} has a bias and a norm only "
                f"in {place}; set MODEL.CONV_STYLE {style}",
            )


def _refuse_incomplete(report: LoadReport, own: dict[str, Tensor]) -> None:
    if report.mismatched:
        classifiers = [mismatch for mismatch in report.mismatched if ".cls_score." in mismatch.name]
        first = [*classifiers, *report.mismatched][0]
        if classifiers:  # one output for each class, and the background
            remedy = (
                f"set MODEL.ROI_HEADS.NUM_CLASSES to {first.file_shape[0] - 1}, with data of these "
                f"categories; for other data train on from it first"
            )
        else:
            remedy = "set CLS_AGNOSTIC_BBOX_REG and CLS_AGNOSTIC_MASK as in training"
        raise UserError(
            "num-classes-differ", f"{report.path} was trained for other classes: {first}; {remedy}"
        )
    if report.missing:
        raise UserError(
            "other-network",
            f"{report.path} lacks {len(report.missing)} of the model's {len(own)} tensors, such as "
            f"{_some(report.missing)}; use the configuration that it was trained with",
        )
    extra = [name for name in report.unexpected if not _belongs_to_absent_head(name, own)]
    if extra:
        raise UserError(
            "other-network",
            f"{report.path} has {len(extra)} tensors that the model lacks, such as {_some(extra)}; "
            f"use the configuration that it was trained with",
        )


def _belongs_to_absent_head(name: str, own: dict[str, Tensor]) -> bool:
    # Such as ``roi_heads.mask_head.*`` in the file, and no ``roi_heads.mask_head`` in the model.
    parts = name.split(".")
    if parts[0] != "roi_heads" or len(parts) < 3 or not parts[1].endswith("_head"):
        return False
    return not any(key.startswith(f"roi_heads.{parts[1]}.") for key in own)


def _refuse_not_finite(report: LoadReport, checkpoint: Checkpoint) -> None:
    for name in report.matched:
        tensor = checkpoint.tensors[name]
        if tensor.is_floating_point() and tensor.itemsize == 1:
            tensor = tensor.float()  # PyTorch does not compute with 8 bits
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                "not-finite",
                f"{report.path}: '{name}' has values that are not finite, so training diverged; "
                f"use an earlier checkpoint",
            )


def _some(names: list[str], count: int = 2) -> str:
    """Return the first names, quoted, for a message of one line."""
    shown = ", ".join(f"'{name}'" for name in names[:count]) or "none"
    return shown + (", ..." if len(names) > count else "")
