"""Random augmentation: ranges, determinism, and what must survive it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from gn_detect.config import load_config
from gn_detect.data import build_augmentations, prepare_image
from gn_detect.data.augmentation import (
    ColorJitter,
    LargeScaleJitter,
    RandomAffine,
    RandomCrop,
    RandomFlip,
    RandomRotate90,
    ResizeShortestEdge,
    crop_with_object,
)
from gn_detect.data.transforms import LabelledImage, bitmap_bounds, crop, drawn, to_target
from gn_detect.errors import UserError
from gn_detect.ops.masks import rasterize_polygons


def scene(height: int = 40, width: int = 60) -> LabelledImage:
    """One small square near a corner, as a bitmap, and one triangle."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    square = np.zeros((height, width), dtype=bool)
    square[2:6, 50:54] = True
    boxes = np.array([[50.0, 2, 54, 6], [5, 20, 15, 30]])
    return LabelledImage(image, boxes, np.array([0, 1]), [square, [np.array([5.0, 20, 15, 20, 5, 30])]])


def test_choice_and_range_of_sizes() -> None:
    choice, between = ResizeShortestEdge((20, 30, 50), 1000), ResizeShortestEdge((20, 24), 1000, "range")
    random = np.random.default_rng(0)
    assert {min(choice(scene(), random).size) for _ in range(40)} == {20, 30, 50}
    assert {min(between(scene(), random).size) for _ in range(60)} == {20, 21, 22, 23, 24}
    assert max(ResizeShortestEdge((40,), 50)(scene(), random).size) == 50


@pytest.mark.parametrize("vertical", [False, True])
def test_half_of_the_images_are_flipped(vertical: bool) -> None:
    random, original = np.random.default_rng(0), scene()
    axis = 0 if vertical else 1
    flipped = 0
    for _ in range(200):
        found = RandomFlip(vertical)(original, random).image
        is_same = np.array_equal(found, original.image)
        assert is_same or np.array_equal(found, np.flip(original.image, axis))
        flipped += not is_same
    assert 75 < flipped < 125


@pytest.mark.parametrize(
    ("kind", "amount", "heights", "widths"),
    [
        ("relative", (0.5, 0.25), (20, 20), (15, 15)),
        ("relative_range", (0.5, 0.5), (20, 40), (30, 60)),
        ("absolute", (30, 100), (30, 30), (60, 60)),
        ("absolute_range", (10, 50), (10, 40), (10, 50)),
    ],
)
def test_crop_sizes(kind: str, amount: tuple, heights: tuple, widths: tuple) -> None:
    random, crop = np.random.default_rng(0), RandomCrop(kind, amount)
    sizes = np.array([crop(scene(), random).size for _ in range(200)])
    for found, (low, high) in zip(sizes.T, (heights, widths), strict=True):
        assert low <= found.min()
        assert found.max() <= high
        assert low == high or found.max() - found.min() > 0.8 * (high - low)


def test_every_crop_keeps_an_object() -> None:
    random, crop = np.random.default_rng(0), RandomCrop("absolute", (6, 6))
    seen = set()
    for _ in range(300):
        target = to_target(crop(scene(), random), boxes_from_masks=True)
        assert len(target) > 0
        seen.update(target.labels.tolist())
    assert seen == {0, 1}


@pytest.mark.parametrize(
    ("kind", "amount"),
    [
        ("relative", (0.3, 0.4)),
        ("relative_range", (0.3, 0.3)),
        ("absolute", (13, 21)),
        ("absolute_range", (9, 33)),
    ],
)
def test_a_crop_is_a_window_around_the_centre_of_an_object(kind: str, amount: tuple) -> None:
    """Each pixel names its place, so the window can be read off; polygons and bitmaps are cut alike."""
    original, (height, width) = scene(), (40, 60)
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(height)[:, None], np.arange(width)
    x0, y0, x1, y1 = 3, 18, 21, 33  # a rectangle as a polygon and as a bitmap: one to draw, one to slice
    bitmap = np.zeros((height, width), dtype=bool)
    bitmap[y0:y1, x0:x1] = True
    polygon = [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]
    boxes = np.concatenate([original.boxes[:1], np.array([[x0, y0, x1, y1]] * 2, dtype=np.float64)])
    masks = [original.masks[0], polygon, bitmap]
    labelled, crop = LabelledImage(image, boxes, np.arange(3), masks), RandomCrop(kind, amount)
    centres, hit = np.array([[4, 52], [25, 12], [25, 12]]), set()
    for seed in range(60):
        cropped = crop(labelled, np.random.default_rng([7, seed]))
        (top, left), (rows, columns) = cropped.image[0, 0, :2].tolist(), cropped.size
        np.testing.assert_array_equal(cropped.image, image[top : top + rows, left : left + columns])
        inside = ((centres >= [top, left]) & (centres < [top + rows, left + columns])).all(axis=1)
        assert inside.any()
        hit.update(np.flatnonzero(inside).tolist())
        target = to_target(cropped, draw_polygons=True, boxes_from_masks=True)
        for label, box, mask in zip(target.labels.tolist(), target.boxes, target.masks, strict=True):
            whole = masks[0] if label == 0 else bitmap
            part = whole[top : top + rows, left : left + columns]
            np.testing.assert_array_equal(mask.numpy(), part)
            np.testing.assert_array_equal(box.numpy(), bitmap_bounds(part))
        again = crop(labelled, np.random.default_rng([7, seed]))
        np.testing.assert_array_equal(again.image, cropped.image)
    assert hit == {0, 1, 2}


def test_ring_whose_centre_is_empty_is_kept_too() -> None:
    ring = np.ones((30, 30), dtype=bool)
    ring[1:29, 1:29] = False
    original = LabelledImage(
        np.zeros((30, 30, 3), np.uint8), np.array([[0.0, 0, 30, 30]]), np.array([0]), [ring]
    )
    random = np.random.default_rng(0)
    assert len(crop_with_object(original, 10, 10, random)) == 1  # no window with the centre touches the ring
    assert len(crop_with_object(original, 28, 28, random)) == 1


def test_crop_of_an_image_without_objects() -> None:
    empty = LabelledImage(np.zeros((40, 60, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, np.int64), [])
    cropped = RandomCrop("absolute", (6, 7))(empty, np.random.default_rng(0))
    assert cropped.size == (6, 7)
    assert len(to_target(cropped, boxes_from_masks=True)) == 0


CROP = "INPUT.CROP"


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        (f"{CROP}.SIZE", {f"{CROP}.TYPE": "relative", f"{CROP}.SIZE": [0, 1]}),
        (f"{CROP}.SIZE", {f"{CROP}.TYPE": "relative_range", f"{CROP}.SIZE": [1.5, 1]}),
        (f"{CROP}.SIZE", {f"{CROP}.TYPE": "absolute_range", f"{CROP}.SIZE": [9, 5]}),
        (f"{CROP}.TYPE", {f"{CROP}.TYPE": "circle"}),
        ("INPUT.MIN_SIZE_TRAIN", {"INPUT.MIN_SIZE_TRAIN": [1, 2, 3]}),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", {"INPUT.MIN_SIZE_TRAIN_SAMPLING": "any"}),
        ("INPUT.LARGE_SCALE_JITTER", {"INPUT.LARGE_SCALE_JITTER.MIN_SCALE": 3}),
        ("INPUT.COLOR_JITTER.HUE", {"INPUT.COLOR_JITTER.HUE": 0.6}),
        ("INPUT.RANDOM_FLIP", {"INPUT.RANDOM_FLIP": "both"}),
        ("INPUT.AFFINE", {"INPUT.AFFINE.MIN_SCALE": 2}),
        ("INPUT.AFFINE.DEGREES", {"INPUT.AFFINE.DEGREES": 200}),
        ("INPUT.COPY_PASTE", {"INPUT.COPY_PASTE": 1.5}),
        ("INPUT.COPY_PASTE", {"INPUT.COPY_PASTE": 0.5, "MODEL.MASK_ON": False}),
    ],
)
def test_impossible_settings_are_refused(key: str, changes: dict[str, Any]) -> None:
    base = {
        "INPUT.CROP.ENABLED": True,
        "INPUT.LARGE_SCALE_JITTER.ENABLED": True,
        "INPUT.MIN_SIZE_TRAIN": [20, 30],
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
    }
    with pytest.raises(UserError, match=key):
        build_augmentations(load_config("quick/demo.yaml").replace(base | changes))


def test_large_scale_jitter_has_a_fixed_size_and_keeps_an_object() -> None:
    random, jitter = np.random.default_rng(0), LargeScaleJitter(0.5, 2.0, (32, 48))
    padded = 0
    for _ in range(60):
        found = jitter(scene(), random)
        assert found.size == (32, 48)
        padded += (found.image[-1] == 128).all()
        assert len(to_target(found, boxes_from_masks=True)) > 0
    assert 0 < padded < 60


def test_colour_jitter_is_torchvisions() -> None:
    original = scene()
    plain = torch.from_numpy(original.image).permute(2, 0, 1)
    brighter = ColorJitter(0.3, 0, 0, 0)(original, np.random.default_rng(5)).image
    factors = np.linspace(0.7, 1.3, 2001)
    candidates = [v2.functional.adjust_brightness(plain, f).permute(1, 2, 0).numpy() for f in factors]
    assert min(np.abs(c.astype(int) - brighter).max() for c in candidates) <= 1
    same = ColorJitter(0, 0, 0, 0)(original, np.random.default_rng(5)).image
    np.testing.assert_allclose(same.astype(int), original.image, atol=1)
    twice = [ColorJitter(0.4, 0.4, 0.4, 0.1)(original, np.random.default_rng(5)).image for _ in range(2)]
    np.testing.assert_array_equal(*twice)
    assert not np.array_equal(twice[0], original.image)


def test_turns_by_90_degrees() -> None:
    """All four, evenly; boxes are those of the turned masks."""
    random, original, seen = np.random.default_rng(0), scene(), [0] * 4
    square = original.masks[0]
    for _ in range(80):
        found = RandomRotate90()(original, random)
        (quarters,) = [k for k in range(4) if np.array_equal(found.image, np.rot90(original.image, k))]
        seen[quarters] += 1
        np.testing.assert_array_equal(found.masks[0], np.rot90(square, quarters))
        np.testing.assert_array_equal(found.boxes[0], bitmap_bounds(np.rot90(square, quarters)))
        x0, y0, x1, y1 = found.boxes[1]
        points = found.masks[1][0].reshape(-1, 2)
        np.testing.assert_array_equal([*points.min(axis=0), *points.max(axis=0)], [x0, y0, x1, y1])
        assert (x1 - x0, y1 - y0) == (10, 10)
        assert [x0, y0] == [[5, 20], [20, 45], [45, 10], [10, 5]][quarters]
    assert min(seen) > 10


class LargestValues:
    """A generator that always draws the upper end."""

    def uniform(self, low: float, high: float, size: int | None = None) -> Any:
        return high if size is None else np.full(size, high)


@pytest.mark.parametrize(
    ("degrees", "translate", "scale"),
    [(30, 0, 1), (0, 0.1, 1), (0, 0, 1.25), (-17, 0.05, 0.8), (180, 0.05, 1.1)],
)
def test_affine_maps_are_torchvisions(degrees: float, translate: float, scale: float) -> None:
    original = scene()
    found = RandomAffine(degrees, translate, scale, scale)(original, LargestValues())

    def by_torchvision(pixels: np.ndarray, mode: InterpolationMode, fill: int) -> np.ndarray:
        moves = [60 * translate, 40 * translate]
        picture = Image.fromarray(pixels)
        return np.asarray(v2.functional.affine(picture, degrees, moves, scale, [0.0, 0.0], mode, fill))

    expected = by_torchvision(original.image, InterpolationMode.BILINEAR, 128)
    assert np.abs(found.image.astype(int) - expected).max() <= 1
    square = by_torchvision(original.masks[0].view(np.uint8), InterpolationMode.NEAREST, 0).view(bool)
    if square.any():
        np.testing.assert_array_equal(found.masks[0], square)
    triangle = rasterize_polygons(original.masks[1], 40, 60)
    moved = by_torchvision(triangle.view(np.uint8), InterpolationMode.NEAREST, 0).view(bool)
    drawn = rasterize_polygons(found.masks[-1], 40, 60)
    assert (drawn ^ moved).sum() <= 0.3 * moved.sum()  # of 55 pixels, 30 are at the border
    target = to_target(found, draw_polygons=True, boxes_from_masks=True)
    kept = [mask for mask in (square, drawn) if mask.any()]
    np.testing.assert_array_equal([mask.numpy() for mask in target.masks], kept)
    np.testing.assert_allclose(target.boxes, [bitmap_bounds(mask) for mask in kept], atol=1)


def test_objects_that_an_affine_map_moves_out_are_dropped() -> None:
    """By 12 pixels to the right and 8 down: the square leaves the image, the triangle stays whole."""
    original = scene()
    found = RandomAffine(0, 0.2, 1, 1)(original, LargestValues())
    assert found.labels.tolist() == [1]
    np.testing.assert_array_equal(found.image[8:, 12:], original.image[:-8, :-12])
    assert (found.image[:8] == 128).all() and (found.image[:, :12] == 128).all()
    target = to_target(found, boxes_from_masks=True)
    assert target.labels.tolist() == [1]
    assert target.boxes.tolist() == [[17, 28, 27, 38]]
    without_masks = LabelledImage(original.image, original.boxes, original.labels)
    moved = to_target(RandomAffine(0, 0.2, 1, 1)(without_masks, LargestValues()))
    assert moved.boxes.tolist() == [[17, 28, 27, 38]]


def test_random_affine_maps_are_within_their_ranges() -> None:
    """The corner of a polygon far from the centre shows angle and size."""
    image, box, polygon = np.zeros((64, 64, 3), np.uint8), [32.0, 32, 64, 64], [32.0, 32, 64, 32, 32, 64]
    labelled = LabelledImage(image, np.array([box]), np.zeros(1, int), [[np.array(polygon)]])
    random, seen = np.random.default_rng(0), []
    for _ in range(200):
        centre, right, _ = RandomAffine(20, 0.1, 0.5, 1.5)(labelled, random).masks[0][0].reshape(3, 2)
        step = right - centre
        seen.append([np.degrees(np.arctan2(step[1], step[0])), np.hypot(*step) / 32, *(centre - 32) / 64])
    low, high = np.min(seen, axis=0), np.max(seen, axis=0)
    limits, slack = np.array([[-20, 0.5, -0.1, -0.1], [20, 1.5, 0.1, 0.1]]), np.array([1, 0.05, 0.01, 0.01])
    assert (low >= limits[0] - 1e-9).all() and (low < limits[0] + slack).all()
    assert (high <= limits[1] + 1e-9).all() and (high > limits[1] - slack).all()


def test_config_chooses_the_augmentations(make_cfg: Callable[..., Any]) -> None:
    def names(**changes: Any) -> list[str]:
        return [type(augment).__name__ for augment in build_augmentations(make_cfg(**changes))]

    assert names() == ["ResizeShortestEdge", "RandomFlip"]
    assert names(input__random_flip="none") == ["ResizeShortestEdge"]
    assert names(input__crop__enabled=True, input__color_jitter__enabled=True) == [
        "RandomCrop",
        "ResizeShortestEdge",
        "RandomFlip",
        "ColorJitter",
    ]
    assert names(input__large_scale_jitter__enabled=True) == ["LargeScaleJitter", "RandomFlip"]
    assert names(input__rotate_90=True, input__affine__enabled=True) == [
        "ResizeShortestEdge",
        "RandomFlip",
        "RandomRotate90",
        "RandomAffine",
    ]


def test_image_for_inference(make_cfg: Callable[..., Any]) -> None:
    image = scene(20, 60).image
    assert prepare_image(image, make_cfg()).shape == (3, 40, 120)
    kept = prepare_image(image[:, ::-1], make_cfg(input__min_size_test=0, input__format="RGB"))
    np.testing.assert_array_equal(kept.permute(1, 2, 0).numpy(), image[:, ::-1])


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize(
    "step",
    [RandomAffine(30.0, 0.3, 0.5, 0.9), LargeScaleJitter(0.5, 0.9, (60, 60))],
    ids=["affine", "jitter"],
)
def test_what_a_crop_cut_off_does_not_come_back(step: Any, with_masks: bool) -> None:
    """The image is white and the padding is grey: no mask or box corner lies on the padding alone."""
    square = [np.array([10.0, 10, 30, 10, 30, 30, 10, 30])]
    image = np.full((40, 40, 3), 255, dtype=np.uint8)
    whole = LabelledImage(
        image, np.array([[10.0, 10, 30, 30]]), np.array([1]), [square] if with_masks else None
    )
    for left, top in ((0, 0), (20, 0), (0, 20), (20, 20)):
        for seed in range(5):
            found = step(crop(whole, left, top, 20, 20), np.random.default_rng(seed))
            if with_masks and len(found):
                mask = drawn(found.masks[0], *found.size)
                assert mask.any() and (found.image[mask] == 255).all()
            elif len(found) and isinstance(step, LargeScaleJitter):
                rows, columns = np.nonzero((found.image == 255).all(axis=2))
                assert found.boxes[0, 2] <= columns.max() + 1 and found.boxes[0, 3] <= rows.max() + 1
