"""The runs of a compressed RLE against pycocotools' own encoder, and RLE that wait to be decoded."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from hypothesis import given, settings

from gn_detect.data import CocoDataset, DatasetSource
from gn_detect.data.coco.rle import RleMask, count_pixels, measure, read_runs
from gn_detect.data.transforms import crop, flip_horizontal, flip_vertical, pad, resize, to_target

Write = Callable[[Any], DatasetSource]


@given(st.integers(1, 70), st.integers(1, 70), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_whole_masks_have_all_their_pixels(height: int, width: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < density
    mask[:, width // 2 :] = mask[0, 0]  # long runs, too
    counts = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]
    assert count_pixels(counts.decode()) == height * width


@given(st.lists(st.integers(0, 2**24), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_runs_of_any_length(runs: list[int]) -> None:
    counts = coco_mask.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, sum(runs))["counts"]
    assert count_pixels(counts.decode()) == sum(runs)


@pytest.mark.parametrize("counts", ["", "a b", "\u00e9", "\ud800", "o", "0o", "O", "oooooooo0"])
def test_what_is_no_rle(counts: str) -> None:
    with pytest.raises(ValueError, match="wrong characters|cut off|below 0"):
        count_pixels(counts)


@given(st.lists(st.lists(st.integers(0, 2**24), min_size=1, max_size=9), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_many_masks_are_measured_at_once(masks: list[list[int]]) -> None:
    """Encode masks of any number of runs, so that these begin at even and at odd places."""
    coded = [coco_mask.frPyObjects({"size": [1, 1], "counts": runs}, 1, 1)["counts"] for runs in masks]
    pixels, areas = measure([counts.decode() for counts in coded])
    assert pixels.tolist() == [sum(runs) for runs in masks]
    assert areas.tolist() == [sum(runs[1::2]) for runs in masks]


@given(st.lists(st.text("0123AMNOPQ_`nop/\u00e9", max_size=6), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_text_is_measured_or_refused_as_one_by_one(masks: list[str]) -> None:
    try:
        expected = [(count_pixels(counts), int(read_runs(counts)[1::2].sum())) for counts in masks]
    except ValueError:
        with pytest.raises(ValueError):
            measure(masks)
    else:
        assert [tuple(map(int, pair)) for pair in zip(*measure(masks), strict=True)] == expected


def test_rle_are_decoded_by_the_first_transform_that_needs_pixels(
    write_dataset: Write, small_coco: dict
) -> None:
    """To the same bits as if all had been decoded before; only one is whole in memory at a time."""
    small_coco["annotations"] = [{**small_coco["annotations"][2], "id": i} for i in range(1, 4)]
    lazy = CocoDataset(write_dataset(small_coco)).read(0)
    assert lazy.masks is not None
    assert all(isinstance(mask, RleMask) for mask in lazy.masks)
    eager = replace(lazy, masks=[mask.decode() for mask in lazy.masks if isinstance(mask, RleMask)])
    for transform in (
        lambda scene: resize(scene, 45, 40),
        lambda scene: resize(flip_horizontal(scene), 45, 40),
        lambda scene: crop(scene, 5, 25, 30, 40),
        lambda scene: pad(flip_vertical(scene), 100, 70),
        lambda scene: scene.select(np.array([True, False, True])),
    ):
        found, expected = (to_target(transform(scene), boxes_from_masks=True) for scene in (lazy, eager))
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0)
        assert found.masks is not None
        assert expected.masks is not None
        assert len(found.masks) >= 2
        for a, b in zip(found.masks, expected.masks, strict=True):
            assert isinstance(a, torch.Tensor)
            assert a.is_contiguous()
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shrink", [lambda scene: resize(scene, 100, 100), lambda scene: crop(scene, 150, 150, 300, 300)]
)
def test_one_rle_at_a_time_is_in_memory(write_dataset: Write, small_coco: dict, shrink: Callable) -> None:
    size, count = 1000, 30
    bitmap = np.zeros((size, size), dtype=np.uint8, order="F")
    bitmap[200:400, 200:400] = 1
    rle = coco_mask.encode(bitmap)
    rle["counts"] = rle["counts"].decode()
    small_coco["images"][1].update(height=size, width=size)
    entry = {**small_coco["annotations"][2], "bbox": [200, 200, 200, 200], "segmentation": rle}
    small_coco["annotations"] = [{**entry, "id": i} for i in range(1, count + 1)]
    dataset = CocoDataset(write_dataset(small_coco))
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    tracemalloc.start()
    target = to_target(shrink(dataset.label(0, pixels)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(target) == count
    assert peak < 10 * size**2  # all of them would be 30


def test_a_window_is_that_part_of_the_bitmap() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        height, width, top, left = random.integers(1, 30, 4).tolist()
        bitmap = random.random((height, width)) < random.random()
        counts = coco_mask.encode(np.asfortranarray(bitmap.view(np.uint8)))["counts"]
        top, left = top % height, left % width
        window = RleMask(counts, height, width).window(top, left, 12, 7)
        assert window.dtype == bool
        assert np.array_equal(window, bitmap[top : top + 12, left : left + 7])
