"""The images of a dataset in a few flat arrays, for the same reasons as :mod:`.object_table`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

import numpy as np


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of the JSON; ``file_name`` is the path to read, ``height`` and ``width`` are in pixels."""

    id: int
    file_name: str
    height: int
    width: int


class ImageTable(Sequence[ImageRecord]):
    """A read-only list of records that are made when they are asked for.

    Loader workers share its pages: there is no object for each image whose reference count they would write.

    Args:
        records: in order.
    """

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
        """(I, 2) int64 height and width in pixels."""
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

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageTable) and list(self) == list(other)


def join_images(tables: Sequence[ImageTable]) -> ImageTable:
    """Tables one after the other."""
    return ImageTable(chain.from_iterable(tables))
