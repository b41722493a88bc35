"""Read compressed RLE, check its runs, which pycocotools does not check, and join runs of one object."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as coco_mask

# Six bits from code 48 on: five of a number, and whether more of it follow.
RLE_CHARACTERS = re.compile("[0-o]+")

_LONGEST = 7  # characters of a run: 35 bits, more than an image has pixels


@dataclass(frozen=True, slots=True)
class RleMask:
    """The bitmap of one object before it is decoded: some hundred bytes in place of a byte for each pixel.

    Attributes:
        counts: COCO's compressed ``counts``, checked by :func:`count_pixels`.
        height, width: of the image in pixels.
    """

    counts: bytes
    height: int
    width: int

    def decode(self) -> np.ndarray:
        """Return bool (height, width), contiguous and writable."""
        mask = coco_mask.decode({"size": [self.height, self.width], "counts": self.counts})
        return np.ascontiguousarray(mask).view(bool)

    def window(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Return ``decode()[top : top + height, left : left + width]``; only its columns are decoded."""
        begin, end = left * self.height, min(left + width, self.width) * self.height
        ends = np.cumsum(read_runs(self.counts.decode())).clip(begin, end)
        inside = np.arange(len(ends)) % 2 == 1
        columns = np.repeat(inside, np.diff(ends, prepend=begin)).reshape(-1, self.height)
        return np.ascontiguousarray(columns[:, top : top + height].T)


def count_pixels(counts: str) -> int:
    """Return the sum of the runs: in a whole RLE, the image's height times width.

    pycocotools decodes missing runs from memory that nobody wrote. The format is that of its ``rleFrString``
    (common/maskApi.c): the lowest five bits of each number come first, the sign is in the last; from the
    fourth run on, a number is the difference to the last but one.

    Args:
        counts: COCO's compressed ``counts``.

    Raises:
        ValueError: it has other characters, is cut off within a number, or has a run below 0.
    """
    return int(read_runs(counts).sum())


def read_runs(counts: str | list[int]) -> np.ndarray:
    """Return (R,) int64, the runs of an RLE, background and object in turn; errors: :func:`count_pixels`."""
    if isinstance(counts, list):
        return np.array(counts, dtype=np.int64)
    if not RLE_CHARACTERS.fullmatch(counts):
        raise ValueError("wrong characters")
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes < 32)
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if codes[-1] >= 32 or lengths.max() > _LONGEST:
        raise ValueError("cut off, or with a number that is too large")
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs: np.ndarray = np.add.reduceat((codes & 31) << (5 * places), starts)
    runs -= ((codes[ends] & 16) >> 4) << (5 * lengths)
    for first in (1, 2):
        runs[first::2] = np.cumsum(runs[first::2])
    if runs.min() < 0:
        raise ValueError("a run below 0")
    return runs


def measure(masks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays (M,) int64 of compressed RLE: the sums of all runs, and of the objects' runs.

    The sums are :func:`count_pixels`, and the areas. All runs stand in one array, so that a mask costs a few
    microseconds: some hundred masks at a time fit into a processor's cache.

    Args:
        masks: at least one compressed ``counts``.

    Raises:
        ValueError: :func:`count_pixels` refuses one of them.
    """
    codes = np.frombuffer("".join(masks).encode("ascii"), np.uint8)
    ends = np.cumsum(np.fromiter(map(len, masks), np.int64, len(masks)))
    if not len(codes) or codes.min() < 48 or codes.max() > 111 or not np.diff(ends, prepend=0).all():
        raise ValueError("wrong characters")
    goes_on = codes >= 80
    if goes_on[ends - 1].any():
        raise ValueError("cut off")
    # (c - 48) & 31, with bit 4 as its sign
    numbers = np.subtract(codes[~goes_on] & 31, 16, dtype=np.int64, casting="unsafe")
    places = np.flatnonzero(goes_on)
    if len(places):
        _add_low_digits(numbers, codes, places)
    ends -= np.searchsorted(places, ends)
    starts = np.append(0, ends[:-1])
    first = numbers[starts]
    if first.min() < 0:
        raise ValueError("a run below 0")
    # From the second run on, every other one is a sum of differences: a chain. The even and the odd places of
    # the array hold a chain of each mask. A chain begins with the sum of those before it, which is taken off.
    numbers[starts] = 0
    sums = np.empty((2, len(masks)), dtype=np.int64)
    for side in (0, 1):
        chain = np.cumsum(numbers[side::2])
        begin, end = (starts + 1 - side) // 2, (ends + 1 - side) // 2
        before = np.where(begin > 0, chain[begin - 1] if len(chain) else 0, 0)
        longer = np.append(chain, chain[-1:] if len(chain) else 0)  # reduceat needs a place for each begin
        some = begin < end
        if (some & (np.minimum.reduceat(longer, begin) < before)).any():
            raise ValueError("a run below 0")
        sums[side] = np.add.reduceat(longer, begin)
        sums[side, -1] -= longer[-1]
        sums[side] = np.where(some, sums[side] - (end - begin) * before, 0)
    areas = np.where(starts % 2 == 0, sums[1], sums[0])
    return first + sums[0] + sums[1], areas


def _add_low_digits(numbers: np.ndarray, codes: np.ndarray, places: np.ndarray) -> None:
    """Complete the numbers of several characters; ``places`` are those of all but their last ones."""
    rank = np.arange(len(places))
    number = places - rank  # the number that a character belongs to
    heads = np.flatnonzero(np.diff(number, prepend=-1))
    digits = np.diff(heads, append=len(places))
    if digits.max() >= _LONGEST:
        raise ValueError("a number that is too large")
    low = ((codes[places].astype(np.int64) - 48) & 31) << (5 * (rank - np.repeat(heads, digits)))
    whole = number[heads]
    numbers[whole] = (numbers[whole] << (5 * digits)) + np.add.reduceat(low, heads)


def join_runs(
    rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, values: np.ndarray, height: int
) -> np.ndarray:
    """Return the least number of a run that each run is joined with, also over others.

    Args:
        rows, starts, ends: (R,) row, first column and column after the last, ordered by rows and columns.
        values: (R,); only runs of one value are joined.
        height: number of rows.
    """
    first = np.searchsorted(rows, np.arange(height + 1)).tolist()
    begin, end, value = starts.tolist(), ends.tolist(), values.tolist()
    parent = list(range(len(begin)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    for row in range(1, height):
        above = first[row - 1]
        for run in range(first[row], first[row + 1]):
            while above < first[row] and end[above] < begin[run]:
                above += 1
            other = above
            while other < first[row] and begin[other] <= end[run]:
                if value[other] == value[run]:
                    one, two = root(run), root(other)
                    parent[max(one, two)] = min(one, two)
                other += 1
    return np.array([root(run) for run in range(len(begin))])
