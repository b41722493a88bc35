"""All objects of a dataset in a few flat arrays: small, quick to slice, and shared by forked loader workers.

A million Python lists would take several times the memory, and each worker would copy their pages as soon as
it touches a reference count.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import UserError
from ...structures import PolygonMask
from .rle import RleMask


@dataclass(frozen=True)
class ObjectTable:
    """Objects without crowds, ordered by image.

    Attributes:
        first: (I + 1,) int64; the objects of image i are rows ``first[i]`` to ``first[i + 1] - 1``.
        boxes: (A, 4) float64 ``xyxy`` in pixels of the file.
        labels: (A,) int64, contiguous.
        annotation_ids: (A,) int64, ids in the JSON.
        masks: their masks; None for a dataset that was read without.
    """

    first: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    annotation_ids: np.ndarray
    masks: MaskTable | None

    def counts(self) -> np.ndarray:
        """(I,) number of objects in each image."""
        return np.diff(self.first)

    def rows(self, image: int) -> slice:
        """Rows of the objects of an image."""
        return slice(int(self.first[image]), int(self.first[image + 1]))


@dataclass(frozen=True)
class MaskTable:
    """Masks of A objects, polygons and compressed RLE mixed.

    Attributes:
        first_polygon: (A + 1,) int64; object a has the polygons from ``first_polygon[a]`` to before
            ``first_polygon[a + 1]``.
        first_number: (P + 1,) int64; polygon p has ``numbers[first_number[p]:first_number[p + 1]]``.
        numbers: float64 ``x0, y0, x1, y1, ...`` of all polygons.
        first_byte: (A + 1,) int64; an object with bytes is an RLE.
        rle: uint8, ``counts`` of all compressed RLE.
    """

    first_polygon: np.ndarray
    first_number: np.ndarray
    numbers: np.ndarray
    first_byte: np.ndarray
    rle: np.ndarray

    def mask(self, row: int, height: int, width: int) -> PolygonMask | RleMask:
        """The mask of object ``row`` in an image of height x width pixels."""
        counts = self.rle[self.first_byte[row] : self.first_byte[row + 1]]
        if len(counts):
            return RleMask(counts.tobytes(), height, width)
        polygons = range(int(self.first_polygon[row]), int(self.first_polygon[row + 1]))
        return [self.numbers[self.first_number[p] : self.first_number[p + 1]] for p in polygons]


class TableBuilder:
    """Collects objects image by image; :meth:`build` makes the table."""

    def __init__(self, with_masks: bool) -> None:
        self.with_masks = with_masks
        self._first = array("q", [0])
        self._boxes, self._labels, self._ids = array("d"), array("q"), array("q")
        self._first_polygon, self._first_number, self._numbers = array("q", [0]), array("q", [0]), array("d")
        self._first_byte, self._rle = array("q", [0]), bytearray()

    def add(
        self,
        annotation_id: int,
        label: int,
        box: Sequence[float],
        polygons: Sequence[Sequence[float]] = (),
        rle: bytes = b"",
    ) -> None:
        """One object of the current image: ``box`` is ``xyxy``; the mask is either polygons or RLE counts."""
        self._ids.append(annotation_id)
        self._labels.append(label)
        self._boxes.extend(box)
        if self.with_masks:
            for polygon in polygons:
                self._numbers.extend(polygon)
                self._first_number.append(len(self._numbers))
            self._first_polygon.append(len(self._first_number) - 1)
            self._rle += rle
            self._first_byte.append(len(self._rle))

    def end_image(self) -> None:
        """What is added from now on belongs to the next image."""
        self._first.append(len(self._ids))

    def build(self) -> ObjectTable:
        """The finished table."""
        masks = None
        if self.with_masks:
            masks = MaskTable(
                np.array(self._first_polygon, dtype=np.int64),
                np.array(self._first_number, dtype=np.int64),
                np.array(self._numbers, dtype=np.float64),
                np.array(self._first_byte, dtype=np.int64),
                np.frombuffer(bytes(self._rle), dtype=np.uint8),
            )
        return ObjectTable(
            np.array(self._first, dtype=np.int64),
            np.array(self._boxes, dtype=np.float64).reshape(-1, 4),
            np.array(self._labels, dtype=np.int64),
            np.array(self._ids, dtype=np.int64),
            masks,
        )


def join_tables(tables: Sequence[ObjectTable]) -> ObjectTable:
    """Tables one after the other; all have masks or none has."""
    masks = None
    stores = [table.masks for table in tables if table.masks is not None]
    if len(stores) == len(tables):
        masks = MaskTable(
            _join_offsets([m.first_polygon for m in stores]),
            _join_offsets([m.first_number for m in stores]),
            np.concatenate([m.numbers for m in stores]),
            _join_offsets([m.first_byte for m in stores]),
            np.concatenate([m.rle for m in stores]),
        )
    elif stores:
        raise UserError("datasets with and without masks cannot be joined")
    return ObjectTable(
        _join_offsets([table.first for table in tables]),
        np.concatenate([table.boxes for table in tables]),
        np.concatenate([table.labels for table in tables]),
        np.concatenate([table.annotation_ids for table in tables]),
        masks,
    )


def _join_offsets(offsets: Sequence[np.ndarray]) -> np.ndarray:
    joined, end = [np.zeros(1, dtype=np.int64)], 0
    for part in offsets:
        joined.append(part[1:] + end)
        end += int(part[-1])
    return np.concatenate(joined)
