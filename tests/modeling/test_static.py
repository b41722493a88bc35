"""The losses with fixed shapes against those of the CPU, for the same random choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gn_detect.modeling import MaskRCNN, matching, roi_heads, rpn, static
from gn_detect.structures import Target

SIZES = [(96, 128), (128, 100)]


def make_target(count: int, size: tuple[int, int], seed: int, bitmaps: bool = False) -> Target:
    """Objects of three classes, as polygons or bitmaps, some of them overlapping."""
    random = np.random.default_rng(seed)
    height, width = size
    corner = random.uniform(0, 0.6, (count, 2)) * [width, height]
    boxes = np.concatenate([corner, corner + random.uniform(8, 0.4 * height, (count, 2))], axis=1)
    masks: list[Any] = []
    for x0, y0, x1, y1 in boxes:
        if bitmaps:
            bitmap = torch.zeros(height, width, dtype=torch.bool)
            bitmap[int(y0) : int(y1), int(x0) : int((x0 + x1) / 2)] = True
            masks.append(bitmap)
        else:
            masks.append([np.array([x0, y0, x1, y0 + 3, (x0 + x1) / 2, y1], dtype=np.float64)])
    labels = torch.from_numpy(random.integers(0, 3, count))
    return Target(torch.from_numpy(boxes).float(), labels, masks)


class Choice:
    """Records which rows the CPU's path samples, and makes keys that sample the same."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: dict[str, list[tuple[int, Tensor, Tensor]]] = {"anchors": [], "rois": []}
        for name, module in (("anchors", rpn), ("rois", roi_heads)):
            monkeypatch.setattr(module, "sample", self.recorder(name))

    def recorder(self, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def sample(label: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            first, second = matching.sample(label, *rest)
            self.taken[name].append((len(label), first, second))
            return first, second

        return sample

    def keys(self, name: str, places: Sequence[Tensor], room: int) -> Tensor:
        """Return (N, room) keys, falling in the order in which rows were taken; row i lies at places[i]."""
        keys = torch.rand(len(places), room, generator=torch.Generator().manual_seed(3)) / 2
        for key, place, (_, *chosen) in zip(keys, places, self.taken[name], strict=True):
            for rows in chosen:
                key[place[rows]] = 1 - torch.arange(len(rows)) / 4096
        return keys


def both_ways(
    model: MaskRCNN, targets: list[Target], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Losses and gradients of the CPU's path and of the static one."""
    images = [
        torch.rand(3, *size, generator=torch.Generator().manual_seed(n)) * 255 for n, size in enumerate(SIZES)
    ]
    choice = Choice(monkeypatch)
    results = []
    for path in ("dynamic", "static"):
        model.zero_grad()
        torch.manual_seed(5)
        if path == "dynamic":
            losses = model.losses(images, targets)
        else:
            padded = static.pad_targets(targets, SIZES, (128, 128), model.has_masks)
            appends = model.roi_heads.settings.proposal_append_gt
            room = padded.labels.shape[1] if appends else 0
            features = model.backbone(model.preprocess(images))
            levels = [features[name] for name in model.proposal_generator.in_features]
            anchors = sum(map(len, model.proposal_generator.anchor_generator([f.shape[-2:] for f in levels])))
            places = []
            for (count, *_), target in zip(choice.taken["rois"], targets, strict=True):
                objects = len(target) if appends else 0
                places.append(torch.cat([torch.arange(count - objects), MOST + torch.arange(objects)]))
            keys = static.RandomKeys(
                choice.keys("anchors", [torch.arange(anchors)] * 2, anchors),
                choice.keys("rois", places, MOST + room),
            )
            losses = static.losses(model.proposal_generator, model.roi_heads, features, padded, keys)
        torch.stack(list(losses.values())).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append(({n: v.detach() for n, v in losses.items()}, gradients))
    return results


MOST = 60  # proposals
BASE = {
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 150,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": MOST,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
}


AGNOSTIC = {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True, "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True}
CASCADE = {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": [0.5, 0.4, 0.3],  # so that stages of random weights have foreground
}


@pytest.mark.parametrize(
    ("counts", "changes", "bitmaps"),
    [
        ((3, 5), {}, False),
        ((0, 1), {}, False),
        ((0, 0), {}, False),
        ((40, 2), {}, False),  # more objects than the least room
        ((3, 5), {}, True),
        ((2, 4), {"MODEL.RPN.BOUNDARY_THRESH": 0}, False),
        ((2, 4), {"MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False}, False),
        ((2, 4), {"MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 256}, False),  # more than there are
        ((2, 4), AGNOSTIC, False),
        ((2, 4), {"MODEL.MASK_ON": False}, False),
        ((3, 5), CASCADE, False),
        ((2, 4), {"MODEL.RESNETS.CONV": "WS", "MODEL.ROI_MASK_HEAD.CONV": "WS"}, False),
        pytest.param((2, 4), {"MODEL.RPN.CONV_DIMS": [-1, -1]}, False, marks=pytest.mark.slow),
        pytest.param((0, 1), CASCADE, False, marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_the_cpu(
    counts: tuple[int, int],
    changes: dict[str, Any],
    bitmaps: bool,
    small_model: Callable[..., MaskRCNN],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_model({**BASE, **changes}).train().double()
    targets = [make_target(n, size, n + 1, bitmaps) for n, size in zip(counts, SIZES, strict=True)]
    (wanted, gradients), (found, static_gradients) = both_ways(model, targets, monkeypatch)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
    assert static_gradients.keys() >= gradients.keys()
    for name, gradient in static_gradients.items():
        expected = gradients.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(
            gradient, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True},
        CASCADE,
        {"MODEL.MASK_ON": False},
        {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.3},
        {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.99},  # nothing is found
        {"TEST.DETECTIONS_PER_IMAGE": 5},
    ],
)
def test_detections_are_those_of_the_cpu(
    changes: dict[str, Any],
    small_model: Callable[..., MaskRCNN],
    make_images: Callable[..., list[Tensor]],
) -> None:
    model = small_model({"MODEL.RPN.POST_NMS_TOPK_TEST": 40, **changes}).eval()
    with torch.no_grad():
        for parameter in model.roi_heads.box_predictor.parameters():
            parameter.mul_(30)  # fresh weights score all alike
        features = model.backbone(model.preprocess(make_images(*SIZES)))
        proposals = model.proposal_generator.propose(features, SIZES)
        expected = model.roi_heads.detect(features, proposals, SIZES)
        found = static.detect(model.proposal_generator, model.roi_heads, features, SIZES)
        boxes_alone = static.detect(
            model.proposal_generator, model.roi_heads, features, SIZES, with_masks=False
        )
    for one, boxes in zip(found, boxes_alone, strict=True):
        assert torch.equal(one.boxes, boxes.boxes)
        assert boxes.masks is None
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(one.scores, other.scores)
        if other.masks is not None and one.masks is not None:
            torch.testing.assert_close(one.masks, other.masks)
        assert (one.masks is None) == (other.masks is None)
    assert any(len(one) for one in found) == (changes.get("MODEL.ROI_HEADS.SCORE_THRESH_TEST") != 0.99)
