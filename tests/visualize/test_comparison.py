"""Ground truth next to predictions: each outcome has its colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gn_detect.engine.drawing import Classes, draw_entries
from gn_detect.structures import Detections, Target
from gn_detect.visualize import draw_comparison, objects

SIDE = 480
NAMES = ["disc", "star"]
BOXES = torch.tensor([[20.0, 20, 120, 120], [200, 20, 300, 120], [20, 200, 120, 300], [300, 300, 400, 400]])


def colour_in(picture: np.ndarray, box: list[int]) -> str:
    """The outcome whose colour has the hue of a filled box on a black image."""
    x0, y0, x1, y1 = box
    mean = picture[y0 + 10 : y1 - 10, x0 + 10 : x1 - 10].reshape(-1, 3).mean(axis=0)
    if mean.max() < 5:
        return "nothing"
    hues = {
        name: np.array([int(code[i : i + 2], 16) for i in (1, 3, 5)], dtype=float)
        for name, code in objects._COLOURS.items()
    }
    return min(hues, key=lambda name: np.linalg.norm(mean / mean.max() - hues[name] / hues[name].max()))


def masks_of(boxes: torch.Tensor) -> torch.Tensor:
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


@pytest.fixture
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "draw_labels", lambda *_: None)


@pytest.mark.parametrize(("height", "width"), [(1600, 200), (200, 6000)])
def test_the_legend_fits_above_elongated_pictures(height: int, width: int) -> None:
    image, mask = (
        np.zeros((height, width, 3), dtype=np.uint8),
        torch.zeros(1, height, width, dtype=torch.bool),
    )
    mask[:, 20:120, 20:120] = True
    found = Detections(BOXES[:1], torch.tensor([0.9]), torch.tensor([0]), mask)
    target = Target(BOXES[:1], torch.tensor([0]), list(mask))
    picture = draw_comparison(image, target, found, NAMES, np.array([0]))
    strip = picture[:-height]
    assert len(strip) <= 200, "for 200 rows of the picture"
    ink = (strip < 128).any(axis=(0, 2))
    middle = strip.shape[1] // 2
    assert ink.any()
    assert not ink[:2].any()
    assert not ink[-2:].any()
    assert not ink[middle - 6 : middle + 6].any()


@pytest.mark.usefixtures("unnamed")
def test_each_outcome_has_its_colour_in_its_half() -> None:
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    target = Target(BOXES[:3], torch.tensor([0, 1, 1]), list(masks_of(BOXES[:3])))
    found = Detections(
        BOXES[[0, 1, 3, 3]], torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 1, 1]), None
    )
    found.masks = masks_of(found.boxes)
    found = found[:3]
    picture = draw_comparison(image, target, found, NAMES, np.array([0, 1, -1]))
    truth, prediction = picture[-SIDE:, :SIDE], picture[-SIDE:, -SIDE:]
    boxes = BOXES.int().tolist()
    assert [colour_in(truth, box) for box in boxes] == ["found", "other class", "missed", "nothing"]
    assert [colour_in(prediction, box) for box in boxes] == ["found", "other class", "nothing", "false"]


@pytest.mark.usefixtures("unnamed")
def test_detections_in_crowds_are_neither_right_nor_wrong() -> None:
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    target = Target(BOXES[:0], torch.zeros(0, dtype=torch.int64), [])
    found = Detections(BOXES[:1], torch.tensor([0.9]), torch.tensor([0]), masks_of(BOXES[:1]))
    picture = draw_comparison(image, target, found, NAMES, np.array([-2]))
    assert colour_in(picture[-SIDE:, -SIDE:], BOXES[0].int().tolist()) == "in a crowd"


def test_nothing_in_an_image_gives_two_plain_halves() -> None:
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    nothing = torch.zeros(0, dtype=torch.int64)
    target = Target(BOXES[:0], nothing, None)
    found = Detections(BOXES[:0], torch.zeros(0), nothing, None)
    picture = draw_comparison(image, target, found, NAMES, np.zeros(0, dtype=np.int64))
    assert np.array_equal(picture[-SIDE:, :SIDE], image)
    assert np.array_equal(picture[-SIDE:, -SIDE:], image)


def test_in_a_crowd_mistakes_alone_are_named() -> None:
    outcomes = ["found"] * 20 + ["missed", "false", "other class", "in a crowd"]
    spoken = objects._labels(outcomes, [f"star {i}" for i in range(24)])
    assert [name for name in spoken if name] == ["star 20", "star 21", "star 22"]
    assert all(objects._labels(outcomes[:15], ["star"] * 15))


def test_detections_without_masks_are_compared() -> None:
    """COCO entries of a model with boxes alone."""
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    boxes = [[20.0, 20, 100, 100], [200, 20, 100, 100], [20, 200, 100, 100]]
    entries = [{"bbox": box, "category_id": 3, "score": 0.9, "iscrowd": 0} for box in boxes]
    picture = draw_entries(image, entries, Classes(["disc"], [3]), entries)
    assert picture[-SIDE:, :SIDE].any()
    assert picture[-SIDE:, -SIDE:].any()


def test_real_nuclei_are_compared(shared_dir: Path) -> None:
    """Ground truth compared with itself: every object is found, in both halves."""
    from gn_detect.evaluation import match_objects, read_truth

    truth = read_truth(shared_dir / "data" / "dsb2018" / "annotations" / "instances_val.json", "segm")
    objects = max(truth.objects.values(), key=len)
    found = [{**entry, "score": 0.9} for entry in objects]
    matched, iou = match_objects(objects, found, "segm")
    assert matched.tolist() == list(range(len(objects)))
    assert iou.min() == 1


def test_a_name_stands_at_the_mask_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A poor mask fills a small part of its box, which is not drawn."""
    labelled: list[np.ndarray] = []
    monkeypatch.setattr(objects, "draw_labels", lambda _, boxes, *__: labelled.append(boxes))
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    small = torch.tensor([[300.0, 260, 360, 330]])
    box = torch.tensor([[20.0, 20, 460, 460]])
    found = Detections(box, torch.tensor([0.9]), torch.tensor([0]), masks_of(small))
    draw_comparison(image, Target(box, torch.tensor([1]), None), found, NAMES, np.array([-1]), scale=1.0)
    truth, prediction = labelled
    np.testing.assert_allclose(truth, box, err_msg="without a mask the box is drawn")
    np.testing.assert_allclose(prediction, small, atol=1)
