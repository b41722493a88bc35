"""Images, boxes and masks move together, and exactly as detectron2 moves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gn_detect.data import read_image
from gn_detect.data.augmentation import shortest_edge_size
from gn_detect.data.transforms import (
    LabelledImage,
    bitmap_bounds,
    crop,
    flip_horizontal,
    flip_vertical,
    pad,
    polygon_bounds,
    resize,
    resize_pixels,
    to_target,
    to_tensor,
)
from gn_detect.ops.masks import rasterize_polygons


def labelled(height: int, width: int, rectangles: np.ndarray, bitmaps: bool) -> LabelledImage:
    """An image whose objects are rectangles (N, 4) ``xyxy`` of whole pixels."""
    image = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    masks: list = []
    for x0, y0, x1, y1 in rectangles:
        if bitmaps:
            mask = np.zeros((height, width), dtype=bool)
            mask[y0:y1, x0:x1] = True
            masks.append(mask)
        else:
            masks.append([np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)])
    labels = np.arange(len(rectangles))
    return LabelledImage(image, rectangles.astype(np.float64), labels, masks)


@st.composite
def scenes(draw: st.DrawFn, bitmaps: bool | None = None) -> LabelledImage:
    """Images of 8 to 40 pixels with up to 4 rectangles."""
    height, width = draw(st.integers(8, 40)), draw(st.integers(8, 40))
    rectangles = []
    for _ in range(draw(st.integers(0, 4))):
        x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        rectangles.append((x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))))
    kind = draw(st.booleans()) if bitmaps is None else bitmaps
    return labelled(height, width, np.array(rectangles, dtype=int).reshape(-1, 4), kind)


def test_resize_is_detectron2s_to_the_bit(shared_dir: Path) -> None:
    data = shared_dir / "data" / "dsb2018"
    record = json.loads((data / "annotations" / "instances_val.json").read_text())["images"][0]
    oracle = np.load(shared_dir / "oracles" / "dsb_r18_gn" / "inference_first_val_image.npz")
    image = read_image(data / "images" / record["file_name"], "RGB", (record["height"], record["width"]))
    resized = resize_pixels(image, *shortest_edge_size(*image.shape[:2], 256, 384))
    np.testing.assert_array_equal(resized[:, :, ::-1], oracle["image_resized_uint8"])
    assert to_tensor(resized, "BGR").is_contiguous()
    np.testing.assert_array_equal(
        to_tensor(resized, "BGR").numpy().transpose(1, 2, 0), oracle["image_resized_uint8"]
    )


@pytest.mark.parametrize(
    ("size", "length", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 900), 800, 1333, (444, 1333)),
        ((500, 500), 333, 1333, (333, 333)),
        ((37, 91), 0, 10, (37, 91)),
        ((1, 5000), 100, 200, (1, 200)),
    ],
)
def test_shortest_edge_size(size: tuple, length: int, longest: int, expected: tuple) -> None:
    assert shortest_edge_size(*size, length, longest) == expected


@settings(max_examples=40, deadline=None)
@given(scenes(), st.sampled_from([flip_horizontal, flip_vertical]))
def test_flips_move_boxes_and_masks_together(scene: LabelledImage, flip: Callable) -> None:
    flipped = flip(scene)
    check_boxes_match_masks(flipped)
    axis = 1 if flip is flip_horizontal else 0
    np.testing.assert_array_equal(flipped.image, np.flip(scene.image, axis))
    twice = flip(flipped)
    np.testing.assert_array_equal(twice.image, scene.image)
    np.testing.assert_array_equal(twice.boxes, scene.boxes)


def check_boxes_match_masks(scene: LabelledImage, tolerance: float = 1e-9) -> None:
    """Masks are rectangles here, so their bounds are the boxes."""
    for box, mask in zip(scene.boxes, scene.masks, strict=True):
        found = bitmap_bounds(mask) if isinstance(mask, np.ndarray) else polygon_bounds(mask, *scene.size)
        np.testing.assert_allclose(found, box, atol=tolerance)


@settings(max_examples=40, deadline=None)
@given(scenes(), st.integers(8, 80), st.integers(8, 80))
def test_resize_moves_boxes_and_masks_together(scene: LabelledImage, height: int, width: int) -> None:
    resized = resize(scene, height, width)
    assert resized.size == (height, width)
    scale = np.array([width / scene.size[1], height / scene.size[0]] * 2)
    np.testing.assert_allclose(resized.boxes, scene.boxes * scale)
    for box, mask in zip(resized.boxes, resized.masks, strict=True):
        if isinstance(mask, list):
            np.testing.assert_allclose(polygon_bounds(mask, height, width), box)
        elif mask.any():  # a nearest pixel is off by half a pixel at most
            np.testing.assert_allclose(bitmap_bounds(mask), box, atol=0.5 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(scenes(), st.data())
def test_crop_keeps_what_is_inside(scene: LabelledImage, data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(1, side)) for side in scene.size)
    top = data.draw(st.integers(0, scene.size[0] - height))
    left = data.draw(st.integers(0, scene.size[1] - width))
    cropped = crop(scene, left, top, height, width)
    assert cropped.size == (height, width)
    np.testing.assert_array_equal(cropped.image, scene.image[top : top + height, left : left + width])
    check_boxes_match_masks(cropped)
    inside = np.zeros((len(scene), height, width), dtype=bool)
    for i, (x0, y0, x1, y1) in enumerate(scene.boxes.astype(int)):
        inside[i, max(y0 - top, 0) : max(y1 - top, 0), max(x0 - left, 0) : max(x1 - left, 0)] = True
    assert cropped.labels.tolist() == [i for i in range(len(scene)) if inside[i].any()]
    target = to_target(cropped, draw_polygons=True, boxes_from_masks=True)
    for label, mask in zip(target.labels, target.masks, strict=True):
        np.testing.assert_array_equal(mask.numpy(), inside[label])


@settings(max_examples=30, deadline=None)
@given(scenes(), st.integers(0, 9), st.integers(0, 9))
def test_pad_moves_nothing(scene: LabelledImage, below: int, right: int) -> None:
    height, width = scene.size[0] + below, scene.size[1] + right
    padded = pad(scene, height, width)
    assert padded.size == (height, width)
    np.testing.assert_array_equal(padded.boxes, scene.boxes)
    check_boxes_match_masks(padded)
    outside = np.ones((height, width), dtype=bool)
    outside[: scene.size[0], : scene.size[1]] = False
    assert (padded.image[outside] == 128).all()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(-30, 60), st.integers(-30, 60)), min_size=3, max_size=9))
def test_polygon_bounds_agree_with_drawing(points: list[tuple[int, int]]) -> None:
    """On a grid 16 times finer, where drawing is exact to about a sixteenth of a pixel."""
    polygon, fine = np.array(points, dtype=np.float64).reshape(-1), 16
    found = polygon_bounds([polygon], 24, 32)
    # The canvas is large enough for the whole polygon: pycocotools is inexact for negative coordinates.
    drawn = rasterize_polygons([(polygon + 30) * fine], 90 * fine, 90 * fine)
    drawn = drawn[30 * fine : 54 * fine, 30 * fine : 62 * fine]
    if drawn.any():
        expected = bitmap_bounds(drawn) / fine
        # Drawing leaves out slivers thinner than a pixel of the fine grid, so it can only be smaller.
        assert (found[:2] <= expected[:2] + 0.1).all()
        assert (found[2:] >= expected[2:] - 0.1).all()


def test_polygon_bounds_of_special_shapes() -> None:
    around = np.array([-5.0, -5, 50, -5, 50, 50, -5, 50])
    np.testing.assert_array_equal(polygon_bounds([around], 20, 30), [0, 0, 30, 20])
    outside = np.array([-5.0, -5, -1, -5, -1, 50])
    np.testing.assert_array_equal(polygon_bounds([outside], 20, 30), np.zeros(4))
    np.testing.assert_array_equal(polygon_bounds([], 20, 30), np.zeros(4))
    # An arch over the window whose legs stand in it: cutting edge by edge would add the upper corners.
    arch = np.array([-5.0, 5, 5, 5, 5, 8, -8, 8, -8, -9, 40, -9, 40, 8, 25, 8, 25, 5, 35, 5, 35, -5, -5, -5])
    np.testing.assert_array_equal(polygon_bounds([arch], 20, 30), [0, 5, 30, 8])
    inside = np.array([1.5, 2.25, 9.125, 3, 4, 8.75])
    np.testing.assert_array_equal(polygon_bounds([inside, outside], 20, 30), [1.5, 2.25, 9.125, 8.75])


def test_boxes_after_a_crop_come_from_the_masks() -> None:
    """A triangle's corner in the window is smaller than the window's part of the triangle's box."""
    triangle = [np.array([0.0, 0, 20, 0, 0, 20])]
    scene = LabelledImage(
        np.zeros((20, 20, 3), np.uint8), np.array([[0.0, 0, 20, 20]]), np.array([0]), [triangle]
    )
    cropped = crop(scene, 5, 0, 20, 15)
    assert to_target(cropped).boxes.tolist() == [[0, 0, 15, 20]]
    assert to_target(cropped, boxes_from_masks=True).boxes.tolist() == [[0, 0, 15, 15]]
    drawn = to_target(cropped, boxes_from_masks=True, draw_polygons=True)
    np.testing.assert_array_equal(drawn.boxes[0], bitmap_bounds(drawn.masks[0].numpy()))
    np.testing.assert_allclose(drawn.boxes.numpy(), [[0, 0, 15, 15]], atol=1)
    assert len(crop(scene, 12, 12, 8, 8)) == 0  # the box is in the window, the mask is not


def test_empty_objects_are_left_out_of_the_target() -> None:
    scene = labelled(10, 12, np.array([[1, 1, 3, 3], [4, 4, 9, 9]]), bitmaps=True)
    scene.masks[0][:] = False
    target = to_target(scene)
    assert target.labels.tolist() == [1]
    assert len(target.masks) == 1
    assert target.masks[0].dtype == torch.bool
    assert target.boxes.dtype == torch.float32
    none = to_target(crop(scene, 0, 0, 1, 1), boxes_from_masks=True)
    assert none.boxes.shape == (0, 4)
    assert none.masks == []


def test_images_without_masks() -> None:
    scene = LabelledImage(np.zeros((9, 9, 3), np.uint8), np.array([[1.0, 1, 20, 8]]), np.array([2]))
    target = to_target(flip_horizontal(resize(crop(scene, 1, 0, 8, 8), 16, 16)))
    assert target.masks is None
    assert target.boxes.tolist() == [[0, 2, 16, 16]]
