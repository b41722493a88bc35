"""Second stage: RoIs are sampled, pooled, classified, refined and segmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..structures import Detections, Target
from .box_head import BoxHead, BoxPredictor
from .mask_head import MaskHead, mask_loss
from .matching import match_boxes, sample
from .roi_pooling import RoIPooler


@dataclass(frozen=True)
class SamplingSettings:
    """How RoIs are chosen for training; the names are those of detectron2's ``MODEL.ROI_HEADS`` keys."""

    num_classes: int
    batch_size_per_image: int
    positive_fraction: float
    iou_thresholds: tuple[float, ...]
    iou_labels: tuple[int, ...]
    proposal_append_gt: bool


@dataclass
class SampledRoIs:
    """RoIs of one image with their ground truth, foreground first.

    Attributes:
        boxes: (R, 4) ``xyxy`` in input pixels.
        labels: (R,) class, ``num_classes`` for background.
        matched: (R,) index of the object that each RoI overlaps most; 0 in an image without objects.
        truth: (R, 4) that object's box.
        num_foreground: the first so many rows are foreground.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    truth: Tensor
    num_foreground: int


@torch.no_grad()
def sample_rois(proposals: Tensor, target: Target, settings: SamplingSettings) -> SampledRoIs:
    """Match (P, 4) proposals of one image with its objects and take a random sample of both kinds."""
    if settings.proposal_append_gt:
        proposals = torch.cat([proposals, target.boxes])
    background = settings.num_classes
    index, label = match_boxes(target.boxes, proposals, settings.iou_thresholds, settings.iou_labels)
    classes = target.labels[index] if len(target) else torch.full_like(index, background)
    classes = torch.where(label == 0, background, torch.where(label == -1, -1, classes))
    foreground, rest = sample(classes, settings.batch_size_per_image, settings.positive_fraction, background)
    chosen = torch.cat([foreground, rest])
    boxes, matched = proposals[chosen], index[chosen]
    truth = target.boxes[matched] if len(target) else boxes
    return SampledRoIs(boxes, classes[chosen], matched, truth, len(foreground))


class StandardRoIHeads(nn.Module):
    """Box and mask branches with poolers of their own (FPN and C5 models).

    Args:
        in_features: levels to pool from.
        box_pooler, box_head, box_predictor: the box branch.
        mask_pooler, mask_head: the mask branch, or None.
        sampling: how RoIs are chosen for training.
    """

    def __init__(
        self,
        in_features: Sequence[str],
        box_pooler: RoIPooler,
        box_head: BoxHead,
        box_predictor: BoxPredictor,
        mask_pooler: RoIPooler | None,
        mask_head: MaskHead | None,
        sampling: SamplingSettings,
    ) -> None:
        super().__init__()
        self.in_features = tuple(in_features)
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head
        self.sampling = sampling

    def losses(
        self, features: dict[str, Tensor], proposals: Sequence[Tensor], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """``loss_cls``, ``loss_box_reg`` and, with masks, ``loss_mask``."""
        levels = [features[name] for name in self.in_features]
        rois = [sample_rois(p, t, self.sampling) for p, t in zip(proposals, targets, strict=True)]
        x = self.box_head(self.box_pooler(levels, [r.boxes for r in rois]))
        losses = _box_losses(self.box_predictor, x, rois)
        if self.mask_head is not None and self.mask_pooler is not None:
            x = self.mask_pooler(levels, [r.boxes[: r.num_foreground] for r in rois])
            losses["loss_mask"] = _mask_loss(self.mask_head, x, rois, targets)
        return losses

    def detect(
        self, features: dict[str, Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Detections in input pixels; ``masks`` are (D, S, S) probabilities inside the boxes."""
        levels = [features[name] for name in self.in_features]
        x = self.box_head(self.box_pooler(levels, proposals))
        found = _detect_boxes(self.box_predictor, x, proposals, sizes)
        if self.mask_head is not None and self.mask_pooler is not None:
            _add_masks(self.mask_head, self.mask_pooler(levels, [d.boxes for d in found]), found)
        return found


class Res5RoIHeads(nn.Module):
    """C4 models: the RoIs' features go through ``res5``, which both branches share (ResNet, appendix A)."""

    def __init__(
        self,
        in_features: Sequence[str],
        pooler: RoIPooler,
        res5: nn.Sequential,
        box_predictor: BoxPredictor,
        mask_head: MaskHead | None,
        sampling: SamplingSettings,
    ) -> None:
        super().__init__()
        self.in_features = tuple(in_features)
        self.pooler = pooler
        self.res5 = res5
        self.box_predictor = box_predictor
        self.mask_head = mask_head
        self.sampling = sampling

    def losses(
        self, features: dict[str, Tensor], proposals: Sequence[Tensor], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """See :meth:`StandardRoIHeads.losses`; the mask branch reuses the foreground's box features."""
        levels = [features[name] for name in self.in_features]
        rois = [sample_rois(p, t, self.sampling) for p, t in zip(proposals, targets, strict=True)]
        x = self.res5(self.pooler(levels, [r.boxes for r in rois]))
        losses = _box_losses(self.box_predictor, x.mean(dim=(2, 3)), rois)
        if self.mask_head is not None:
            parts = x.split([len(r.boxes) for r in rois])
            x = torch.cat([part[: r.num_foreground] for part, r in zip(parts, rois, strict=True)])
            losses["loss_mask"] = _mask_loss(self.mask_head, x, rois, targets)
        return losses

    def detect(
        self, features: dict[str, Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """See :meth:`StandardRoIHeads.detect`."""
        levels = [features[name] for name in self.in_features]
        x = self.res5(self.pooler(levels, proposals)).mean(dim=(2, 3))
        found = _detect_boxes(self.box_predictor, x, proposals, sizes)
        if self.mask_head is not None:
            _add_masks(self.mask_head, self.res5(self.pooler(levels, [d.boxes for d in found])), found)
        return found


def _box_losses(predictor: BoxPredictor, x: Tensor, rois: Sequence[SampledRoIs]) -> dict[str, Tensor]:
    logits, deltas = predictor(x)
    with record_function("roi_losses"):
        return predictor.losses(
            logits,
            deltas,
            torch.cat([r.boxes for r in rois]),
            torch.cat([r.truth for r in rois]),
            torch.cat([r.labels for r in rois]),
        )


def _mask_loss(head: MaskHead, x: Tensor, rois: Sequence[SampledRoIs], targets: Sequence[Target]) -> Tensor:
    logits = head(x, torch.cat([r.labels[: r.num_foreground] for r in rois]))
    boxes = [r.boxes[: r.num_foreground] for r in rois]
    with record_function("roi_losses"):
        return mask_loss(logits, boxes, [r.matched[: r.num_foreground] for r in rois], targets)


def _detect_boxes(
    predictor: BoxPredictor, x: Tensor, proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
) -> list[Detections]:
    counts = [p.shape[0] for p in proposals]
    logits, deltas = (value.split(counts) for value in predictor(x))
    return [
        Detections(*predictor.detect(logit, delta, proposal, size))
        for logit, delta, proposal, size in zip(logits, deltas, proposals, sizes, strict=True)
    ]


def _add_masks(head: MaskHead, x: Tensor, found: Sequence[Detections]) -> None:
    probabilities = head(x, torch.cat([d.labels for d in found])).sigmoid()
    for detections, part in zip(found, probabilities.split([d.labels.shape[0] for d in found]), strict=True):
        detections.masks = part
