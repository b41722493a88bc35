"""The runs of a compressed RLE, against pycocotools' own encoder."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pycocotools.mask as coco_mask
import pytest
from hypothesis import given, settings

from gn_detect.data.rle import count_pixels


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
