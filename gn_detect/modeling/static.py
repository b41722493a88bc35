"""The losses of a batch with fixed shapes: nothing waits for the device, and a CUDA graph can hold all of it.

The functions are those of :mod:`.rpn`, :mod:`.roi_heads` and :mod:`.matching`, with the same results for the
same random choice. Where those make tensors of as many rows as there are objects, proposals or samples, here
the rows are as many as there can be, and a mask says which are valid. A group norm of RoI features takes its
statistics from one RoI, so rows that are not valid change nothing; BatchNorm would see them
(:func:`refusal`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from ..ops import PaddedMasks, decode_boxes, encode_boxes, mask_targets, match_boxes_padded, pad_masks
from ..ops.kernels import kernels_run_on
from ..ops.roi_align_operator import LEVELS
from ..structures import Detections, Target
from .box_head import BoxPredictor, smooth_l1_sum
from .matching import label_boxes, take_rows
from .roi_heads import RoIHeads, mean_scores
from .rpn import RPN

if TYPE_CHECKING:
    from .mask_rcnn import MaskRCNN

OBJECTS = (100, 200, 400)  # rows of objects; beyond, multiples of the last

MOST_CLASSES = 300  # for detection: NMS of all classes at once takes 0.1 MB for each, with 1000 proposals


@dataclass
class PaddedTargets:
    """Ground truth of N images, each with room for M objects.

    Attributes:
        boxes: (N, M, 4) float32 ``xyxy`` in pixels of the network's input.
        labels: (N, M) int64.
        valid: (N, M) bool, the first rows of each image.
        sizes: (N, 2) float32 height and width of each image.
        masks: of N * M objects, or None.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    sizes: Tensor
    masks: PaddedMasks | None

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        own = {"boxes": self.boxes, "labels": self.labels, "valid": self.valid, "sizes": self.sizes}
        return own | (self.masks.tensors() if self.masks is not None else {})

    def with_tensors(self, tensors: dict[str, Tensor]) -> PaddedTargets:
        """Return the same record with the tensors of :meth:`tensors` replaced, such as by copies."""
        own = {name: tensors[name] for name in ("boxes", "labels", "valid", "sizes")}
        masks = self.masks
        if masks is not None:
            masks = replace(masks, **{name: tensors[name] for name in masks.tensors()})
        return replace(self, **own, masks=masks)


@dataclass
class RandomKeys:
    """Random numbers that decide which anchors and RoIs are sampled: those of the largest keys.

    Attributes:
        anchors: (N, A) float32 in [0, 1).
        rois: (N, P + M), of P proposals and M objects; (N, P) if objects are not added to the proposals.
    """

    anchors: Tensor
    rois: Tensor


def pad_targets(
    targets: Sequence[Target], sizes: Sequence[tuple[int, int]], padded: tuple[int, int], with_masks: bool
) -> PaddedTargets:
    """Return targets in fixed shapes on the CPU; ``sizes`` of images, and ``padded``, are height and width.

    Raises:
        ValueError: ``with_masks``, and a target has no masks.
    """
    most = max(map(len, targets), default=0)
    room = next((size for size in OBJECTS if most <= size), -(-most // OBJECTS[-1]) * OBJECTS[-1])
    boxes = torch.zeros(len(targets), room, 4)
    labels = torch.zeros(len(targets), room, dtype=torch.int64)
    valid = torch.zeros(len(targets), room, dtype=torch.bool)
    masks = []
    for n, target in enumerate(targets):
        count = len(target)
        boxes[n, :count], labels[n, :count], valid[n, :count] = target.boxes, target.labels, True
        if with_masks:
            if target.masks is None:
                raise ValueError("a model with a mask head needs targets with masks")
            masks += [*target.masks, *([[]] * (room - count))]
    collected = pad_masks(masks, padded) if with_masks else None
    return PaddedTargets(boxes, labels, valid, torch.tensor(sizes, dtype=torch.float32), collected)


def refusal(model: MaskRCNN) -> str | None:
    """Return why a model cannot run with fixed shapes, or None."""
    if model.device.type != "cuda":
        return f"MODEL.DEVICE is {model.device.type}"
    if not kernels_run_on(model.device):
        return "Triton, or an NVIDIA GPU of compute capability 8.0 or later, is missing"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms(True) excludes RoIAlign's kernels"
    if len(model.roi_heads.settings.in_features) > LEVELS:
        return f"MODEL.ROI_HEADS.IN_FEATURES has more than {LEVELS} levels"
    heads = model.roi_heads.modules()
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in heads):
        return "BatchNorm in the RoI heads takes statistics from all rows"
    return None


def losses(
    rpn: RPN,
    heads: RoIHeads,
    features: dict[str, Tensor],
    targets: PaddedTargets,
    keys: RandomKeys | None = None,
) -> dict[str, Tensor]:
    """Return the losses of :meth:`MaskRCNN.losses`; without ``keys``, PyTorch's random state chooses."""
    with record_function("rpn"):
        proposals, valid, found = rpn_losses(rpn, features, targets, keys.anchors if keys else None)
    with record_function("roi_heads"):
        return found | roi_losses(heads, features, proposals, valid, targets, keys.rois if keys else None)


def detect(
    rpn: RPN,
    heads: RoIHeads,
    features: dict[str, Tensor],
    sizes: Sequence[tuple[int, int]],
    with_masks: bool = True,
) -> list[Detections]:
    """Return :meth:`RoIHeads.detect`; the host waits once, for the numbers of detections."""
    levels = [features[name] for name in rpn.in_features]
    limits = torch.tensor(sizes, dtype=torch.float32, pin_memory=levels[0].is_cuda)
    limits = limits.to(levels[0].device, non_blocking=True)
    anchors = rpn.anchor_generator([f.shape[-2:] for f in levels])
    with record_function("rpn"):
        logits, deltas = rpn.rpn_head(levels)
        proposals, valid = rpn.select_padded_proposals(anchors, logits, deltas, limits)
    with record_function("roi_heads"):
        levels = heads.levels(features)
        predictors = heads.predictors
        by_stage: list[Tensor] = []
        for stage, predictor in enumerate(predictors):
            x, _ = heads.box_features(levels, list(proposals), stage)
            logit, delta = predictor(x)
            by_stage.append(predictor.scores(logit))
            if stage < len(heads.refined_ious):
                proposals = _refine(heads, stage, delta, proposals, limits)
        found = predictors[-1].detect_padded(mean_scores(by_stage), delta, proposals, valid, limits)
        boxes, scores, labels = found
        masks = None
        if heads.mask_head is not None and with_masks:
            x = heads.mask_features(levels, list(boxes))
            masks = heads.mask_head(x, labels.flatten()).sigmoid().unflatten(0, labels.shape)
        counts = (scores > -torch.inf).sum(1).tolist()
    return [
        Detections(boxes[n, :k], scores[n, :k], labels[n, :k], None if masks is None else masks[n, :k])
        for n, k in enumerate(counts)
    ]


def rpn_losses(
    rpn: RPN, features: dict[str, Tensor], targets: PaddedTargets, keys: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return (N, P, 4) proposals, best first, (N, P) which of them are valid, and the RPN's losses."""
    s = rpn.settings
    levels = [features[name] for name in rpn.in_features]
    by_level = rpn.anchor_generator([f.shape[-2:] for f in levels])
    anchors = torch.cat(by_level)
    logits, deltas = rpn.rpn_head(levels)
    with torch.no_grad():
        label, matched = _label_anchors(rpn, anchors, targets)
        chosen, positive, valid = sample(
            label, keys, s.batch_size_per_image, s.positive_fraction, background=0
        )
        proposals, is_proposal = rpn.select_padded_proposals(by_level, logits, deltas, targets.sizes)
        reference = anchors[chosen]
        truth = take_rows(targets.boxes, matched.gather(1, chosen))
        wanted = encode_boxes(reference.flatten(0, 1), truth.flatten(0, 1), s.bbox_reg_weights)
    with record_function("rpn_losses"):
        logit = torch.where(valid, torch.cat(logits, dim=1).gather(1, chosen), 0)
        # Autocast would widen logits, labels and weights one by one.
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        delta = take_rows(torch.cat(deltas, dim=1), chosen).flatten(0, 1)
        wanted, delta = (torch.where(positive.view(-1, 1), value, 0) for value in (wanted, delta))
        classification = F.binary_cross_entropy_with_logits(
            logit, positive.to(logit.dtype), valid.to(logit.dtype), reduction="sum"
        )
        localization = smooth_l1_sum(delta, wanted, s.smooth_l1_beta)
        weight = s.loss_weight / (s.batch_size_per_image * len(chosen))
        found = {
            "loss_rpn_cls": classification * weight,
            "loss_rpn_loc": localization * (weight * s.bbox_reg_loss_weight),
        }
    return proposals, is_proposal, found


def _label_anchors(rpn: RPN, anchors: Tensor, targets: PaddedTargets) -> tuple[Tensor, Tensor]:
    """Return (N, A) labels 1, 0 and -1, and the object that each anchor is matched to."""
    s = rpn.settings
    best, index, kept = match_boxes_padded(targets.boxes, targets.valid, anchors[None], keep_best=True)
    label = label_boxes(best, s.iou_thresholds, s.iou_labels, kept)
    if s.boundary_thresh >= 0:
        limit = targets.sizes.flip(1)[:, None] + s.boundary_thresh
        inside = (anchors[:, :2] >= -s.boundary_thresh).all(1) & (anchors[:, 2:] < limit).all(2)
        label.masked_fill_(~inside, -1)
    return label, index


def sample(
    label: Tensor, keys: Tensor | None, count: int, positive_fraction: float, background: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the foreground and background of the largest keys, foreground first.

    Args:
        label: (N, R) integer labels; -1 is ignored.
        keys: (N, R) in [0, 1), or None for random ones.
        count: samples of an image, K.
        positive_fraction: largest share of foreground; background fills the rest.
        background: the label of background.

    Returns:
        (N, K) int64 positions, and which of these are foreground, and which are samples at all.
    """
    if keys is None:
        keys = torch.rand(label.shape, device=label.device)
    most = int(count * positive_fraction)
    foreground, rest = (label != -1) & (label != background), label == background
    first = torch.where(foreground, keys, -1).topk(min(most, keys.shape[1])).indices
    second = torch.where(rest, keys, -1).topk(min(count, keys.shape[1])).indices
    num_first = foreground.sum(1, keepdim=True).clamp(max=most)
    num_second = torch.minimum(rest.sum(1, keepdim=True), count - num_first)
    row = torch.arange(count, device=keys.device).expand(len(keys), -1)
    positive = row < num_first
    first = first.gather(1, row.clamp(max=first.shape[1] - 1)) if most else row
    second = second.gather(1, (row - num_first).clamp(0, second.shape[1] - 1))
    return torch.where(positive, first, second), positive, row < num_first + num_second


def roi_losses(
    heads: RoIHeads,
    features: dict[str, Tensor],
    proposals: Tensor,
    valid: Tensor,
    targets: PaddedTargets,
    keys: Tensor | None,
) -> dict[str, Tensor]:
    """Return the losses of :meth:`RoIHeads.losses` for (N, P, 4) proposals, of which (N, P) are valid."""
    s = heads.settings
    levels = heads.levels(features)
    with torch.no_grad():
        rois = _sample_rois(heads, proposals, valid, targets, keys)
    found: dict[str, Tensor] = {}
    of_stage = rois
    for stage, predictor in enumerate(heads.predictors):
        x, shared = heads.box_features(levels, list(of_stage.boxes), stage)
        logits, deltas = predictor(x)
        with record_function("roi_losses"):
            parts = _box_losses(predictor, logits, deltas, of_stage)
        found |= {heads.loss_name(name, stage): loss for name, loss in parts.items()}
        if stage < len(heads.refined_ious):
            with torch.no_grad():
                of_stage = _refined_rois(heads, stage, deltas, of_stage, targets)
    if heads.mask_head is None or targets.masks is None:
        return found
    most = int(s.batch_size_per_image * s.positive_fraction)
    boxes, labels, matched, positive = (
        value[:, :most] for value in (rois.boxes, rois.labels, rois.matched, rois.positive)
    )
    # Background has no mask target, and is not trained to be finite.
    boxes = torch.where(positive[..., None], boxes, 0)
    if shared is None:
        x = heads.mask_features(levels, list(boxes))
    else:
        x = shared.view(*rois.labels.shape, *shared.shape[1:])[:, :most].flatten(0, 1)
    masks = heads.mask_head(x, labels.clamp(max=s.num_classes - 1).flatten())
    with record_function("roi_losses"):
        row = torch.arange(len(boxes), device=boxes.device)[:, None] * targets.labels.shape[1]
        wanted = mask_targets(targets.masks, (matched + row).flatten(), boxes.flatten(0, 1), masks.shape[-1])
        weight = positive.flatten()[:, None, None].to(masks.dtype)
        entropy = F.binary_cross_entropy_with_logits(masks, wanted.to(masks.dtype), weight, reduction="sum")
        found["loss_mask"] = entropy / (positive.sum().clamp(min=1) * masks.shape[-1] ** 2)
    return found


@dataclass
class PaddedRoIs:
    """K RoIs of each of N images, foreground first in the first stage.

    Attributes:
        boxes: (N, K, 4).
        labels: (N, K) class, ``num_classes`` for background and padding.
        matched: (N, K) object.
        truth: (N, K, 4) its box.
        positive, valid: (N, K) bool.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    truth: Tensor
    positive: Tensor
    valid: Tensor


def _sample_rois(
    heads: RoIHeads, proposals: Tensor, valid: Tensor, targets: PaddedTargets, keys: Tensor | None
) -> PaddedRoIs:
    s = heads.settings
    if s.proposal_append_gt:
        proposals, valid = torch.cat([proposals, targets.boxes], 1), torch.cat([valid, targets.valid], 1)
    background = s.num_classes
    best, index, _ = match_boxes_padded(targets.boxes, targets.valid, proposals, keep_best=False)
    label = label_boxes(best, s.iou_thresholds, s.iou_labels)
    classes = targets.labels.gather(1, index)
    classes = torch.where(label == 0, background, classes)
    classes = torch.where((label == -1) | ~valid, -1, classes)
    chosen, positive, used = sample(classes, keys, s.batch_size_per_image, s.positive_fraction, background)
    matched = index.gather(1, chosen)
    return PaddedRoIs(
        torch.where(used[..., None], take_rows(proposals, chosen), 0),
        torch.where(positive, classes.gather(1, chosen), background),
        matched,
        take_rows(targets.boxes, matched),
        positive,
        used,
    )


def _refine(heads: RoIHeads, stage: int, deltas: Tensor, boxes: Tensor, sizes: Tensor) -> Tensor:
    """Return :meth:`RoIHeads.refine` for (N, K, 4) boxes of images with (N, 2) sizes."""
    found = decode_boxes(deltas, boxes.flatten(0, 1), heads.predictors[stage].box.bbox_reg_weights)
    found = torch.where(found.isfinite().all(1, keepdim=True), found, 0).view(boxes.shape)
    return torch.minimum(found.clamp(min=0), sizes.flip(1).repeat(1, 2)[:, None])


def _refined_rois(
    heads: RoIHeads, stage: int, deltas: Tensor, rois: PaddedRoIs, targets: PaddedTargets
) -> PaddedRoIs:
    """Return the RoIs of the next stage, matched anew; those that this stage made empty become padding."""
    boxes = _refine(heads, stage, deltas, rois.boxes, targets.sizes)
    valid = rois.valid & (boxes[..., 2:] > boxes[..., :2]).all(-1)
    boxes = torch.where(valid[..., None], boxes, 0)
    best, matched, _ = match_boxes_padded(targets.boxes, targets.valid, boxes, keep_best=False)
    positive = valid & (label_boxes(best, (heads.refined_ious[stage],), (0, 1)) == 1)
    labels = torch.where(positive, targets.labels.gather(1, matched), heads.settings.num_classes)
    return PaddedRoIs(boxes, labels, matched, take_rows(targets.boxes, matched), positive, valid)


def _box_losses(
    predictor: BoxPredictor, logits: Tensor, deltas: Tensor, rois: PaddedRoIs
) -> dict[str, Tensor]:
    """See :meth:`BoxPredictor.losses`."""
    settings = predictor.box
    labels, positive, valid = rois.labels.flatten(), rois.positive.view(-1, 1), rois.valid.flatten()
    total = valid.sum().clamp(min=1)
    if deltas.shape[1] > 4:
        column = labels.clamp(max=predictor.heads.num_classes - 1)[:, None, None].expand(-1, 1, 4)
        deltas = deltas.view(len(deltas), -1, 4).gather(1, column)[:, 0]
    with torch.no_grad():
        wanted = encode_boxes(rois.boxes.flatten(0, 1), rois.truth.flatten(0, 1), settings.bbox_reg_weights)
    wanted, deltas = (torch.where(positive, value, 0) for value in (wanted, deltas))
    ignored = -100
    classification = predictor.classification_loss(logits, torch.where(valid, labels, ignored), ignored)
    regression = smooth_l1_sum(deltas, wanted, settings.smooth_l1_beta)
    return {
        "loss_cls": classification / total,
        "loss_box_reg": regression / total * settings.bbox_reg_loss_weight,
    }
