"""Output of a command: text for people, or one JSON value for machines."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TextIO, cast

from ..files import json_values
from ..text import LogFormatter, printable


@dataclass(frozen=True)
class Result:
    """Values that ``--json`` prints, and the exit status."""

    value: Mapping[str, Any] | Sequence[Any]
    status: int = 0


def add_output_arguments(parser: argparse.ArgumentParser, default: object = argparse.SUPPRESS) -> None:
    """Add ``--quiet`` and ``--json``.

    Args:
        default: of both; a subcommand keeps the values that the flags before its name set.
    """
    add = parser.add_argument
    add("--quiet", action="store_true", default=default, help="print errors alone: no log, no progress")
    add(
        "--json",
        dest="as_json",
        action="store_true",
        default=default,
        help="print the result as JSON, and everything else on standard error",
    )


@contextmanager
def directed(quiet: bool, as_json: bool) -> Iterator[None]:
    """Send standard output to standard error (``as_json``) or nowhere (``quiet``, without progress bars).

    The output of processes that start meanwhile goes there, too.
    """
    if not (quiet or as_json):
        yield
        return
    from ..progress import HIDDEN

    sys.stdout.flush()
    saved, shown = os.dup(1), os.environ.get(HIDDEN)
    if quiet:
        os.environ[HIDDEN] = "1"
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        target = nowhere if quiet else sys.stderr
        os.dup2(nowhere.fileno() if quiet else 2, 1)
        try:
            with redirect_stdout(cast(TextIO, PrintableStream(target))):
                yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            if quiet and shown is None:
                del os.environ[HIDDEN]


def print_json(value: Any) -> None:
    """Print one line of JSON; NaN and infinity become null."""
    print(json.dumps(json_values(value), allow_nan=False))


class PrintableStream:
    """A stream that writes hidden characters, and those that its encoding lacks, as their escapes.

    Attributes:
        bare: the stream itself, for progress bars, which move the cursor. The two are equal: tqdm compares
            them, because lines and bars on one terminal must make room for each other.
    """

    def __init__(self, stream: TextIO) -> None:
        self.bare = stream

    def write(self, text: str) -> int:
        """Write ``text`` with escapes; line feeds stay, so a caller escapes those in a name."""
        encoding = getattr(self.bare, "encoding", None) or "utf-8"
        shown = printable(text, keep="\n\t\r")
        return self.bare.write(shown.encode(encoding, "backslashreplace").decode(encoding))

    def __eq__(self, other: object) -> bool:
        return bool(self.bare == getattr(other, "bare", other))

    def __hash__(self) -> int:
        return hash(self.bare)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bare, name)


@contextmanager
def printable_output() -> Iterator[None]:
    """Escape hidden characters in printed text, and in warnings that no log of ours takes."""
    stream, handler = cast(TextIO, PrintableStream(sys.stdout)), logging.lastResort
    assert handler is not None
    before = handler.formatter
    handler.setFormatter(LogFormatter())
    try:
        with redirect_stdout(stream):
            yield
    finally:
        handler.setFormatter(before)
