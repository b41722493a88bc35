"""Matching and sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou

from gn_detect.modeling import matching
from gn_detect.modeling.matching import match, match_boxes, sample

RPN_LABELS = ((0.3, 0.7), (0, -1, 1))


def test_thresholds_and_labels() -> None:
    iou = torch.tensor([[0.1, 0.3, 0.7, 0.5], [0.2, 0.69, 0.0, 0.5]])
    index, label = match(iou, (0.3, 0.7), (0, -1, 1))
    assert index.tolist() == [1, 1, 0, 0]
    assert label.tolist() == [0, -1, 1, -1]


def test_every_object_keeps_its_best_boxes() -> None:
    """All ties count; the index stays that of the box's own best object; an overlap of 0 is none."""
    iou = torch.tensor([[0.2, 0.2, 0.1, 0.0], [0.0, 0.8, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    index, label = match(iou, (0.3, 0.7), (0, -1, 1), keep_best_of_each_object=True)
    assert label.tolist() == [1, 1, 0, 0]
    assert index.tolist() == [0, 1, 0, 0]


def test_no_objects() -> None:
    index, label = match(torch.zeros(0, 5), (0.5,), (0, 1))
    assert index.tolist() == [0] * 5
    assert label.tolist() == [0] * 5


def boxes_on_a_grid(count: int, seed: int) -> Tensor:
    """Few positions and sizes, so that many IoUs are the same; some boxes have no area."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 12, (count, 2), generator=generator) * 4.0
    return torch.cat([corner, corner + torch.randint(0, 5, (count, 2), generator=generator) * 7.3], dim=1)


def limit_pairs(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr(matching, "_MATCH_BYTES", pairs * matching._PAIR_BYTES)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("objects", "boxes", "pairs"),
    [(7, 999, 7 * 100), (7, 1000, 7 * 100), (7, 1001, 7 * 100), (7, 1000, 3), (1, 50, 49), (0, 50, 8)],
)
def test_matching_part_by_part_is_the_same(
    monkeypatch: pytest.MonkeyPatch, objects: int, boxes: int, pairs: int, keep: bool
) -> None:
    """The last part full, of one box, and each of one box where there is no room for an object's pairs."""
    limit_pairs(monkeypatch, pairs)
    truth, others = boxes_on_a_grid(objects, 0), boxes_on_a_grid(boxes, 1)
    expected = match(box_iou(truth, others), *RPN_LABELS, keep_best_of_each_object=keep)
    found = match_boxes(truth, others, *RPN_LABELS, keep_best_of_each_object=keep)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    if objects == 7:
        assert keep == (expected[1] != match(box_iou(truth, others), *RPN_LABELS)[1]).any()


def test_the_best_of_an_object_in_another_part_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A box that is the best of its part alone stays background; ties in several parts are all kept."""
    limit_pairs(monkeypatch, 2)
    truth = torch.tensor([[0.0, 0, 10, 10]])
    weak, best, none = [0.0, 0, 1, 10], [8.0, 0, 10, 10], [50.0, 50, 60, 60]
    boxes = torch.tensor([weak, none, best, weak, none, none, none, best])
    label = match_boxes(truth, boxes, *RPN_LABELS, keep_best_of_each_object=True)[1]
    assert label.tolist() == [0, 0, 1, 0, 0, 0, 0, 1]


class Sizes(TorchDispatchMode):
    """Notes the elements of the largest tensor, and how many operations there are."""

    largest, operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        self.operations += 1
        return result


def test_memory_of_matching_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, boxes = boxes_on_a_grid(50, 0), boxes_on_a_grid(4000, 1)
    with Sizes() as whole:
        match_boxes(truth, boxes, *RPN_LABELS, keep_best_of_each_object=True)
    limit_pairs(monkeypatch, 10_000)
    with Sizes() as parts:
        match_boxes(truth, boxes, *RPN_LABELS, keep_best_of_each_object=True)
    assert whole.largest == 2 * 50 * 4000
    assert parts.largest == 2 * 10_000


def test_few_pairs_are_matched_at_once() -> None:
    """Training as usual: the same operations as without a limit."""
    truth, boxes = boxes_on_a_grid(5, 0), boxes_on_a_grid(300, 1)
    with Sizes() as direct:
        match(box_iou(truth, boxes), *RPN_LABELS, keep_best_of_each_object=True)
    with Sizes() as limited:
        match_boxes(truth, boxes, *RPN_LABELS, keep_best_of_each_object=True)
    assert limited.operations == direct.operations > 0
    assert matching._MATCH_BYTES // matching._PAIR_BYTES > 20 * 268_569  # 20 objects at 800 x 1344


def test_sample_takes_foreground_first_and_fills_with_background() -> None:
    torch.manual_seed(0)
    label = torch.tensor([3] * 10 + [7] * 50 + [-1] * 40)
    foreground, background = sample(label, 32, 0.25, background=7)
    assert len(foreground) == 8
    assert len(background) == 24
    assert (label[foreground] == 3).all()
    assert (label[background] == 7).all()
    assert len(set(foreground.tolist())) == 8
    assert len(set(background.tolist())) == 24
    foreground, background = sample(label, 1000, 1.0, background=7)
    assert len(foreground) == 10
    assert len(background) == 50


def test_samples_differ_with_the_random_state() -> None:
    label = torch.zeros(1000)
    torch.manual_seed(0)
    first = sample(label, 10, 0.5, background=0)[1]
    second = sample(label, 10, 0.5, background=0)[1]
    torch.manual_seed(0)
    assert torch.equal(first, sample(label, 10, 0.5, background=0)[1])
    assert not torch.equal(first, second)
