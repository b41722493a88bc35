"""Second stage: RoIs are sampled, pooled, classified, refined and segmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..config.schema import ROIHeads
from ..structures import Detections, Target
from .box_head import BoxHead, BoxPredictor
from .mask_head import MaskHead, mask_loss
from .matching import match_boxes, sample
from .roi_pooling import RoIPooler


@dataclass
class SampledRoIs:
    """RoIs of one image with their ground truth, foreground first.

    Attributes:
        boxes: (R, 4) ``xyxy`` in input pixels.
        labels: (R,) class, ``num_classes`` for background.
        matched: (R,) index of the object that each RoI overlaps most; 0 in an image without objects.
        truth: (R, 4) box of this object.
        num_foreground: number of foreground rows.
    """

    boxes: Tensor
    labels: Tensor
    matched: Tensor
    truth: Tensor
    num_foreground: int


@torch.no_grad()
def sample_rois(proposals: Tensor, target: Target, settings: ROIHeads) -> SampledRoIs:
    """Match (P, 4) proposals of one image with its objects, and take a random sample of both kinds."""
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


class RoIHeads(nn.Module):
    """Losses and detections of both kinds of second stage, which differ in the features of a RoI.

    Attributes:
        settings: ``MODEL.ROI_HEADS``; ``in_features`` are the levels to pool from.
        box_predictor: box branch.
        mask_head: mask branch, or None.
    """

    settings: ROIHeads
    box_predictor: BoxPredictor
    mask_head: MaskHead | None

    def box_features(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the predictor's input for (R_n, 4) boxes of each image, and features to reuse for masks."""
        raise NotImplementedError

    def mask_features(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Return the mask head's input for (R_n, 4) boxes of each image."""
        raise NotImplementedError

    def levels(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Return the feature maps to pool from."""
        return [features[name] for name in self.settings.in_features]

    def losses(
        self, features: dict[str, Tensor], proposals: Sequence[Tensor], targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_box_reg`` and, with masks, ``loss_mask``."""
        levels = self.levels(features)
        rois = [sample_rois(p, t, self.settings) for p, t in zip(proposals, targets, strict=True)]
        x, shared = self.box_features(levels, [r.boxes for r in rois])
        logits, deltas = self.box_predictor(x)
        with record_function("roi_losses"):
            losses = self.box_predictor.losses(
                logits,
                deltas,
                torch.cat([r.boxes for r in rois]),
                torch.cat([r.truth for r in rois]),
                torch.cat([r.labels for r in rois]),
            )
        if self.mask_head is None:
            return losses
        boxes = [r.boxes[: r.num_foreground] for r in rois]
        if shared is None:
            x = self.mask_features(levels, boxes)
        else:
            parts = shared.split([len(r.boxes) for r in rois])
            x = torch.cat([part[: r.num_foreground] for part, r in zip(parts, rois, strict=True)])
        masks = self.mask_head(x, torch.cat([r.labels[: r.num_foreground] for r in rois]))
        with record_function("roi_losses"):
            losses["loss_mask"] = mask_loss(
                masks, boxes, [r.matched[: r.num_foreground] for r in rois], targets
            )
        return losses

    def detect(
        self, features: dict[str, Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Return detections in input pixels; ``masks`` are (D, S, S) probabilities inside the boxes."""
        levels = self.levels(features)
        x, _ = self.box_features(levels, proposals)
        counts = [p.shape[0] for p in proposals]
        logits, deltas = (value.split(counts) for value in self.box_predictor(x))
        found = [
            Detections(*self.box_predictor.detect(logit, delta, proposal, size))
            for logit, delta, proposal, size in zip(logits, deltas, proposals, sizes, strict=True)
        ]
        if self.mask_head is not None:
            x = self.mask_features(levels, [d.boxes for d in found])
            masks = self.mask_head(x, torch.cat([d.labels for d in found])).sigmoid()
            for detections, part in zip(found, masks.split([d.labels.shape[0] for d in found]), strict=True):
                detections.masks = part
        return found


class StandardRoIHeads(RoIHeads):
    """Box and mask branches with a pooler each (FPN and C5 models)."""

    def __init__(
        self,
        settings: ROIHeads,
        box_pooler: RoIPooler,
        box_head: BoxHead,
        box_predictor: BoxPredictor,
        mask_pooler: RoIPooler | None,
        mask_head: MaskHead | None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_pooler = mask_pooler
        self.mask_head = mask_head

    def box_features(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, None]:
        """See the base class."""
        return self.box_head(self.box_pooler(levels, boxes)), None

    def mask_features(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """See the base class."""
        assert self.mask_pooler is not None
        x: Tensor = self.mask_pooler(levels, boxes)
        return x


class Res5RoIHeads(RoIHeads):
    """C4 models: the RoIs' features go through ``res5``, which both branches share (ResNet, appendix A)."""

    def __init__(
        self,
        settings: ROIHeads,
        pooler: RoIPooler,
        res5: nn.Sequential,
        box_predictor: BoxPredictor,
        mask_head: MaskHead | None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.pooler = pooler
        self.res5 = res5
        self.box_predictor = box_predictor
        self.mask_head = mask_head

    def box_features(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See the base class."""
        shared = self.mask_features(levels, boxes)
        return shared.mean(dim=(2, 3)), shared

    def mask_features(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """See the base class."""
        x: Tensor = self.res5(self.pooler(levels, boxes))
        return x
