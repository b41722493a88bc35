"""Second stage: RoIs are sampled, pooled, classified, refined and segmented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..config.schema import ROIHeads
from ..ops import clip_boxes, decode_boxes
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


@torch.no_grad()
def label_rois(boxes: Tensor, target: Target, iou: float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Match (R, 4) RoIs of one image with its objects, and keep all of them.

    Args:
        boxes: ``xyxy``.
        target: ground truth of the image.
        iou: RoIs that overlap an object less are background.
        num_classes: the label of background.

    Returns:
        (R,) int64 labels, and the (R, 4) box of the object that each RoI overlaps most.
    """
    index, label = match_boxes(target.boxes, boxes, (iou,), (0, 1))
    if len(target) == 0:
        return torch.full_like(index, num_classes), boxes
    return torch.where(label == 0, num_classes, target.labels[index]), target.boxes[index]


class RoIHeads(nn.Module):
    """Losses and detections of all kinds of second stage, which differ in the features of a RoI.

    Boxes go through one predictor, or in a cascade through several, one after the other.

    Attributes:
        settings: ``MODEL.ROI_HEADS``; ``in_features`` are the levels to pool from.
        box_predictor: box branch, or a list of them in a cascade.
        mask_head: mask branch, or None.
        refined_ious: least IoU of foreground in each stage of a cascade after the first.
    """

    settings: ROIHeads
    box_predictor: nn.Module
    mask_head: MaskHead | None
    refined_ious: tuple[float, ...] = ()

    @property
    def predictors(self) -> list[BoxPredictor]:
        """Return the box predictor of each stage."""
        assert isinstance(self.box_predictor, BoxPredictor)
        return [self.box_predictor]

    def box_features(
        self, levels: Sequence[Tensor], boxes: Sequence[Tensor], stage: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Return the predictor's input for (R_n, 4) boxes of each image, and features to reuse for masks."""
        raise NotImplementedError

    def loss_name(self, name: str, stage: int) -> str:
        """Return the name of a box loss of a stage."""
        return name

    def mask_features(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Return the mask head's input for (R_n, 4) boxes of each image."""
        raise NotImplementedError

    def levels(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Return the feature maps to pool from."""
        return [features[name] for name in self.settings.in_features]

    @torch.no_grad()
    def refine(
        self, stage: int, deltas: Tensor, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Return the boxes that a stage of a cascade finds: the proposals of the next stage.

        Args:
            stage: from 0.
            deltas: (R, 4) result of its predictor for all images.
            boxes: (R_n, 4) its proposals in each image.
            sizes: (height, width) of each image, to which boxes are clipped.

        Returns:
            (R_n, 4) boxes, all 0 where they would not be finite.
        """
        found = decode_boxes(deltas, torch.cat(list(boxes)), self.predictors[stage].box.bbox_reg_weights)
        found = torch.where(found.isfinite().all(1, keepdim=True), found, 0)
        parts = found.split([b.shape[0] for b in boxes])
        return [clip_boxes(part, size) for part, size in zip(parts, sizes, strict=True)]

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
        sizes: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Return ``loss_cls``, ``loss_box_reg`` and, with masks, ``loss_mask``.

        In a cascade the names of the box losses end in ``_stage0``, ``_stage1``, ...
        """
        levels = self.levels(features)
        rois = [sample_rois(p, t, self.settings) for p, t in zip(proposals, targets, strict=True)]
        boxes, truth, labels = [r.boxes for r in rois], [r.truth for r in rois], [r.labels for r in rois]
        losses: dict[str, Tensor] = {}
        for stage, predictor in enumerate(self.predictors):
            x, shared = self.box_features(levels, boxes, stage)
            logits, deltas = predictor(x)
            with record_function("roi_losses"):
                parts = predictor.losses(
                    logits, deltas, torch.cat(boxes), torch.cat(truth), torch.cat(labels)
                )
            losses |= {self.loss_name(name, stage): loss for name, loss in parts.items()}
            if stage < len(self.refined_ious):
                refined = self.refine(stage, deltas, boxes, sizes)
                boxes = [b[(b[:, 2:] > b[:, :2]).all(dim=1)] for b in refined]
                iou, background = self.refined_ious[stage], self.settings.num_classes
                found = [label_rois(b, t, iou, background) for b, t in zip(boxes, targets, strict=True)]
                labels, truth = [label for label, _ in found], [box for _, box in found]
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
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        masks: bool = True,
    ) -> list[Detections]:
        """Return detections in input pixels; their masks are (D, S, S) probabilities inside the boxes.

        Args:
            features: of the backbone.
            proposals: (R_n, 4) of each image.
            sizes: (height, width) of each image.
            masks: predict masks, if there is a mask branch.
        """
        levels = self.levels(features)
        predictors, boxes = self.predictors, proposals
        by_stage: list[Tensor] = []
        for stage, predictor in enumerate(predictors):
            x, _ = self.box_features(levels, boxes, stage)
            logits, deltas = predictor(x)
            by_stage.append(predictor.scores(logits))
            if stage < len(self.refined_ious):
                boxes = self.refine(stage, deltas, boxes, sizes)
        counts = [p.shape[0] for p in proposals]
        parts = zip(mean_scores(by_stage).split(counts), deltas.split(counts), boxes, sizes, strict=True)
        found = [Detections(*predictors[-1].detect(*part)) for part in parts]
        if self.mask_head is not None and masks:
            parts_of = self.segment(features, [d.boxes for d in found], [d.labels for d in found])
            for detections, mask in zip(found, parts_of, strict=True):
                detections.masks = mask
        return found

    def segment(
        self, features: dict[str, Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return (D_n, S, S) mask probabilities inside the (D_n, 4) boxes of (D_n,) labels of each image."""
        assert self.mask_head is not None
        x = self.mask_features(self.levels(features), boxes)
        masks = self.mask_head(x, torch.cat(list(labels))).sigmoid()
        return list(masks.split([label.shape[0] for label in labels]))


def mean_scores(by_stage: Sequence[Tensor]) -> Tensor:
    """Return the mean of the (R, K + 1) scores of all stages."""
    if len(by_stage) == 1:
        return by_stage[0]
    total = by_stage[0]
    for scores in by_stage[1:]:  # in this order, as detectron2 adds
        total = total + scores
    return total * (1.0 / len(by_stage))


class StandardRoIHeads(RoIHeads):
    """Box and mask branches with a pooler each (FPN and C5 models)."""

    def __init__(
        self,
        settings: ROIHeads,
        box_pooler: RoIPooler,
        box_head: nn.Module,
        box_predictor: nn.Module,
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

    def box_features(
        self, levels: Sequence[Tensor], boxes: Sequence[Tensor], stage: int = 0
    ) -> tuple[Tensor, None]:
        """See the base class."""
        return self.box_head(self.box_pooler(levels, boxes)), None

    def mask_features(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """See the base class."""
        assert self.mask_pooler is not None
        x: Tensor = self.mask_pooler(levels, boxes)
        return x


class CascadeRoIHeads(StandardRoIHeads):
    """Box heads one after the other (Cascade R-CNN, arXiv 1712.00726), and one mask branch.

    Each stage refines the boxes of the one before it, and learns from objects that overlap them more.

    Args:
        settings: ``MODEL.ROI_HEADS``.
        box_pooler: pools for all stages.
        box_heads, predictors: of each stage; a predictor has the box weights of its stage.
        ious: least IoU of foreground in each stage.
        mask_pooler, mask_head: mask branch, or None.
    """

    def __init__(
        self,
        settings: ROIHeads,
        box_pooler: RoIPooler,
        box_heads: Sequence[BoxHead],
        predictors: Sequence[BoxPredictor],
        ious: Sequence[float],
        mask_pooler: RoIPooler | None,
        mask_head: MaskHead | None,
    ) -> None:
        heads, outputs = nn.ModuleList(box_heads), nn.ModuleList(predictors)
        super().__init__(settings, box_pooler, heads, outputs, mask_pooler, mask_head)
        self.refined_ious = tuple(ious[1:])

    @property
    def predictors(self) -> list[BoxPredictor]:
        """See the base class."""
        assert isinstance(self.box_predictor, nn.ModuleList)
        return [predictor for predictor in self.box_predictor if isinstance(predictor, BoxPredictor)]

    def box_features(
        self, levels: Sequence[Tensor], boxes: Sequence[Tensor], stage: int = 0
    ) -> tuple[Tensor, None]:
        """See the base class; each stage sends 1 / (number of stages) of its gradient to the features."""
        assert isinstance(self.box_head, nn.ModuleList)
        pooled = self.box_pooler(levels, boxes)
        if self.training and pooled.requires_grad:
            scale = 1.0 / len(self.box_head)
            pooled.register_hook(lambda gradient: gradient * scale)
        return self.box_head[stage](pooled), None

    def loss_name(self, name: str, stage: int) -> str:
        """See the base class."""
        return f"{name}_stage{stage}"


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

    def box_features(
        self, levels: Sequence[Tensor], boxes: Sequence[Tensor], stage: int = 0
    ) -> tuple[Tensor, Tensor]:
        """See the base class."""
        shared = self.mask_features(levels, boxes)
        return shared.mean(dim=(2, 3)), shared

    def mask_features(self, levels: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """See the base class."""
        x: Tensor = self.res5(self.pooler(levels, boxes))
        return x
