"""RPN: the sparse loss equals the dense one, proposals are what they should be."""

from __future__ import annotations

import pytest
import torch

from gn_detect.config.schema import RPN as RPNSettings
from gn_detect.modeling import matching
from gn_detect.modeling.anchors import AnchorGenerator, cell_anchors
from gn_detect.modeling.matching import match
from gn_detect.modeling.rpn import RPN, RPNHead
from gn_detect.structures import Target

SIZES = [(64, 96), (60, 90)]


def make_rpn(**changes) -> RPN:
    torch.manual_seed(0)
    settings = {
        "in_features": ("p2", "p3", "p4"),
        "batch_size_per_image": 64,
        "pre_nms_topk_train": 50,
        "pre_nms_topk_test": 40,
        "post_nms_topk_train": 30,
        "post_nms_topk_test": 20,
    }
    anchors = AnchorGenerator([[16], [32], [64]], [[0.5, 1.0, 2.0]], [4, 8, 16])
    head = RPNHead(8, 3)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return RPN(RPNSettings().model_copy(update=settings | changes), head, anchors)


def make_features(requires_grad: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"p{i}": torch.randn(2, 8, 64 >> i, 96 >> i, generator=generator).requires_grad_(requires_grad)
        for i in (2, 3, 4)
    }


def make_targets() -> list[Target]:
    boxes = torch.tensor([[4.0, 4, 36, 30], [50, 20, 90, 60]])
    return [
        Target(boxes, torch.zeros(2, dtype=torch.int64)),
        Target(boxes[:0], torch.zeros(0, dtype=torch.int64)),
    ]


def run(sparse: bool) -> tuple[dict, list[torch.Tensor], list[torch.Tensor]]:
    rpn, features = make_rpn(), make_features()
    rpn._is_sparse = lambda *_: sparse
    torch.manual_seed(5)
    proposals, losses = rpn.losses(features, SIZES, make_targets())
    gradients = torch.autograd.grad(sum(losses.values()), [*features.values(), *rpn.parameters()])
    return losses, proposals, list(gradients)


def test_sparse_losses_and_gradients_are_the_dense_ones() -> None:
    sparse, dense = run(True), run(False)
    assert sparse[0]["loss_rpn_cls"] > 0
    assert sparse[0]["loss_rpn_loc"] > 0
    for name in sparse[0]:
        torch.testing.assert_close(sparse[0][name], dense[0][name], rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(sparse[1], dense[1], strict=True))
    for a, b in zip(sparse[2], dense[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_sparse_path_is_taken_with_few_samples_only() -> None:
    rpn = make_rpn()
    assert rpn._is_sparse(512, 100_000)
    assert not rpn._is_sparse(512, 2000)
    rpn.rpn_head = RPNHead(8, 3, (-1, -1))
    assert not rpn._is_sparse(512, 100_000)


def test_proposals_lie_in_the_image_and_are_as_many_as_asked() -> None:
    rpn = make_rpn().eval()
    proposals = rpn.propose(make_features(False), SIZES)
    assert [len(p) for p in proposals] == [20, 20]
    for boxes, (height, width) in zip(proposals, SIZES, strict=True):
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    rpn.train()
    assert len(rpn.losses(make_features(), SIZES, make_targets())[0][0]) == 30


def test_an_image_without_objects_has_only_background() -> None:
    rpn = make_rpn()
    losses = rpn.losses(make_features(), SIZES, [make_targets()[1]] * 2)[1]
    assert losses["loss_rpn_cls"] > 0
    assert losses["loss_rpn_loc"] == 0
    sum(losses.values()).backward()
    assert rpn.rpn_head.conv.weight.grad is not None


def test_boundary_threshold_ignores_anchors_outside() -> None:
    inside = make_rpn(boundary_thresh=0)
    anchors = torch.cat(inside.anchor_generator([(16, 24), (8, 12), (4, 6)]))
    labels, _ = inside._label(anchors, [(64, 96)], make_targets()[:1])
    outside = (anchors[:, :2] < 0).any(1) | (anchors[:, 2] >= 96) | (anchors[:, 3] >= 64)
    assert outside.any()
    assert (labels[0][outside] == -1).all()
    assert (labels[0][~outside] != -1).any()


def test_labels_do_not_depend_on_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rpn = make_rpn()
    anchors = torch.cat(rpn.anchor_generator([(16, 24), (8, 12), (4, 6)]))
    at_once = rpn._label(anchors, SIZES, make_targets())
    parts: list[int] = []
    monkeypatch.setattr(matching, "_MATCH_BYTES", 100 * matching._PAIR_BYTES)
    monkeypatch.setattr(matching, "match", lambda iou, *rest: parts.append(iou.numel()) or match(iou, *rest))
    in_parts = rpn._label(anchors, SIZES, make_targets())
    assert max(parts) == 100
    assert sum(parts) == 2 * len(anchors)
    for whole, part in zip(at_once, in_parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))


def test_cell_anchors() -> None:
    """Area is the square of the size, the ratio is height over width, sizes come outermost."""
    anchors = cell_anchors([32, 64], [0.5, 2.0])
    width, height = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    torch.testing.assert_close((width * height).sqrt(), torch.tensor([32.0, 32, 64, 64]))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 2, 0.5, 2]))
    torch.testing.assert_close(anchors[:, :2], -anchors[:, 2:])


def test_anchor_grid_runs_row_by_row() -> None:
    grid = AnchorGenerator([[8]], [[1.0]], [4], offset=0.5)([(2, 3)])[0]
    centres = (grid[:, :2] + grid[:, 2:]) / 2
    assert centres.tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6]]
