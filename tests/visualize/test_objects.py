"""Pictures show what they should, where they should, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from gn_detect.structures import Detections, Target
from gn_detect.visualize import canvas, draw_detections, draw_ground_truth, objects, picture_scale

SIDE = 512  # large enough not to be enlarged
NAMES = ["disc", "star"]


def noise(height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detections(
    boxes: list[list[float]], scores: list[float], side: int = SIDE, masks: bool = True
) -> Detections:
    """Return discs and stars in turn; each mask is the ellipse in its box."""
    y, x = np.mgrid[0:side, 0:side] + 0.5
    ellipses = [
        ((x - (a + c) / 2) / (c - a)) ** 2 + ((y - (b + d) / 2) / (d - b)) ** 2 < 0.25 for a, b, c, d in boxes
    ]
    return Detections(
        torch.tensor(boxes).reshape(-1, 4),
        torch.tensor(scores),
        torch.arange(len(boxes)) % 2,
        torch.from_numpy(np.array(ellipses).reshape(-1, side, side)) if masks else None,
    )


def changed(picture: np.ndarray, image: np.ndarray) -> np.ndarray:
    return (picture != image).any(axis=-1)


def without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "draw_labels", lambda *_: None)


@pytest.fixture
def plates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, np.ndarray]]:
    """Text and place (``xyxy``) of each label that is drawn, in order."""
    seen: list[tuple[str, np.ndarray]] = []
    flatten = canvas.Canvas.flatten

    def note(self: canvas.Canvas) -> np.ndarray:
        result = flatten(self)
        for text in self.figure.texts:
            x0, y0, x1, y1 = text.get_bbox_patch().get_window_extent().extents
            height = self.picture.shape[0]
            seen.append((text.get_text(), np.array([x0, height - y1, x1, height - y0])))
        return result

    monkeypatch.setattr(canvas.Canvas, "flatten", note)
    return seen


def test_only_objects_are_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    without_labels(monkeypatch)
    image = noise()
    before = image.copy()
    found = detections([[100, 60, 300, 200], [350, 300, 480, 500]], [0.9, 0.8])
    difference = changed(draw_detections(image, found, NAMES), image)
    assert np.array_equal(image, before)
    near = np.zeros((SIDE, SIDE), dtype=bool)
    assert found.masks is not None
    for (x0, y0, x1, y1), mask in zip(found.boxes.int().tolist(), found.masks.numpy(), strict=True):
        near[y0 - 3 : y1 + 3, x0 - 3 : x1 + 3] = True
        near[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3] = False  # the rim, where the box is
        near |= np.array(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(9))) > 0
        assert difference[mask].mean() > 0.95
    assert not difference[~near].any()


def test_fill_and_outline_follow_the_mask_and_its_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    without_labels(monkeypatch)
    image = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
    found = detections([[100, 100, 400, 400]], [0.9])
    assert found.masks is not None
    found.masks[0, 200:300, 200:300] = False
    difference = changed(draw_detections(image, found, NAMES), image)
    assert difference[150:190, 200:300].all()
    assert not difference[206:294, 206:294].any()
    assert difference[198:202, 220:280].all()


def test_low_scores_are_left_out() -> None:
    image = noise()
    found = detections([[100, 60, 300, 200], [350, 300, 480, 500]], [0.9, 0.4])
    assert not changed(draw_detections(image, found, NAMES), image)[250:].any()
    assert np.array_equal(draw_detections(image, found, NAMES), draw_detections(image, found[:1], NAMES))
    assert changed(draw_detections(image, found, NAMES, score_threshold=0.4), image)[300:500, 350:480].any()
    assert np.array_equal(draw_detections(image, found, NAMES, score_threshold=0.95), image)


@pytest.mark.parametrize("masks", [True, False])
def test_nothing_detected_gives_the_image(masks: bool) -> None:
    image = noise()
    assert np.array_equal(draw_detections(image, detections([], [], masks=masks), NAMES), image)


def test_boxes_are_drawn_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    without_labels(monkeypatch)
    image = noise()
    difference = changed(
        draw_detections(image, detections([[100, 60, 300, 200]], [0.9], masks=False), NAMES), image
    )
    assert difference[60, 100:300].all()
    assert difference[60:200, 300].all()
    assert not difference[64:196, 104:296].any()


def test_names_and_scores_are_written(plates: list[tuple[str, np.ndarray]]) -> None:
    found = detections([[100, 60, 300, 200], [350, 300, 480, 500]], [0.9, 0.8])
    found.labels[1] = 7
    draw_detections(noise(), found, ["$disc_1^{$"])
    assert [text for text, _ in plates] == ["$disc_1^{$ 0.90", "class 7 0.80"]


def test_labels_stay_inside_and_do_not_cover_each_other(plates: list[tuple[str, np.ndarray]]) -> None:
    random = np.random.default_rng(1)
    corners = random.uniform(0, SIDE - 30, (40, 2))
    boxes = np.concatenate([corners, corners + random.uniform(10, 30, (40, 2))], axis=1)
    draw_detections(noise(), detections(boxes.tolist(), [0.9] * 40), NAMES, scale=1)
    places = np.array([place for _, place in plates])
    assert len(places) > 15
    assert places.min() >= 0
    assert places.max() <= SIDE
    overlap = canvas.box_overlap(places, places)
    np.fill_diagonal(overlap, 0)
    assert overlap.max() < 0.05 * canvas.box_area(places).min()


def test_many_objects_of_one_class_are_labelled_with_the_score_alone(
    plates: list[tuple[str, np.ndarray]],
) -> None:
    boxes = [
        [20.0 + 60 * (i % 8), 40.0 + 90 * (i // 8), 45.0 + 60 * (i % 8), 70.0 + 90 * (i // 8)]
        for i in range(32)
    ]
    found = detections(boxes, [0.75] * 32)
    found.labels[:] = 0
    draw_detections(noise(), found, ["nucleus"])
    assert [text for text, _ in plates] == ["0.75"] * 32


def test_in_a_crowd_names_stand_at_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes are not drawn there, and a poor mask fills a small part of its box."""
    labelled: list[np.ndarray] = []
    monkeypatch.setattr(objects, "draw_labels", lambda _, boxes, *__: labelled.append(boxes))
    for number in (objects.CROWDED, objects.CROWDED + 1):
        found = detections([[10.0, 10, 500, 500]] * number, [0.9] * number)
        found.masks = torch.zeros(number, SIDE, SIDE, dtype=torch.bool)
        found.masks[:, 300:360, 200:280] = True
        draw_detections(noise(), found, NAMES, scale=1.0)
    few, many = labelled
    np.testing.assert_allclose(few, [[10, 10, 500, 500]] * objects.CROWDED)
    np.testing.assert_allclose(many, [[200, 300, 280, 360]] * (objects.CROWDED + 1), atol=1)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_a_picture_stays_visible_under_many_masks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Compare the contrast under masks that all lie over each other."""
    without_labels(monkeypatch)
    image = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    image[:, SIDE // 2 :] = 255
    boxes = [[100.0 - i, 100.0 - i, 400.0 + i, 400.0 + i] for i in range(count)]
    picture = draw_detections(image, detections(boxes, [0.9] * count), NAMES, scale=1.0).astype(float)
    left = np.abs(picture[250, 300] - picture[250, 200]).mean() / 255
    assert left == pytest.approx(0.62, abs=0.02) if count == 1 else 0.36 < left < 0.46


def test_neighbours_differ_in_colour() -> None:
    x, y = np.meshgrid(np.arange(8) * 50.0, np.arange(8) * 50.0)
    corners = np.stack([x.ravel(), y.ravel()], axis=1)
    colours = objects.pick_colours(np.concatenate([corners, corners + 40], axis=1))
    assert set(colours) == set(objects.COLOURS)
    distance = np.linalg.norm(corners[:, None] - corners, axis=2)
    same = np.array(colours)[:, None] == np.array(colours)
    assert distance[same & (distance > 0)].min() > 80


@pytest.mark.parametrize("size", [(1, 1), (24, 40), (300, 20), (256, 256)])
def test_small_images_are_enlarged(size: tuple[int, int]) -> None:
    height, width = size
    image = noise(height, width)
    masks = torch.zeros(1, height, width, dtype=torch.bool)
    masks[0, height // 3 : height // 3 + 5, width // 2 : width // 2 + 5] = True
    box = torch.tensor([[width // 2, height // 3, width // 2 + 5, height // 3 + 5]]).float()
    picture = draw_detections(
        image, Detections(box, torch.ones(1), torch.zeros(1, dtype=torch.int64), masks), NAMES
    )
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    scale = picture.shape[0] / height
    assert picture.shape[1] == pytest.approx(width * scale, abs=4)
    assert min(picture.shape[:2]) >= 480 or max(picture.shape[:2]) == 1600
    assert max(picture.shape[:2]) <= 1600


def test_pictures_grow_until_small_objects_and_many_labels_are_readable() -> None:
    corners = np.stack(np.meshgrid(np.arange(5) * 100.0, np.arange(4) * 100.0), axis=-1).reshape(-1, 2)
    small, large = (np.concatenate([corners, corners + side], axis=1) for side in (16, 64))
    assert picture_scale((480, 640), large) == 1
    assert picture_scale((480, 640), small) == 2
    assert picture_scale((480, 640), large, labels=60) > 2
    assert picture_scale((480, 640), np.concatenate([large, small[:3]])) == 1, "a few small ones among them"
    assert picture_scale((1080, 1920), small) == 1, "it is wide enough"
    assert picture_scale((100, 100), small) == pytest.approx(4.8), "as without objects"


def test_grey_images_are_drawn_in_colour() -> None:
    grey = noise()[..., 0]
    picture = draw_detections(grey, detections([[100, 60, 300, 200]], [0.9]), NAMES)
    assert np.array_equal(picture[300:], np.stack([grey[300:]] * 3, axis=-1))
    assert (np.ptp(picture[80:180, 150:250].astype(int), axis=-1) > 20).all()


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8)])
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image must be uint8"):
        draw_detections(image, detections([], []), NAMES)


def test_ground_truth_is_drawn_from_polygons_and_bitmaps(plates: list[tuple[str, np.ndarray]]) -> None:
    image = noise()
    polygon = [np.array([100.0, 100, 300, 100, 300, 200, 100, 200])]
    bitmap = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    bitmap[100:200, 100:300] = True
    target = Target(torch.tensor([[100.0, 100, 300, 200]]), torch.tensor([1]), [polygon])
    drawn = draw_ground_truth(image, target, NAMES)
    target.masks = [bitmap]
    assert np.array_equal(draw_ground_truth(image, target, NAMES), drawn)
    assert [text for text, _ in plates] == ["star", "star"]
    assert changed(drawn, image)[120:180, 120:280].mean() > 0.95
    target.masks = None
    assert not changed(draw_ground_truth(image, target, NAMES), image)[120:180, 120:280].all()


def test_an_empty_mask_still_shows_its_box() -> None:
    found = detections([[100, 60, 300, 200]], [0.9])
    assert found.masks is not None
    found.masks[:] = False
    assert changed(draw_detections(noise(), found, NAMES), noise())[200, 100:300].all()


def test_real_annotations_are_drawn(shared_dir: Path) -> None:
    """Every kind of real mask: drawn pixels cover it, far pixels are untouched."""
    from pycocotools.coco import COCO

    folder = shared_dir / "data" / "dsb2018"
    truth = COCO(str(folder / "annotations" / "instances_val.json"))
    record = truth.imgs[sorted(truth.imgs)[2]]
    with Image.open(folder / "images" / record["file_name"]) as picture:
        image = np.array(picture.convert("RGB"))
    annotations = truth.imgToAnns[record["id"]]
    masks = np.array([truth.annToMask(annotation) for annotation in annotations]).astype(bool)
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations])
    boxes[:, 2:] += boxes[:, :2]
    target = Target(boxes, torch.zeros(len(boxes), dtype=torch.int64), [torch.from_numpy(m) for m in masks])
    drawn = draw_ground_truth(image, target, ["nucleus"])
    scale = drawn.shape[0] / image.shape[0]
    difference = changed(drawn, canvas.enlarged(image, scale))
    y, x = (np.mgrid[0 : drawn.shape[0], 0 : drawn.shape[1]] / scale).astype(int)
    anything = np.logical_or.reduce(masks)
    wide = np.array(Image.fromarray(anything).convert("L").filter(ImageFilter.MaxFilter(7))) > 0
    assert difference[anything[y, x]].mean() > 0.99
    assert not difference[~wide[y, x]].any()
