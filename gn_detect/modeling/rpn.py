"""Region Proposal Network (Ren et al. 2015, arXiv 1506.01497) with detectron2's names and numerics."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from ..config.schema import RPN as RPNSettings
from ..layers import Conv2d, init_normal
from ..ops import clip_boxes, decode_boxes, encode_boxes, keep_best, nms_by_group, rows_by_value
from ..structures import Target
from .anchors import AnchorGenerator
from .box_head import smooth_l1_sum
from .matching import match_boxes, sample, take_rows


class RPNHead(nn.Module):
    """A 3x3 convolution and two 1x1 predictors, shared by all levels.

    Args:
        in_channels: C of every level.
        num_anchors: A, anchors at each position.
        conv_dims: widths of the 3x3 convolutions; -1 keeps C.
    """

    def __init__(self, in_channels: int, num_anchors: int, conv_dims: Sequence[int] = (-1,)) -> None:
        super().__init__()
        convolutions: dict[str, nn.Module] = {}
        channels = in_channels
        for i, width in enumerate(conv_dims):
            width = channels if width == -1 else width
            convolutions[f"conv{i}"] = Conv2d(channels, width, 3, padding=1, activation="relu")
            channels = width
        several = len(convolutions) > 1  # detectron2's names
        self.conv = nn.Sequential(OrderedDict(convolutions)) if several else convolutions["conv0"]
        self.objectness_logits = nn.Conv2d(channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                init_normal(module, std=0.01)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each level (N, C, H, W) logits (N, H * W * A) and deltas (N, H * W * A, 4)."""
        logits, deltas = [], []
        for feature in features:
            hidden = self.conv(feature)
            logits.append(self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1))
            delta = self.anchor_deltas(hidden).permute(0, 2, 3, 1)  # (N, H, W, A * 4)
            deltas.append(delta.reshape(delta.shape[0], -1, 4))
        return logits, deltas

    def at_anchors(self, features: Sequence[Tensor], chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the head's output at a few anchors, differentiable.

        Training samples 256 of some 100 000 anchors of an image. All others have no gradient, so a dense
        backward through the 3x3 convolution would multiply zeros. Only the 3x3 neighbourhoods of the chosen
        anchors enter the graph.

        Args:
            features: levels (N, C, H, W).
            chosen: for each level (K_l,) int64 positions in its flattened (N, H * W * A).

        Returns:
            Logits (K,) and deltas (K, 4), levels concatenated.

        Raises:
            TypeError: the head has several 3x3 convolutions, which see more than 3x3 cells.
        """
        convolution = self.conv
        if not isinstance(convolution, Conv2d):
            raise TypeError("only a head of one 3x3 convolution can be evaluated at single anchors")
        num_anchors = self.objectness_logits.out_channels
        patches = [
            _gather_patches(f, index.div(num_anchors, rounding_mode="floor"))
            for f, index in zip(features, chosen, strict=True)
        ]
        kernel = convolution.weight.permute(0, 2, 3, 1).flatten(1)  # (C_out, 9 * C)
        hidden = F.relu(F.linear(torch.cat(patches), kernel, convolution.bias))
        anchor = torch.cat(list(chosen)) % num_anchors
        row = torch.arange(len(anchor), device=anchor.device)
        logits = F.linear(hidden, self.objectness_logits.weight.flatten(1), self.objectness_logits.bias)
        deltas = F.linear(hidden, self.anchor_deltas.weight.flatten(1), self.anchor_deltas.bias)
        return logits[row, anchor], deltas.view(len(anchor), num_anchors, 4)[row, anchor]


def _gather_patches(feature: Tensor, position: Tensor) -> Tensor:
    """Return 3x3 neighbourhoods, (K, 9 * C), zero outside the map (N, C, H, W), at (K,) flat (N, H, W)."""
    height, width = feature.shape[-2:]
    image = position.div(height * width, rounding_mode="floor")
    y = position.div(width, rounding_mode="floor") % height
    x = position % width
    step = torch.arange(-1, 2, device=position.device)
    y = (y[:, None] + step)[:, :, None].expand(-1, 3, 3).flatten(1)  # (K, 9)
    x = (x[:, None] + step)[:, None, :].expand(-1, 3, 3).flatten(1)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    patch = feature[image[:, None], :, y.clamp(0, height - 1), x.clamp(0, width - 1)]  # (K, 9, C)
    return (patch * inside[..., None]).flatten(1)


class RPN(nn.Module):
    """Anchors, the head, its losses and its proposals; ``min_size`` is the least side of one in pixels."""

    def __init__(
        self, settings: RPNSettings, head: RPNHead, anchor_generator: AnchorGenerator, min_size: float = 0.0
    ) -> None:
        super().__init__()
        self.settings = settings
        self.in_features = settings.in_features
        self.min_size = min_size
        self.rpn_head = head
        self.anchor_generator = anchor_generator

    def propose(self, features: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return the proposals of each image at inference: (P, 4) ``xyxy``, best first."""
        levels = [features[name] for name in self.in_features]
        anchors = self.anchor_generator([f.shape[-2:] for f in levels])
        logits, deltas = self.rpn_head(levels)
        return self.select_proposals(anchors, logits, deltas, image_sizes)

    def losses(
        self, features: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], targets: Sequence[Target]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return proposals without gradient, and the losses ``loss_rpn_cls`` and ``loss_rpn_loc``.

        Both are sums over the sampled anchors, divided by ``BATCH_SIZE_PER_IMAGE`` and the number of images.
        """
        s = self.settings
        levels = [features[name] for name in self.in_features]
        anchors = self.anchor_generator([f.shape[-2:] for f in levels])
        labels, matched = self._label(torch.cat(anchors), image_sizes, targets)
        chosen = [
            torch.cat(sample(label, s.batch_size_per_image, s.positive_fraction, 0)) for label in labels
        ]

        sparse = self._is_sparse(sum(map(len, chosen)), sum(label.numel() for label in labels))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not sparse):
            logits, deltas = self.rpn_head(levels)
        with torch.no_grad():
            proposals = self.select_proposals(
                anchors, [x.detach() for x in logits], [x.detach() for x in deltas], image_sizes
            )
        if sparse:
            by_level, order = _split_levels(chosen, [len(a) for a in anchors])
            logit, delta = (x[order] for x in self.rpn_head.at_anchors(levels, by_level))
        else:
            logit, delta = _take(torch.cat(logits, dim=1), chosen), _take(torch.cat(deltas, dim=1), chosen)
        with record_function("rpn_losses"):
            reference = _take([torch.cat(anchors)] * len(targets), chosen)
            losses = self._sampled_losses(
                logit, delta, _take(labels, chosen), reference, _take(matched, chosen)
            )
            normalizer = s.batch_size_per_image * len(targets)
            return proposals, {name: loss / normalizer for name, loss in losses.items()}

    def _sampled_losses(
        self, logits: Tensor, deltas: Tensor, labels: Tensor, anchors: Tensor, truth: Tensor
    ) -> dict[str, Tensor]:
        """Return summed losses of K sampled anchors: logits, labels (K,); deltas, anchors, truth (K, 4)."""
        s = self.settings
        foreground = (labels == 1).nonzero()[:, 0]
        wanted = encode_boxes(anchors[foreground], truth[foreground], s.bbox_reg_weights)
        classification = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
        localization = smooth_l1_sum(deltas[foreground], wanted, s.smooth_l1_beta)
        return {
            "loss_rpn_cls": classification * s.loss_weight,
            "loss_rpn_loc": localization * (s.loss_weight * s.bbox_reg_loss_weight),
        }

    def _is_sparse(self, num_chosen: int, num_anchors: int) -> bool:
        """Return whether gathering pays: few anchors are chosen, and one convolution sees 3x3 cells."""
        return isinstance(self.rpn_head.conv, Conv2d) and num_chosen * 4 < num_anchors

    @torch.no_grad()
    def _label(
        self, anchors: Tensor, image_sizes: Sequence[tuple[int, int]], targets: Sequence[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each image (R,) labels 1, 0, -1 and the (R, 4) box that each anchor is matched to."""
        s = self.settings
        labels, matched = [], []
        for (height, width), target in zip(image_sizes, targets, strict=True):
            index, label = match_boxes(
                target.boxes, anchors, s.iou_thresholds, s.iou_labels, keep_best_of_each_object=True
            )
            if s.boundary_thresh >= 0:
                inside = (anchors[:, :2] >= -s.boundary_thresh).all(1)
                inside &= (anchors[:, 2] < width + s.boundary_thresh) & (
                    anchors[:, 3] < height + s.boundary_thresh
                )
                label.masked_fill_(~inside, -1)
            labels.append(label)
            matched.append(target.boxes[index] if len(target) else anchors)
        return labels, matched

    def select_proposals(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Return the best boxes of each image: top anchors of each level, decoded, clipped, NMS by level."""
        s = self.settings
        before = s.pre_nms_topk_train if self.training else s.pre_nms_topk_test
        after = s.post_nms_topk_train if self.training else s.post_nms_topk_test
        top = [level.topk(torch.sym_min(before, level.shape[1]), dim=1) for level in logits]
        scores = torch.cat([t.values for t in top], dim=1)
        level_of = torch.cat(
            [torch.full((t.values.shape[1],), i, device=scores.device) for i, t in enumerate(top)]
        )
        proposals = []
        for n, size in enumerate(image_sizes):
            index = [t.indices[n] for t in top]
            delta = torch.cat([d[n, i] for d, i in zip(deltas, index, strict=True)])
            reference = torch.cat([a[i] for a, i in zip(anchors, index, strict=True)])
            boxes = decode_boxes(delta, reference, s.bbox_reg_weights)
            finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores[n])
            boxes = clip_boxes(boxes, size)
            large = ((boxes[:, 2:] - boxes[:, :2]) > self.min_size).all(dim=1)
            keep = (finite & large).nonzero()[:, 0]
            score, level = scores[n, keep].float(), level_of[keep]
            best = nms_by_group(boxes[keep], score, level, len(top), s.nms_thresh, after)
            proposals.append(boxes[keep[best]])
        return proposals

    def select_padded_proposals(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        sizes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return :meth:`select_proposals` in fixed shapes: (N, P, 4), best first, and (N, P) which are valid.

        ``sizes`` is (N, 2), height and width of each image.
        """
        s = self.settings
        before = s.pre_nms_topk_train if self.training else s.pre_nms_topk_test
        after = s.post_nms_topk_train if self.training else s.post_nms_topk_test
        counts = [level.shape[1] for level in logits]
        most, first = min(before, max(counts)), 0
        scores, index = [], []
        for logit, count in zip(logits, counts, strict=True):  # all levels get as many rows
            top = logit.detach().topk(min(before, count), dim=1)
            room = most - top.values.shape[1]
            scores.append(F.pad(top.values, (0, room), value=-torch.inf))
            index.append(F.pad(top.indices + first, (0, room)))
            first += count
        score, chosen = torch.stack(scores, 1), torch.cat(index, 1)  # (N, L, most), (N, L * most)
        delta = take_rows(torch.cat([level.detach() for level in deltas], 1), chosen).flatten(0, 1)
        boxes = decode_boxes(delta, torch.cat(list(anchors))[chosen].flatten(0, 1), s.bbox_reg_weights)
        boxes = boxes.view(*chosen.shape, 4)
        finite = boxes.isfinite().all(2)
        boxes = torch.minimum(boxes.clamp(min=0), sizes.flip(1).repeat(1, 2)[:, None])
        large = ((boxes[..., 2:] - boxes[..., :2]) > self.min_size).all(2)
        valid = (finite & large).view(score.shape) & score.isfinite()
        keep = keep_best(boxes.view(-1, most, 4), valid.flatten(0, 1), s.nms_thresh).view(score.shape)
        best = (
            torch.where(keep, score.float(), -torch.inf).flatten(1).topk(min(after, chosen.shape[1]), dim=1)
        )
        valid = best.values > -torch.inf
        return torch.where(valid[..., None], take_rows(boxes, best.indices), 0), valid


def _take(values: Sequence[Tensor] | Tensor, chosen: Sequence[Tensor]) -> Tensor:
    """Return the values of each image at its chosen positions, one image after the other."""
    return torch.cat([value[index] for value, index in zip(values, chosen, strict=True)])


def _split_levels(chosen: Sequence[Tensor], level_sizes: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Sort the anchors chosen in each image by level.

    Args:
        chosen: for each image (K_n,) positions in the concatenation of all levels.
        level_sizes: anchors of one image on each level.

    Returns:
        For each level positions in its flattened (N, anchors), and the (K,) permutation from the order of the
        levels back to the order of ``chosen``.
    """
    image = torch.cat([torch.full_like(index, n) for n, index in enumerate(chosen)])
    position = torch.cat(list(chosen))
    bounds = [0, *accumulate(level_sizes)]
    level = torch.zeros_like(position)
    for bound in bounds[1:-1]:
        level += position >= bound
    rows = rows_by_value(level, len(level_sizes))
    by_level = [
        image[row] * size + position[row] - bound
        for row, size, bound in zip(rows, level_sizes, bounds, strict=False)
    ]
    return by_level, torch.argsort(torch.cat(rows))
