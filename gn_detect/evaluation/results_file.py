"""COCO result files that never lie in memory as a whole: written as detections come, read one by one.

500,000 detections with masks are half a gigabyte as Python objects, and several copies of that on their way
through an evaluator.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from ..errors import UserError
from ..files import open_file

_CHARACTERS = 1 << 22
"""Read, or sent between processes, at a time."""

_SPACE = " \t\r\n"


def entry_text(entry: dict[str, Any]) -> str:
    """An entry of a list, with the comma before it."""
    return f",{json.dumps(entry)}\n"


class ResultsWriter:
    """Writes a JSON list, one entry a line.

    Args:
        file: open for text; whoever opened it closes it.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file, self._empty = file, True

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """More entries of the list."""
        for entry in entries:
            self.add_text(entry_text(entry))

    def add_text(self, text: str) -> None:
        """Entries, or a part of them, as :func:`entry_text` spells them."""
        self.file.write(f"[{text[1:]}" if self._empty else text)
        self._empty = False

    def end(self) -> None:
        """Complete the list."""
        self.file.write("[]\n" if self._empty else "]\n")


def gather_text(own: IO[str] | None) -> Iterator[str]:
    """What the other processes of the group spooled, in the order of their ranks, piece by piece.

    Every process must call this, and go through it to the end; the first one gets the text, the others
    nothing.

    Args:
        own: this process's spool of :func:`entry_text`; None in the first process.
    """
    rank, lengths = dist.get_rank(), [0] * dist.get_world_size()
    dist.all_gather_object(lengths, own.tell() if own is not None else 0)
    if own is not None:
        own.seek(0)
    for source, length in enumerate(lengths):
        for _ in range(0, length, _CHARACTERS):
            piece = own.read(_CHARACTERS) if own is not None and source == rank else ""
            pieces: list[Any] | None = [""] * len(lengths) if rank == 0 else None
            dist.gather_object(piece, pieces, dst=0)
            if pieces is not None:
                yield pieces[source]


def read_entries(path: str | Path) -> Iterator[Any]:
    """The entries of a JSON list one after the other, in little memory; any layout.

    Raises:
        UserError: it cannot be read, is not JSON or not a list.
    """
    try:
        with open_file(path) as file:
            encoding = json.detect_encoding(file.read(4))  # a byte order mark tells it
            file.seek(0)
            yield from _entries(io.TextIOWrapper(file, encoding=encoding))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a COCO JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); give a COCO JSON file") from None
    except TypeError:
        raise UserError(f"{path}: not COCO results; it needs a list of detections") from None


def _entries(file: IO[str]) -> Iterator[Any]:
    text, end = _Window(file), "]"
    if text.next_character() != "[":
        json.loads(text.rest())  # says what is wrong, if it is no JSON at all
        raise TypeError
    text.skip()
    while text.next_character() != end:
        yield text.value()
        if text.next_character() == ",":
            text.skip()
            if text.next_character() == "]":
                raise ValueError("a comma before the end of the list")
        elif text.next_character() != "]":
            raise ValueError("no comma between two entries")
    text.skip()
    if text.next_character():
        raise ValueError("text after the end of the list")


class _Window:
    """A part of a long text, and a position in it."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self._at = file, "", 0
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        """Read on, at least as much as is there: a long entry is not tried again too often."""
        added = self._file.read(max(_CHARACTERS, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + added, 0
        return bool(added)

    def next_character(self) -> str:
        """The next one that is no space; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Leave one character behind."""
        self._at += 1

    def value(self) -> Any:
        """The JSON value here; a number at the edge of the window could go on behind it."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            if end < len(self._text) or not self._more():
                self._at = end
                return value

    def rest(self) -> str:
        """All that is left."""
        return self._text[self._at :] + self._file.read()
