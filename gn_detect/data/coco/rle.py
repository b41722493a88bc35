"""Read compressed RLE and check its runs, which pycocotools does not check."""

from __future__ import annotations

import re
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
    """Return (R,) int64, the runs of an RLE down the columns, of background and object in turn.

    Raises:
        ValueError, OverflowError: as :func:`count_pixels`.
    """
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
