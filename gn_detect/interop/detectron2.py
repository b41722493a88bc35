"""detectron2's models with our GroupNorm, our converter, our safe checkpoint files and our evaluation.

Models are those of ``detectron2.modeling.build_model``. Batches are its ``list[dict]`` with ``image``
(3, H, W) and, for evaluation, ``image_id``. Only :func:`fuse_relu` imports detectron2.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import layers
from ..convert import ConversionReport, calibrate, convert_norm
from ..data.coco.reader import load_coco
from ..errors import UserError
from ..evaluation import detections_to_coco, evaluate_kinds
from ..layers import GroupNorm
from ..modeling.paired_outputs import MASK_PROPOSALS, PROPOSALS
from ..structures import Detections
from ..weights import LoadReport, load_weights, norm_settings, save_weights

Batch = list[dict[str, Any]]


def fuse_relu(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every ``nn.GroupNorm`` by the fused one, with the ReLU and the shortcut where that is certain.

    That is certain in convolutions that hold their ReLU (the heads), and in ``BasicStem``, ``BasicBlock`` and
    ``BottleneckBlock`` themselves, whose forward is known. Subclasses of them and other blocks keep their own
    forward, and only the norm is fused. Parameters, their names and the function do not change.

    Args:
        model: any model built with detectron2's layers.
        inplace: change ``model``; its parameters stay the same objects.

    Raises:
        UserError: detectron2 is not installed.
    """
    try:
        from detectron2.layers import Conv2d
        from detectron2.modeling.backbone import resnet
    except ImportError as error:
        raise UserError("missing-package", "detectron2 is not installed here; see its INSTALL.md") from error
    fused = {getattr(resnet, name.removeprefix("Fused")): name for name in _FORWARDS}
    model = layers.fuse_relu(model, inplace=inplace)
    for module in model.modules():
        kind: Any = type(module)
        if kind in fused and all(_is_free(conv, Conv2d) for conv in _convolutions(module)):
            module.__class__ = __getattr__(fused[kind])
    return model


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Call :func:`fuse_relu`; the old name, which goes with the next release."""
    warnings.warn("fuse is renamed to fuse_relu", DeprecationWarning, stacklevel=2)
    return fuse_relu(model, inplace=inplace)


@cache
def __getattr__(name: str) -> Any:
    """Make ``FusedBasicBlock`` and the other subclasses with our forward at their first use.

    Their bases need the import of detectron2. Unpickling looks the classes up here as well.
    """
    if name not in _FORWARDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detectron2.modeling.backbone import resnet

    kind = getattr(resnet, name.removeprefix("Fused"))
    return type(name, (kind,), {"forward": _FORWARDS[name], "__module__": __name__})


def _convolutions(block: nn.Module) -> list[Any]:
    return [child for name, child in block.named_children() if name.startswith("conv")]


def _is_free(conv: Any, kind: Any) -> bool:
    """Return whether it is a plain convolution with a norm of ours. Our forward would skip its hooks."""
    return (
        type(conv) is kind
        and type(conv.norm) is GroupNorm
        and conv.activation is None
        and not layers.has_hooks(conv)
    )


def _convolve(conv: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return ``relu(norm(conv(x)) + residual)`` of a detectron2 ``Conv2d``."""
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    result: Tensor = conv.norm(y, residual, "relu")
    return result


def _stem(self: Any, x: Tensor) -> Tensor:
    return F.max_pool2d(_convolve(self.conv1, x), kernel_size=3, stride=2, padding=1)


def _basic_block(self: Any, x: Tensor) -> Tensor:
    shortcut = x if self.shortcut is None else self.shortcut(x)
    return _convolve(self.conv2, _convolve(self.conv1, x), shortcut)


def _bottleneck_block(self: Any, x: Tensor) -> Tensor:
    shortcut = x if self.shortcut is None else self.shortcut(x)
    return _convolve(self.conv3, _convolve(self.conv2, _convolve(self.conv1, x)), shortcut)


_FORWARDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "FusedBasicStem": _stem,
    "FusedBasicBlock": _basic_block,
    "FusedBottleneckBlock": _bottleneck_block,
}  # after the names of the classes in detectron2's modeling/backbone/resnet.py


def convert(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    steps: int = 400,
    *,
    progress: bool = True,
    **rule: Any,
) -> tuple[nn.Module, ConversionReport]:
    """Return a copy with GroupNorm in place of BN, SyncBN and FrozenBN, calibrated if there are batches.

    Args:
        model: a ``GeneralizedRCNN`` with box head; it does not change.
        batches: at least two of its own inputs without labels, such as those of
            ``build_detection_test_loader``.
        steps: steps of the calibration.
        progress: show a bar during the calibration.
        **rule: further arguments of :func:`gn_detect.convert_norm`, such as ``num_groups``.

    Returns:
        The model, in evaluation mode if it is calibrated, and the report.

    Raises:
        UserError: see :func:`gn_detect.convert_norm` and :func:`gn_detect.calibrate`; or there are batches
            and the model is no ``GeneralizedRCNN``.
    """
    converted, report = convert_norm(model, **rule)
    if batches is not None:
        _require_calibratable(model)
        calibrate(
            model, converted, list(batches), steps, outputs=paired_outputs, report=report, progress=progress
        )
    return converted, report


def paired_outputs(original: Any, converted: Any, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Run both models on the *original's* proposals, as :func:`gn_detect.modeling.paired_outputs` does.

    Args:
        original, converted: ``GeneralizedRCNN`` with ``StandardROIHeads``, ``CascadeROIHeads`` or
            ``Res5ROIHeads``.
        batch: inputs of both.
    """
    with torch.no_grad():
        images, features = _features(original, batch)
        found, _ = original.proposal_generator(images, features, None)
        by_stage = [[each[:PROPOSALS] for each in found]]
        expected = _dense_outputs(original, features)
        regions, labels = _region_outputs(original, features, by_stage, None)
        expected += regions
    _, features = _features(converted, batch)
    regions, _ = _region_outputs(converted, features, by_stage, labels)
    return list(zip(expected, _dense_outputs(converted, features) + regions, strict=True))


def _features(model: Any, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
    images = model.preprocess_image(batch)
    return images, model.backbone(images.tensor)


def _dense_outputs(model: Any, features: dict[str, Tensor]) -> list[Tensor]:
    rpn = model.proposal_generator
    logits, deltas = rpn.rpn_head([features[name] for name in rpn.in_features])
    return [*features.values(), *logits, *deltas]


def _region_outputs(
    model: Any, features: dict[str, Tensor], by_stage: list[list[Any]], labels: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Return logits and deltas of each stage, mask logits of each RoI's class, and the classes.

    ``by_stage`` has the proposals of the first stage; those of a cascade's others are added where they are
    missing.
    """
    heads = model.roi_heads
    levels = [features[name] for name in heads.in_features]
    standard = hasattr(heads, "box_pooler")
    cascade = isinstance(heads.box_predictor, nn.ModuleList)
    predictors = list(heads.box_predictor) if cascade else [heads.box_predictor]
    found: list[Tensor] = []
    proposals = [each.proposal_boxes for each in by_stage[0]]
    for stage, predictor in enumerate(predictors):
        boxes = [each.proposal_boxes for each in by_stage[stage]]
        if standard:
            head = heads.box_head[stage] if cascade else heads.box_head
            box_features = head(heads.box_pooler(levels, boxes))
        else:
            shared = heads._shared_roi_transform(levels, boxes)
            box_features = shared.mean(dim=(2, 3))
        logits, deltas = predictor(box_features)
        found += [logits, deltas]
        if len(by_stage) == stage + 1 < len(predictors):
            boxes = predictor.predict_boxes((logits, deltas), by_stage[-1])
            sizes = [each.image_size for each in by_stage[0]]
            by_stage.append(heads._create_proposals_from_boxes(boxes, sizes))
    if labels is None:
        labels = logits[:, :-1].argmax(1)  # the last is the background
    if heads.mask_on:
        device = logits.device
        with_mask = torch.cat([torch.arange(len(p), device=device) < MASK_PROPOSALS for p in proposals])
        if standard:
            names = heads.mask_in_features
            pooled = [p[:MASK_PROPOSALS] for p in proposals]
            shared = heads.mask_pooler([features[name] for name in names], pooled)
        else:
            shared = shared[with_mask]
        masks = heads.mask_head.layers(shared)
        row = torch.arange(len(masks), device=device)
        chosen = labels[with_mask] if masks.shape[1] > 1 else torch.zeros_like(row)
        found.append(masks[row, chosen][:, None])
    return found, labels


def _require_calibratable(model: nn.Module) -> None:
    heads = getattr(model, "roi_heads", None)
    if not (hasattr(heads, "box_pooler") or hasattr(heads, "_shared_roi_transform")):
        raise UserError(
            "unconvertible-model",
            f"{type(model).__name__} cannot be calibrated: it is no GeneralizedRCNN with StandardROIHeads or "
            "Res5ROIHeads; call gn_detect.calibrate with outputs of your own",
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("DeformConv", "ModulatedDeformConv") and next(module.parameters()).device.type == "cpu":
            raise UserError(
                "unconvertible-model",
                f"'{name}' cannot be calibrated on a CPU, where detectron2's {kind} has no gradient; move "
                "the model to a GPU, or its checkpoint through gn-detect convert --config-file --images",
            )


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write weights that ``DetectionCheckpointer`` and gn_detect read.

    Args:
        model: a model with detectron2's names.
        path: ``.pth``, ``.pkl`` or ``.safetensors``; only gn_detect reads the last.

    Raises:
        UserError: another ending, or the file cannot be written.
    """
    save_weights(path, model.state_dict(), norm_settings(model))


def load_checkpoint(model: nn.Module, path: str | Path) -> LoadReport:
    """Load any checkpoint that gn_detect reads, of detectron2 or another library, and run nothing from it.

    Raises:
        UserError: see :func:`gn_detect.load_weights`.
    """
    return load_weights(model, path)


def as_detections(instances: Any) -> Detections:
    """Convert detectron2's ``Instances`` of one image (``outputs["instances"]``), and move them to the CPU.

    Args:
        instances: has ``pred_boxes``, ``scores``, ``pred_classes`` and, for a model with masks,
            ``pred_masks`` (N, H, W) bool.
    """
    masks = instances.pred_masks if instances.has("pred_masks") else None
    return Detections(instances.pred_boxes.tensor, instances.scores, instances.pred_classes, masks).to("cpu")


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], annotations_json: str | Path, *, backend: str | None = None
) -> dict[str, dict[str, float]]:
    """Return COCO box and mask AP of a detectron2 model, by our evaluation.

    Args:
        model: a model such as ``DefaultPredictor(cfg).model``; its mode is restored.
        batches: inputs with ``image_id``, such as those of ``build_detection_test_loader(cfg, name)``.
        annotations_json: COCO's ground truth of these images. Labels are its category ids in ascending order,
            as in ``register_coco_instances``.
        backend: see :func:`gn_detect.evaluation.evaluate_kinds`.

    Returns:
        ``{"bbox": {"AP": ..., ...}, "segm": {...}}`` in percent; without ``segm`` for a model without masks.

    Raises:
        UserError: the annotations are wrong, or do not fit the images or classes.
    """
    categories = load_coco(Path(annotations_json), ("categories",))["categories"]
    category_ids = sorted(category["id"] for category in categories)
    results: list[dict[str, Any]] = []
    has_masks, training = True, model.training
    model.eval()
    try:
        for batch in batches:
            for given, output in zip(batch, model(batch), strict=True):
                found = as_detections(output["instances"])
                has_masks &= found.masks is not None
                if len(found) and int(found.labels.max()) >= len(category_ids):
                    raise UserError(
                        "num-classes-differ",
                        f"{annotations_json} has {len(category_ids)} categories, and the model found class "
                        f"{int(found.labels.max())}; give the annotations that it was made for",
                    )
                results += detections_to_coco(found, given["image_id"], category_ids)
    finally:
        model.train(training)
    kinds = ("bbox", "segm") if has_masks else ("bbox",)
    return evaluate_kinds(annotations_json, results, kinds, backend)
