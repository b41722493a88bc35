"""Order of the images: endless shuffled streams for training, a split for inference.

Streams are plain iterators of indices and depend only on a seed. All ranks iterate over the same stream and
each takes its strided share, so they need not communicate. The position of an item in the stream seeds its
augmentation. So a batch does not depend on the number of workers, and a run resumes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch

Item = tuple[int, int]  # index of the image, position in the stream that all ranks share


def shuffled_indices(size: int, seed: int) -> Iterator[int]:
    """Yield random permutations of ``range(size)`` without end.

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
    """Yield shuffled epochs without end; image i occurs ``factors[i]`` times on average in each.

    Each epoch rounds the fraction of a factor at random. Equal to detectron2's RepeatFactorTrainingSampler
    for the same seed.

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
    """Return repetitions of each image, more for rare categories (LVIS, arXiv 1908.03195, appendix B.2).

    A category in a fraction f of the images has r = max(1, sqrt(threshold / f)). An image takes the largest
    r of its categories, and 1 if it has none.

    Args:
        labels_of_images: the labels in each image; repetition within an image does not count.
        threshold: fraction of images below which a category is repeated.
        square_root: False omits the root.
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
    """Yield every ``world_size``-th item of the stream from ``rank`` on, with its position."""
    for position, index in islice(enumerate(stream), rank, None, world_size):
        yield index, position


def in_batches(items: Iterable[Item], batch_size: int) -> Iterator[list[Item]]:
    """Yield consecutive batches; the last one may be incomplete."""
    iterator = iter(items)
    while batch := list(islice(iterator, batch_size)):
        yield batch


def grouped_batches(
    items: Iterable[Item], batch_size: int, group_of: Callable[[int], int | bool]
) -> Iterator[list[Item]]:
    """Yield batches of images of the same group, in the order in which they are complete.

    With wide and tall images as the groups, a batch needs little padding. Incomplete batches are not yielded.

    Args:
        items: pairs of index and position.
        batch_size: images in a batch.
        group_of: maps the index of an image to its group.
    """
    waiting: dict[int | bool, list[Item]] = {}
    for item in items:
        batch = waiting.setdefault(group_of(item[0]), [])
        batch.append(item)
        if len(batch) == batch_size:
            waiting[group_of(item[0])] = []
            yield batch


def inference_range(size: int, rank: int, world_size: int) -> range:
    """Return the contiguous part of ``range(size)`` of one rank; lengths differ by at most one."""
    part, rest = divmod(size, world_size)
    begin = rank * part + min(rank, rest)
    return range(begin, begin + part + (rank < rest))
