"""Box head: convolutions and fully connected layers, then classification and box regression for each RoI."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv2d
from ..ops import clip_boxes, decode_boxes, encode_boxes, nms_by_group
from .init import init_he, init_normal, init_xavier
from .losses import smooth_l1_sum
from .resnet import NormFactory


class BoxHead(nn.Sequential):
    """3x3 convolutions with norm and ReLU, then fully connected layers with ReLU (4conv1fc, 2fc, ...).

    Args:
        in_channels, resolution: C and S of the pooled features.
        conv_dims, fc_dims: widths of the layers.
        norm: norm of the convolutions; bias only where there is none.
    """

    def __init__(
        self,
        in_channels: int,
        resolution: int,
        conv_dims: Sequence[int],
        fc_dims: Sequence[int],
        norm: NormFactory,
    ) -> None:
        super().__init__()
        channels = in_channels
        for i, width in enumerate(conv_dims, start=1):
            layer_norm = norm(width)
            convolution = Conv2d(
                channels, width, 3, padding=1, bias=layer_norm is None, norm=layer_norm, activation="relu"
            )
            init_he(convolution)
            self.add_module(f"conv{i}", convolution)
            channels = width
        size = channels * resolution * resolution
        if fc_dims:
            self.add_module("flatten", nn.Flatten())
        for i, width in enumerate(fc_dims, start=1):
            linear = nn.Linear(size, width)
            init_xavier(linear)
            self.add_module(f"fc{i}", linear)
            self.add_module(f"fc_relu{i}", nn.ReLU(inplace=True))
            size = width
        self.output_size = size


class BoxPredictor(nn.Module):
    """Class logits (background last) and box deltas, their losses and the detections that they make.

    Args:
        in_features: size of a RoI's flattened features.
        num_classes: K foreground classes.
        class_agnostic: one box for all classes.
        bbox_reg_weights: scale of the deltas.
        smooth_l1_beta, bbox_reg_loss_weight: of the regression loss.
        score_thresh, nms_thresh, detections_per_image: of the detections.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        class_agnostic: bool,
        bbox_reg_weights: Sequence[float],
        smooth_l1_beta: float,
        bbox_reg_loss_weight: float,
        score_thresh: float,
        nms_thresh: float,
        detections_per_image: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 * (1 if class_agnostic else num_classes))
        init_normal(self.cls_score, std=0.01)
        init_normal(self.bbox_pred, std=0.001)
        self.bbox_reg_weights = tuple(bbox_reg_weights)
        self.smooth_l1_beta = smooth_l1_beta
        self.bbox_reg_loss_weight = bbox_reg_loss_weight
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_image = detections_per_image

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, ...) RoI features -> logits (R, K + 1), deltas (R, 4 * K) or (R, 4)."""
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)

    def losses(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, truth: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """``loss_cls`` and ``loss_box_reg``, both divided by the number of RoIs.

        Args:
            logits, deltas: of :meth:`forward`.
            proposals: (R, 4) RoIs.
            truth: (R, 4) the ground-truth box of each RoI; only foreground rows are read.
            labels: (R,) classes, K for background.
        """
        if len(labels) == 0:
            return {"loss_cls": logits.sum() * 0.0, "loss_box_reg": deltas.sum() * 0.0}
        foreground = ((labels >= 0) & (labels < self.num_classes)).nonzero()[:, 0]
        if deltas.shape[1] == 4:
            predicted = deltas[foreground]
        else:
            predicted = deltas.view(len(deltas), -1, 4)[foreground, labels[foreground]]
        wanted = encode_boxes(proposals[foreground], truth[foreground], self.bbox_reg_weights)
        # Divided by all RoIs and not by the foreground, so that each object weighs the same in every image.
        regression = smooth_l1_sum(predicted, wanted, self.smooth_l1_beta) / len(labels)
        return {
            "loss_cls": F.cross_entropy(logits, labels),
            "loss_box_reg": regression * self.bbox_reg_loss_weight,
        }

    def detect(
        self, logits: Tensor, deltas: Tensor, proposals: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (D, 4), scores (D,) and labels (D,) of one image of ``size`` (height, width), best first."""
        scores = F.softmax(logits.float(), dim=-1)
        boxes = decode_boxes(deltas, proposals, self.bbox_reg_weights)
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
        confident = (scores[:, :-1] > self.score_thresh) & finite[:, None]
        row, label = confident.nonzero(as_tuple=True)
        boxes = clip_boxes(boxes.view(-1, boxes.shape[1] // 4, 4), size)
        boxes = boxes[row, 0 if boxes.shape[1] == 1 else label]
        score = scores[row, label]
        limit = self.detections_per_image
        keep = nms_by_group(boxes, score, label, self.num_classes, self.nms_thresh, limit)
        return boxes[keep], score[keep], label[keep]
