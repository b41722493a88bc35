"""Read and write COCO result files in little memory, one entry at a time.

500,000 detections with masks are half a gigabyte as Python objects.
"""

from __future__ import annotations

import gc
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from ..errors import UserError
from ..files import open_file

_CHARACTERS = 1 << 22  # read, or sent between processes, at a time
_SPACE = " \t\r\n"
_BETWEEN = re.compile(r"\}[ \t\r\n]*,[ \t\r\n]*\{")  # two objects
_LAST_ENTRY = 1 << 16  # characters from the end of a window in which two objects are looked for


def entry_text(entry: dict[str, Any]) -> str:
    """Return an entry of a JSON list with the comma before it."""
    return f",{json.dumps(entry)}\n"


class ResultsWriter:
    """Writer of a JSON list with one entry per line.

    Args:
        file: open for text; its owner closes it.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file, self._empty = file, True

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Write more entries."""
        for entry in entries:
            self.add_text(entry_text(entry))

    def add_text(self, text: str) -> None:
        """Write text from :func:`entry_text`: entries, or a part of them."""
        self.file.write(f"[{text[1:]}" if self._empty else text)
        self._empty = False

    def end(self) -> None:
        """Complete the list."""
        self.file.write("[]\n" if self._empty else "]\n")


def gather_text(own: IO[str] | None) -> Iterator[str]:
    """Yield the texts that the other processes of the group spooled, in order of ranks, piece by piece.

    Every process must call this and iterate to the end. Only the first one gets the text.

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
    """Yield the entries of a JSON list in any layout, in little memory; see :func:`read_batches`."""
    return chain.from_iterable(read_batches(path))


def read_batches(path: str | Path) -> Iterator[list[Any]]:
    """Yield the entries of a JSON list in any layout, as many at a time as a few MB of text hold.

    Raises:
        UserError: the file cannot be read, is not JSON or not a list.
    """
    try:
        with open_file(path) as file:
            encoding = json.detect_encoding(file.read(4))  # from a byte order mark
            file.seek(0)
            yield from _batches(_Window(io.TextIOWrapper(file, encoding=encoding)))
    except OSError as error:
        raise UserError(
            "cannot-read", f"{path}: cannot be read ({error.strerror}); give a COCO JSON file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError("not-json", f"{path}: not JSON ({error}); give a COCO JSON file") from None
    except TypeError:
        raise UserError("not-results", f"{path}: not COCO results; it needs a list of detections") from None


def _batches(text: _Window) -> Iterator[list[Any]]:
    if text.next_character() != "[":
        json.loads(text.rest())  # raises the error of a file that is no JSON at all
        raise TypeError
    text.skip()
    while text.next_character() != "]":
        yield text.values() or [text.value()]
        if text.next_character() == ",":
            text.skip()
            if text.next_character() == "]":
                raise ValueError("a comma before the end of the list")
        elif text.next_character() != "]":
            raise ValueError("no comma between two entries")
    text.skip()
    if text.next_character():
        raise ValueError("text after the end of the list")


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause the garbage collector, which would look at many new objects again and again; none is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Window:
    """A part of a long text, and a position in it."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self._at = file, "", 0
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        """Read on, and at least double the text: otherwise a long entry would be tried too often."""
        added = self._file.read(max(_CHARACTERS, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + added, 0
        return bool(added)

    def next_character(self) -> str:
        """Return the next character that is not a space; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        self._at += 1

    def value(self) -> Any:
        """Return the JSON value at the position. A number may continue past the edge of the window."""
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

    def values(self) -> list[Any]:
        """Return all objects from the position to the last comma between two; none where that is not plain.

        A text that is a JSON list up to there is the same list in the longer text: an object ends where its
        bracket closes.
        """
        commas = list(_BETWEEN.finditer(self._text, max(self._at, len(self._text) - _LAST_ENTRY)))
        if not commas:
            return []
        end = commas[-1].start() + 1
        try:
            with without_collector():
                found: list[Any] = json.loads(f"[{self._text[self._at : end]}]")
        except (ValueError, RecursionError):
            return []  # one by one, the error has its place
        self._at = end
        return found

    def rest(self) -> str:
        return self._text[self._at :] + self._file.read()
