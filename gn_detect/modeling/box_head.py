"""Box head: convolutions and fully connected layers, then classification and box regression of each RoI."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import ROIBoxHead, ROIHeads
from ..layers import init_he, init_normal, init_xavier, make_conv
from ..ops import clip_boxes, decode_boxes, encode_boxes, keep_best, nms_by_group
from .matching import take_rows
from .resnet import NormFactory


class BoxHead(nn.Sequential):
    """3x3 convolutions with norm and ReLU, then fully connected layers with ReLU (4conv1fc, 2fc, ...).

    ``style`` is ``MODEL.CONV_STYLE``.
    """

    def __init__(
        self, in_channels: int, settings: ROIBoxHead, norm: NormFactory, style: str = "detectron2"
    ) -> None:
        super().__init__()
        channels = in_channels
        for i in range(1, settings.num_conv + 1):
            convolution = make_conv(channels, settings.conv_dim, 3, norm(settings.conv_dim), "relu", style)
            init_he(convolution)
            self.add_module(f"conv{i}", convolution)
            channels = settings.conv_dim
        size = channels * settings.pooler_resolution**2
        if settings.num_fc:
            self.add_module("flatten", nn.Flatten())
        for i in range(1, settings.num_fc + 1):
            linear = nn.Linear(size, settings.fc_dim)
            init_xavier(linear)
            self.add_module(f"fc{i}", linear)
            self.add_module(f"fc_relu{i}", nn.ReLU(inplace=True))
            size = settings.fc_dim
        self.output_size = size


class BoxPredictor(nn.Module):
    """Class logits (background last) and box deltas of RoIs, their losses, and the detections."""

    def __init__(self, in_features: int, heads: ROIHeads, box: ROIBoxHead, detections_per_image: int) -> None:
        super().__init__()
        self.heads, self.box, self.detections_per_image = heads, box, detections_per_image
        self.cls_score = nn.Linear(in_features, heads.num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 if box.cls_agnostic_bbox_reg else 4 * heads.num_classes)
        # In training auto has become numbers.
        weights = None if box.class_weights in ((), "auto") else torch.tensor([*box.class_weights, 1.0])
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)
        init_normal(self.cls_score, std=0.01)
        init_normal(self.bbox_pred, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (R, ...) RoI features to logits (R, K + 1) and deltas (R, 4 * K) or (R, 4)."""
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)

    def losses(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, truth: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss_cls`` and ``loss_box_reg``, both divided by the number of RoIs.

        Args:
            logits, deltas: results of :meth:`forward`.
            proposals: (R, 4) RoIs.
            truth: (R, 4) the ground-truth box of each RoI; only foreground rows are read.
            labels: (R,) classes, K for background.
        """
        if len(labels) == 0:
            return {"loss_cls": logits.sum() * 0.0, "loss_box_reg": deltas.sum() * 0.0}
        foreground = ((labels >= 0) & (labels < self.heads.num_classes)).nonzero()[:, 0]
        if deltas.shape[1] == 4:
            predicted = deltas[foreground]
        else:
            predicted = deltas.view(len(deltas), -1, 4)[foreground, labels[foreground]]
        wanted = encode_boxes(proposals[foreground], truth[foreground], self.box.bbox_reg_weights)
        # Divided by all RoIs and not by the foreground, so that each object weighs the same in every image.
        regression = smooth_l1_sum(predicted, wanted, self.box.smooth_l1_beta) / len(labels)
        return {
            "loss_cls": self.classification_loss(logits, labels) / len(labels),
            "loss_box_reg": regression * self.box.bbox_reg_loss_weight,
        }

    def classification_loss(self, logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
        """Return the sum of cross-entropies times ``CLASS_WEIGHTS``, without those labelled ``ignored``."""
        weights = self.class_weights
        return F.cross_entropy(logits, labels, weights, ignore_index=ignored, reduction="sum")

    def scores(self, logits: Tensor) -> Tensor:
        """Return the (R, K + 1) float32 probabilities of (R, K + 1) logits."""
        return F.softmax(logits.float(), dim=-1)

    def detect(
        self, scores: Tensor, deltas: Tensor, proposals: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (D, 4), scores (D,) and labels (D,) of an image of (height, width), best first.

        Args:
            scores: (R, K + 1) probabilities, background last.
            deltas: result of :meth:`forward`.
            proposals: (R, 4).
            size: to which boxes are clipped.
        """
        boxes = decode_boxes(deltas, proposals, self.box.bbox_reg_weights)
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
        confident = (scores[:, :-1] > self.heads.score_thresh_test) & finite[:, None]
        row, label = confident.nonzero(as_tuple=True)
        boxes = clip_boxes(boxes.view(-1, boxes.shape[1] // 4, 4), size)
        boxes = boxes[row, 0 if boxes.shape[1] == 1 else label]
        score = scores[row, label]
        classes, overlap = self.heads.num_classes, self.heads.nms_thresh_test
        keep = nms_by_group(boxes, score, label, classes, overlap, self.detections_per_image)
        return boxes[keep], score[keep], label[keep]

    def detect_padded(
        self, scores: Tensor, deltas: Tensor, proposals: Tensor, valid: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return :meth:`detect` with fixed shapes, for N images with R proposals each.

        Args:
            scores: (N * R, K + 1) probabilities, background last.
            deltas: result of :meth:`forward` for N * R RoIs.
            proposals: (N, R, 4), of which (N, R) are ``valid``.
            sizes: (N, 2) height and width.

        Returns:
            Boxes (N, D, 4), scores (N, D), -inf beyond the last detection, and labels (N, D).
        """
        images, rois = valid.shape
        classes = self.heads.num_classes
        boxes = decode_boxes(deltas, proposals.flatten(0, 1), self.box.bbox_reg_weights)
        usable = boxes.isfinite().all(1) & scores.isfinite().all(1) & valid.flatten()
        score = torch.where((scores > self.heads.score_thresh_test) & usable[:, None], scores, -torch.inf)
        score, order = score[:, :-1].view(images, rois, classes).transpose(1, 2).sort(descending=True)
        boxes = torch.minimum(
            boxes.view(images, rois, -1, 4).clamp(min=0), sizes.flip(1).repeat(1, 2)[:, None, None]
        )
        boxes = boxes.transpose(1, 2).expand(-1, classes, -1, -1)
        boxes = boxes.gather(2, order[..., None].expand(-1, -1, -1, 4))  # (N, classes, R, 4), best first
        possible = score > -torch.inf
        keep = keep_best(boxes.flatten(0, 1), possible.flatten(0, 1), self.heads.nms_thresh_test)
        score = torch.where(keep.view_as(possible), score, -torch.inf).flatten(1)
        best = score.topk(min(self.detections_per_image, score.shape[1]), dim=1)
        found = take_rows(boxes.flatten(1, 2), best.indices)
        found = torch.where(best.values[..., None] > -torch.inf, found, 0)
        return found, best.values, best.indices // rois


def smooth_l1_sum(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return the summed smooth L1 loss (Girshick 2015, arXiv 1504.08083, equation 3), or L1 if beta is 0."""
    if beta < 1e-5:
        return F.l1_loss(prediction, target, reduction="sum")
    return F.smooth_l1_loss(prediction, target, reduction="sum", beta=beta)
