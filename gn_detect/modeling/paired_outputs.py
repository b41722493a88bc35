"""Outputs of two detectors on the same images, compared at the same places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .mask_rcnn import MaskRCNN, image_size

PROPOSALS = 128  # best ones of each image; as many as training samples in many configs
MASK_PROPOSALS = 32  # a quarter, as in training, where only objects have masks; they take most of the time


def paired_outputs(
    original: nn.Module, converted: nn.Module, images: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return features, RPN outputs, and box and mask outputs on the *original's* proposals.

    The two detectors' own proposals differ, so their detections cannot be compared one by one.

    Args:
        original, converted: detectors of one config, apart from the norms.
        images: (3, H, W) each, as for :meth:`MaskRCNN.losses`.

    Returns:
        Pairs of the original's tensor, without gradient, and the other's: each level's feature map
        (N, C, h, w), each level's RPN logits (N, 1, A) and deltas (N, 4, A), class logits (R, K + 1) and
        box deltas (R, 4 K), of each stage in a cascade, and for the best proposals mask logits (M, 1, S, S)
        of the class that is most likely for the original.
    """
    assert isinstance(original, MaskRCNN)
    assert isinstance(converted, MaskRCNN)
    sizes = [image_size(image) for image in images]
    with torch.no_grad():
        features = original.backbone(original.preprocess(images))
        boxes = [[p[:PROPOSALS] for p in original.proposal_generator.propose(features, sizes)]]
        expected = _dense_outputs(original, features)
        regions, labels = _region_outputs(original, features, sizes, boxes, None)
        expected += regions
    features = converted.backbone(converted.preprocess(images))
    regions, _ = _region_outputs(converted, features, sizes, boxes, labels)
    return list(zip(expected, _dense_outputs(converted, features) + regions, strict=True))


def _dense_outputs(model: MaskRCNN, features: dict[str, Tensor]) -> list[Tensor]:
    rpn = model.proposal_generator
    logits, deltas = rpn.rpn_head([features[name] for name in rpn.in_features])
    return [*features.values(), *(x[:, None] for x in logits), *(x.transpose(1, 2) for x in deltas)]


def _region_outputs(
    model: MaskRCNN,
    features: dict[str, Tensor],
    sizes: Sequence[tuple[int, int]],
    boxes: list[list[Tensor]],
    labels: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of the second stage and the classes of the masks.

    ``boxes`` are those of the first stage of a cascade; the boxes of the others are added where they are
    missing.
    """
    heads = model.roi_heads
    levels, proposals = heads.levels(features), boxes[0]
    found: list[Tensor] = []
    for stage, predictor in enumerate(heads.predictors):
        x, shared = heads.box_features(levels, boxes[stage], stage)
        logits, deltas = predictor(x)
        found += [logits, deltas]
        if stage < len(heads.refined_ious) and len(boxes) == stage + 1:
            boxes.append(heads.refine(stage, deltas, boxes[-1], sizes))
    if labels is None:
        labels = logits[:, :-1].argmax(1)  # the last is the background
    if heads.mask_head is not None:
        with_mask = torch.cat([torch.arange(len(p), device=p.device) < MASK_PROPOSALS for p in proposals])
        if shared is None:
            x = heads.mask_features(levels, [p[:MASK_PROPOSALS] for p in proposals])
        else:
            x = shared[with_mask]
        found.append(heads.mask_head(x, labels[with_mask])[:, None])
    return found, labels
