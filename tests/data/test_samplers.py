"""Streams of indices: fair, endless, the same for a seed, and shared out among ranks."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gn_detect.data.samplers import (
    grouped_batches,
    in_batches,
    inference_range,
    repeat_factors,
    repeated_indices,
    share_of_rank,
    shuffled_indices,
)


def test_each_epoch_is_a_permutation_and_epochs_differ() -> None:
    stream = list(islice(shuffled_indices(17, seed=5), 51))
    epochs = [stream[i : i + 17] for i in (0, 17, 34)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream == list(islice(shuffled_indices(17, seed=5), 51))
    assert stream != list(islice(shuffled_indices(17, seed=6), 51))
    with pytest.raises(ValueError, match="cannot sample from 0 images"):
        next(shuffled_indices(0, seed=1))


@given(st.integers(1, 5), st.integers(1, 9))
def test_ranks_share_one_stream(world_size: int, size: int) -> None:
    whole = list(islice(shuffled_indices(size, seed=1), 30))
    shares = [share_of_rank(shuffled_indices(size, seed=1), rank, world_size) for rank in range(world_size)]
    for position, index in enumerate(whole):
        assert next(shares[position % world_size]) == (index, position)


def test_repeat_factors_follow_the_formula() -> None:
    images = [[0], [0, 0], [0, 1], [], [0]]  # category 0 in 4 of 5 images, category 1 in 1 of 5
    assert repeat_factors(images, 0.0) == [1] * 5
    assert repeat_factors(images, 0.8) == [1, 1, 2, 1, 1]
    assert repeat_factors(images, 0.8, square_root=False) == [1, 1, 4, 1, 1]
    assert repeat_factors([[0], [1], []], 1.0) == [3**0.5, 3**0.5, 1]


def test_images_are_repeated_as_often_as_asked() -> None:
    factors = [1.0, 2.0, 1.25, 3.5]
    counts = np.bincount(list(islice(repeated_indices(factors, seed=0), 40000)))
    np.testing.assert_allclose(counts / counts[0], factors, rtol=0.03)
    first = list(islice(repeated_indices(factors, seed=0), 100))
    assert first == list(islice(repeated_indices(factors, seed=0), 100))
    with pytest.raises(ValueError, match="no image has a positive repeat factor"):
        next(repeated_indices([], seed=0))


@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=40))
def test_groups_are_not_mixed_and_nothing_is_lost(batch_size: int, indices: list[int]) -> None:
    items = [(index, position) for position, index in enumerate(indices)]
    batches = list(grouped_batches(items, batch_size, lambda index: index % 2))
    assert all(len(batch) == batch_size for batch in batches)
    assert all(len({index % 2 for index, _ in batch}) == 1 for batch in batches)
    for parity in (0, 1):
        found = [item for batch in batches for item in batch if item[0] % 2 == parity]
        expected = [item for item in items if item[0] % 2 == parity]
        assert found == expected[: len(expected) // batch_size * batch_size]


def test_plain_batches() -> None:
    assert list(in_batches([(i, i) for i in range(5)], 2)) == [[(0, 0), (1, 1)], [(2, 2), (3, 3)], [(4, 4)]]


@given(st.integers(0, 50), st.integers(1, 8))
def test_inference_parts_cover_everything_once(size: int, world_size: int) -> None:
    parts = [inference_range(size, rank, world_size) for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
