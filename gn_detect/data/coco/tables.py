"""The images and objects of a dataset in a few flat arrays: small, quick to slice, shared by forked workers.

A million Python objects would take several times the memory, and each worker would copy their pages as soon
as it touches a reference count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import overload

import numpy as np

from ...errors import UserError
from ...structures import PolygonMask
from .rle import RleMask


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of the JSON: ``file_name`` is the path to read, ``height`` and ``width`` are in pixels."""

    id: int
    file_name: str
    height: int
    width: int


class ImageTable(Sequence[ImageRecord]):
    """A read-only list that makes its records when they are asked for."""

    def __init__(self, records: Iterable[ImageRecord]) -> None:
        numbers: list[tuple[int, int, int]] = []
        names, ends = bytearray(), [0]
        for record in records:
            numbers.append((record.id, record.height, record.width))
            names += record.file_name.encode("utf-8", "surrogatepass")
            ends.append(len(names))
        self._numbers = np.array(numbers, dtype=np.int64).reshape(-1, 3)
        self._names, self._ends = np.frombuffer(bytes(names), np.uint8), np.array(ends, dtype=np.int64)

    def sizes(self) -> np.ndarray:
        """Return (I, 2) int64, height and width in pixels."""
        return self._numbers[:, 1:]

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...

    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        image_id, height, width = self._numbers[index].tolist()
        name = self._names[self._ends[index] : self._ends[index + 1]].tobytes()
        return ImageRecord(image_id, name.decode("utf-8", "surrogatepass"), height, width)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageTable) and list(self) == list(other)


@dataclass(frozen=True)
class ObjectTable:
    """Objects without crowds, ordered by image.

    Attributes:
        first: (I + 1,) int64; the objects of image i are rows ``first[i]`` to ``first[i + 1] - 1``.
        boxes: (A, 4) float64 ``xyxy`` in pixels of the file.
        labels: (A,) int64, contiguous.
        annotation_ids: (A,) int64, ids in the JSON.
        masks: None for a dataset that was read without.
    """

    first: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    annotation_ids: np.ndarray
    masks: MaskTable | None

    def counts(self) -> np.ndarray:
        """Return (I,), the number of objects in each image."""
        return np.diff(self.first)

    def rows(self, image: int) -> slice:
        """Return the rows of the objects of an image."""
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
        """Return the mask of object ``row`` in an image of height x width pixels."""
        counts = self.rle[self.first_byte[row] : self.first_byte[row + 1]]
        if len(counts):
            return RleMask(counts.tobytes(), height, width)
        polygons = range(int(self.first_polygon[row]), int(self.first_polygon[row + 1]))
        return [self.numbers[self.first_number[p] : self.first_number[p + 1]] for p in polygons]


@dataclass(slots=True)
class ObjectRow:
    """An object: ``xyxy``, and its mask as polygons or as RLE counts."""

    annotation_id: int
    label: int
    box: Sequence[float]
    polygons: Sequence[Sequence[float]] = ()
    rle: bytes = b""


def build_table(images: Sequence[Sequence[ObjectRow]], with_masks: bool) -> ObjectTable:
    """Return the table of the objects of each image."""
    rows = [row for objects in images for row in objects]
    masks = None
    if with_masks:
        polygons = [polygon for row in rows for polygon in row.polygons]
        masks = MaskTable(
            _offsets(len(row.polygons) for row in rows),
            _offsets(map(len, polygons)),
            np.fromiter(chain.from_iterable(polygons), dtype=np.float64),
            _offsets(len(row.rle) for row in rows),
            np.frombuffer(b"".join(row.rle for row in rows), dtype=np.uint8),
        )
    return ObjectTable(
        _offsets(map(len, images)),
        np.array([row.box for row in rows], dtype=np.float64).reshape(-1, 4),
        np.array([row.label for row in rows], dtype=np.int64),
        np.array([row.annotation_id for row in rows], dtype=np.int64),
        masks,
    )


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)


def join_tables(tables: Sequence[ObjectTable]) -> ObjectTable:
    """Join tables one after the other; all have masks or none has."""
    stores = [table.masks for table in tables if table.masks is not None]
    if stores and len(stores) < len(tables):
        raise UserError("no-mask", "datasets with and without masks cannot be joined")
    masks = MaskTable(**_join_arrays(stores)) if stores else None
    return ObjectTable(**_join_arrays(tables), masks=masks)


def _join_arrays(tables: Sequence[ObjectTable] | Sequence[MaskTable]) -> dict[str, np.ndarray]:
    """Concatenate the arrays of each field; those that begin with "first" are offsets and go on counting."""
    joined = {}
    for name in (field.name for field in fields(tables[0]) if field.name != "masks"):
        arrays = [getattr(table, name) for table in tables]
        if name.startswith("first"):
            ends = np.cumsum([0, *(int(offsets[-1]) for offsets in arrays)])
            arrays = [arrays[0][:1], *(a[1:] + end for a, end in zip(arrays, ends[:-1], strict=True))]
        joined[name] = np.concatenate(arrays)
    return joined
