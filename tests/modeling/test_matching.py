"""Matching and sampling."""

from __future__ import annotations

import torch

from gn_detect.modeling.matching import match, sample


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
    assert index.tolist() == [0] * 5 and label.tolist() == [0] * 5


def test_sample_takes_foreground_first_and_fills_with_background() -> None:
    torch.manual_seed(0)
    label = torch.tensor([3] * 10 + [7] * 50 + [-1] * 40)
    foreground, background = sample(label, 32, 0.25, background=7)
    assert len(foreground) == 8 and len(background) == 24
    assert (label[foreground] == 3).all() and (label[background] == 7).all()
    assert len(set(foreground.tolist())) == 8 and len(set(background.tolist())) == 24
    foreground, background = sample(label, 1000, 1.0, background=7)
    assert len(foreground) == 10 and len(background) == 50


def test_samples_differ_with_the_random_state() -> None:
    label = torch.zeros(1000)
    torch.manual_seed(0)
    first = sample(label, 10, 0.5, background=0)[1]
    second = sample(label, 10, 0.5, background=0)[1]
    torch.manual_seed(0)
    assert torch.equal(first, sample(label, 10, 0.5, background=0)[1])
    assert not torch.equal(first, second)
