"""Which image comes when: endless shuffled streams for training, a split for inference.

Streams are plain iterators of indices and depend on a seed alone. All ranks walk through the same stream and
each takes its strided share, so no communication is needed. An item's position in the stream seeds its
augmentation, which makes a batch independent of the number of loader workers and lets a run resume exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch

Item = tuple[int, int]
"""(index of the image, position in the stream shared by all ranks)."""


def shuffled_indices(size: int, seed: int) -> Iterator[int]:
    """Endless concatenation of random permutations of ``range(size)``.

    Equal to detectron2's TrainingSampler for the same seed.

    Raises:
        ValueError: ``size`` is not positive.
    """
    if size <= 0:
        raise ValueError(f"cannot sample from {size} images")
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(size, generator=generator).tolist()


def repeated_indices(factors: Sequence[float], seed: int) -> Iterator[int]:
    """Endless epochs in which image i occurs ``factors[i]`` times on average, shuffled.

    The fraction of a factor is rounded at random, anew in each epoch. Equal to detectron2's
    RepeatFactorTrainingSampler for the same seed.

    Raises:
        ValueError: there are no factors, or all are zero.
    """
    repeats = torch.tensor(factors, dtype=torch.float32)
    if not (repeats > 0).any():
        raise ValueError("cannot sample: no image has a positive repeat factor")
    whole = repeats.trunc()
    generator = torch.Generator().manual_seed(seed)
    while True:
        rounded_up = torch.rand(len(repeats), generator=generator) < repeats - whole
        epoch = torch.arange(len(repeats)).repeat_interleave((whole + rounded_up).long())
        yield from epoch[torch.randperm(len(epoch), generator=generator)].tolist()


def repeat_factors(
    labels_of_images: Iterable[Iterable[int]], threshold: float, square_root: bool = True
) -> list[float]:
    """How often to show each image, more for rare categories (LVIS, arXiv 1908.03195, appendix B.2).

    For a category in a fraction f of the images r = max(1, sqrt(threshold / f)); an image takes the largest r
    among its categories, and 1 if it has none.

    Args:
        labels_of_images: the labels in each image; repetition within an image does not count.
        threshold: fraction of images below which a category is repeated.
        square_root: False leaves the root out.
    """
    present = [set(labels) for labels in labels_of_images]
    counts: dict[int, int] = {}
    for labels in present:
        for label in labels:
            counts[label] = counts.get(label, 0) + 1
    rarity = {label: threshold * len(present) / count for label, count in counts.items()}
    factors = {label: max(1.0, math.sqrt(r) if square_root else r) for label, r in rarity.items()}
    return [max((factors[label] for label in labels), default=1.0) for labels in present]


def share_of_rank(stream: Iterable[int], rank: int, world_size: int) -> Iterator[Item]:
    """Every ``world_size``-th item of the stream from ``rank`` on, with its position."""
    for position, index in islice(enumerate(stream), rank, None, world_size):
        yield index, position


def in_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Consecutive batches; an incomplete one at the end is yielded too."""
    iterator = iter(items)
    while batch := list(islice(iterator, batch_size)):
        yield batch


def grouped_batches(
    items: Iterable[Item], batch_size: int, group_of: Callable[[int], int | bool]
) -> Iterator[list[Item]]:
    """Batches of images of the same group, in the order in which batches fill up.

    With wide and tall images as the groups, a batch needs little padding. Incomplete batches are not yielded.

    Args:
        items: pairs of index and position.
        batch_size: images in a batch.
        group_of: the group of an image, from its index.
    """
    waiting: dict[int | bool, list[Item]] = {}
    for item in items:
        batch = waiting.setdefault(group_of(item[0]), [])
        batch.append(item)
        if len(batch) == batch_size:
            waiting[group_of(item[0])] = []
            yield batch


def inference_range(size: int, rank: int, world_size: int) -> range:
    """The contiguous part of ``range(size)`` for one rank; parts differ by at most one in length."""
    part, rest = divmod(size, world_size)
    begin = rank * part + min(rank, rest)
    return range(begin, begin + part + (rank < rest))
