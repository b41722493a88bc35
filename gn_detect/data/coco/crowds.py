"""Count crowds, which training leaves out, and find those that look like single objects.

CVAT's brush, BlenderProc and pycococreator write ``iscrowd`` 1 with every RLE, whatever it shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .faults import FAULTS
from .rle import read_runs

MANY = 0.05  # share of crowds among objects above which nearly nobody means them
_LOOKED_AT = 200  # crowds, spread over the file
_LARGEST_BLOB = 0.25  # share of the image: COCO's crowds are as large as that, or of several pieces
_MOST_RUNS = 20_000  # of an RLE that is looked at; and columns that they go on into


@dataclass(frozen=True)
class Crowds:
    """Crowds of an annotation file.

    Attributes:
        crowds, objects: numbers of annotations; crowds are among the objects.
        looked_at: how many crowds were looked at.
        blobs: how many of these are one small connected blob.
        first_blob: the id of one of them; None without any.
    """

    crowds: int = 0
    objects: int = 0
    looked_at: int = 0
    blobs: int = 0
    first_blob: int | None = None

    @property
    def single(self) -> bool:
        """Return whether most crowds look like single objects."""
        return self.blobs * 2 > self.looked_at

    @property
    def dubious(self) -> bool:
        """Return whether a user should look at the crowds."""
        return self.single or self.crowds > MANY * self.objects

    @property
    def found(self) -> str:
        """Return the counts in words."""
        text = f"{self.crowds} of {self.objects} objects are crowds ('iscrowd' 1) and left out of training"
        some = f"{self.blobs} of the {self.looked_at} looked at are one small blob"
        return f"{text}; {some}, such as annotation {self.first_blob}" if self.single else text

    def __str__(self) -> str:
        return f"{self.found}; {FAULTS['crowds'].remedy}" if self.dubious else self.found


def count_crowds(content: Mapping[str, Any]) -> Crowds:
    """Count the crowds of a file in canonical form, whose entries may still be wrong."""
    entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
    crowds = [entry for entry in entries if entry.get("iscrowd") == 1]
    some = crowds[:: -(-len(crowds) // _LOOKED_AT)] if crowds else []
    blobs = [entry for entry in some if _is_blob(entry)]
    first = blobs[0].get("id") if blobs else None
    return Crowds(len(crowds), len(entries), len(some), len(blobs), first)


def _is_blob(entry: dict[str, Any]) -> bool:
    """Return whether a mask is one small connected region; False for a damaged mask."""
    mask = entry.get("segmentation")
    if not isinstance(mask, dict):
        return False
    try:
        height, width = mask["size"]
        runs = read_runs(mask["counts"])
        if len(runs) > _MOST_RUNS or runs.sum() != height * width or runs.min() < 0:
            return False
    except (ValueError, TypeError, KeyError, OverflowError):
        return False
    area = runs[1::2].sum()
    return bool(0 < area <= _LARGEST_BLOB * height * width) and _is_connected(runs, height)


def _is_connected(runs: np.ndarray, height: int) -> bool:
    """Return whether the pixels of runs, down the columns, are one region, joined at corners, too."""
    ends = np.cumsum(runs)
    starts = ends - runs
    if ((ends[1::2] - 1) // height - starts[1::2] // height).sum() > _MOST_RUNS:
        return False
    pieces = [
        piece
        for start, end in zip(ends[:-1:2].tolist(), ends[1::2].tolist(), strict=True)
        for piece in _by_column(start, end, height)
    ]
    parent = list(range(len(pieces)))

    def root(piece: int) -> int:
        while parent[piece] != piece:
            parent[piece] = piece = parent[parent[piece]]
        return piece

    before, first = 0, 0  # the first piece that can touch, in the column to the left
    for number, (column, top, bottom) in enumerate(pieces):
        if number and pieces[number - 1][0] != column:
            before, first = first, number
        while before < first and (pieces[before][0] < column - 1 or pieces[before][2] < top - 1):
            before += 1
        other = before
        while other < first and pieces[other][1] <= bottom + 1:
            parent[root(number)] = root(other)
            other += 1
    return len({root(piece) for piece in range(len(pieces))}) == 1


def _by_column(start: int, end: int, height: int) -> list[tuple[int, int, int]]:
    """Return column, first and last row of the parts of a run of pixels."""
    return [
        (column, max(start - column * height, 0), min(end - column * height, height) - 1)
        for column in range(start // height, (end - 1) // height + 1)
        if end > start
    ]
