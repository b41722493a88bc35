"""Pictures show what they should, where they should, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gn_detect import visualize
from gn_detect.errors import UserError
from gn_detect.structures import Detections, Target
from gn_detect.visualize import (
    draw_detections,
    draw_ground_truth,
    plot_curves,
    save_picture,
    save_picture_grid,
    side_by_side,
)

SIDE = 512  # large enough not to be enlarged
NAMES = ["disc", "star"]


def noise(height: int = SIDE, width: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def detections(
    boxes: list[list[float]], scores: list[float], side: int = SIDE, masks: bool = True
) -> Detections:
    """Of disc and star in turn; each mask is the ellipse in the box."""
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
    monkeypatch.setattr(visualize, "_draw_labels", lambda *_: None)


@pytest.fixture
def plates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, np.ndarray]]:
    """Text and place (``xyxy``) of each label that is drawn, in order."""
    seen: list[tuple[str, np.ndarray]] = []
    flatten = visualize._flatten

    def note(figure: Any, picture: np.ndarray) -> np.ndarray:
        result = flatten(figure, picture)
        for text in figure.texts:
            x0, y0, x1, y1 = text.get_bbox_patch().get_window_extent().extents
            seen.append((text.get_text(), np.array([x0, SIDE - y1, x1, SIDE - y0])))
        return result

    monkeypatch.setattr(visualize, "_flatten", note)
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
        near |= np.array(Image.fromarray(mask).convert("L").filter(visualize.ImageFilter.MaxFilter(9))) > 0
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
    assert difference[60, 100:300].all() and difference[60:200, 300].all()
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
    draw_detections(noise(), detections(boxes.tolist(), [0.9] * 40), NAMES)
    places = np.array([place for _, place in plates])
    assert len(places) > 15
    assert places.min() >= 0 and places.max() <= SIDE
    overlap = visualize._overlap(places, places)
    np.fill_diagonal(overlap, 0)
    assert overlap.max() < 0.05 * visualize._area(places).min()


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


def test_neighbours_differ_in_colour() -> None:
    x, y = np.meshgrid(np.arange(8) * 50.0, np.arange(8) * 50.0)
    corners = np.stack([x.ravel(), y.ravel()], axis=1)
    colours = visualize._pick_colours(np.concatenate([corners, corners + 40], axis=1))
    assert set(colours) == set(visualize.COLOURS)
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
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    scale = picture.shape[0] / height
    assert picture.shape[1] == pytest.approx(width * scale, abs=1)
    assert min(picture.shape[:2]) == 480 or max(picture.shape[:2]) == 1600


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


def test_pictures_stand_side_by_side_under_their_titles() -> None:
    low, high = noise(100, 150), noise(200, 100)
    row = side_by_side([low, high])
    assert row.shape == (200, 300 + 8 + 100, 3)
    assert np.array_equal(row[:, -100:], high)
    titled = side_by_side([low, high], ["truth", "found"])
    assert np.array_equal(titled[-200:], row)
    strip = titled[:-200]
    assert (
        (strip[:, 100:200] < 100).any() and (strip[:, -70:-30] < 100).any() and (strip[:, :50] == 255).all()
    )
    with pytest.raises(ValueError, match="1 titles for 2 pictures"):
        side_by_side([low, high], ["truth"])


def test_grid_rows_have_one_width(tmp_path: Path) -> None:
    save_picture_grid(
        tmp_path / "new" / "grid.png", [[noise(100, 150), noise(50, 80)], [noise(200, 100)], []]
    )
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        assert picture.width > 150 and picture.height > 150
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


def test_picture_formats_follow_the_suffix(tmp_path: Path) -> None:
    for suffix, kind in ((".png", "PNG"), (".JPG", "JPEG"), (".webp", "WEBP")):
        save_picture(tmp_path / f"a{suffix}", noise(20, 30))
        with Image.open(tmp_path / f"a{suffix}") as picture:
            assert picture.format == kind and picture.size == (30, 20)
    with pytest.raises(UserError, match=r"a\.bmpp: its name must end in \.png"):
        save_picture(tmp_path / "a.bmpp", noise(20, 30))


def test_a_failed_save_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_picture_grid(path, [[noise(20, 30)]])
    before = path.read_bytes()

    def full_disk(self: Image.Image, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match=r"grid\.png: No space left"):
        save_picture_grid(path, [[noise(40, 30)]])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]


def write_metrics(path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"iteration": i, "total_loss": 3 / (i + 1), "loss_cls": 1 / (i + 1), "lr": 0.01, "time": 0.3}
        for i in range(0, 100, 20)
    ]
    rows[2]["loss_cls"] = None
    rows.append({"iteration": 99, "bbox/AP": 40.0, "segm/AP": 41.0, "bbox/AP50": 60.0, "bbox/AP-disc": 3.0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 120, "total_lo')


def test_curves_are_plotted(tmp_path: Path) -> None:
    import matplotlib

    settings = dict(matplotlib.rcParams)
    write_metrics(tmp_path / "metrics.jsonl")
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture).astype(int)
    assert pixels.shape[1] > pixels.shape[0] > 300
    assert (pixels.min(axis=-1) < 128).any() and (np.ptp(pixels, axis=-1) > 60).any()
    assert pixels[0].min() == 255
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("content", [None, "", '{"iteration": 3, "time": 1.0}\n', "\x00\n[1]\n"])
def test_nothing_to_plot_is_an_error_without_a_file(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


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
    difference = changed(drawn, visualize._enlarged(image))
    scale = drawn.shape[0] / image.shape[0]
    y, x = (np.mgrid[0 : drawn.shape[0], 0 : drawn.shape[1]] / scale).astype(int)
    anything = np.logical_or.reduce(masks)
    wide = np.array(Image.fromarray(anything).convert("L").filter(visualize.ImageFilter.MaxFilter(7))) > 0
    assert difference[anything[y, x]].mean() > 0.99
    assert not difference[~wide[y, x]].any()
