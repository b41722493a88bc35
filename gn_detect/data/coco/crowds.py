"""Count crowds, which training leaves out, and find those that look like single objects.

CVAT's brush, BlenderProc and pycococreator write ``iscrowd`` 1 with every RLE, whatever it shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .faults import FAULTS
from .rle import join_runs, read_runs

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
    ends = np.cumsum(runs)[1::2]
    begins = (ends - runs[1::2])[runs[1::2] > 0]
    ends = ends[runs[1::2] > 0]
    parts = (ends - 1) // height - begins // height + 1  # a run goes on in the next column
    if parts.sum() > _MOST_RUNS + len(parts):
        return False
    firsts = np.repeat(np.cumsum(parts) - parts, parts)
    columns = np.repeat(begins // height, parts) + np.arange(parts.sum()) - firsts
    if (np.diff(columns) > 1).any():
        return False
    tops = (np.repeat(begins, parts) - columns * height).clip(min=0)
    bottoms = (np.repeat(ends, parts) - columns * height).clip(max=height)
    columns -= columns[0]
    joined = join_runs(columns, tops, bottoms, np.ones_like(columns), int(columns[-1]) + 1)
    return bool((joined == joined[0]).all())
