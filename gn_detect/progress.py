"""Progress of long work: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TextIO, TypeVar
from weakref import WeakSet

from tqdm import tqdm

from .text import printable

T = TypeVar("T")

WIDTH = 99
"""Most characters in a line or bar of a terminal."""

SECONDS = 4.0
"""Time between two log lines of :func:`announced` where there is no terminal."""


HIDDEN = "TQDM_DISABLE"
"""This environment variable hides all bars, as it does tqdm's own; processes that are started inherit it."""

_bars: WeakSet[Any] = WeakSet()


def fitted(text: str, stream: TextIO) -> str:
    """Return ``text`` with its long lines wrapped at spaces if ``stream`` is a terminal."""
    if not stream.isatty():
        return text
    wrap = partial(
        textwrap.wrap, width=WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    lines = text.splitlines()
    return "\n".join(part for line in lines for part in (wrap(line) if len(line) > WIDTH else [line]))


def progress_bar(items: Iterable[T] | None = None, *, shown: bool = True, **options: Any) -> tqdm[T]:
    """Return a tqdm bar in the terminal, above which log lines stand; no bar where there is no terminal.

    Args:
        items: to iterate over; without them the caller updates the bar.
        shown: False in all processes but the first.
        options: tqdm's.
    """
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    stream = getattr(stream, "bare", stream)  # one that escapes control characters would escape the bar's
    disable = None if shown and HIDDEN not in os.environ else True
    # Both sizes are given: tqdm draws nothing in a terminal that does not tell its size.
    size = shutil.get_terminal_size()
    options = {"leave": False, "ncols": min(size.columns, WIDTH), "nrows": size.lines, **options}
    options["desc"] = printable(options.get("desc") or "")
    bar = tqdm(items, file=stream, disable=disable, **options)
    _bars.add(bar)
    return bar


def close_bars() -> None:
    """Remove the bars that are left, as after an error, so that what is printed next begins a line."""
    for bar in list(_bars):
        bar.close()


def announced(items: Sequence[T], what: str, unit: str, logger: logging.Logger) -> Iterator[T]:
    """Iterate over ``items`` with a bar, or with a log line every :data:`SECONDS` where there is no terminal.

    Args:
        items: a sequence of known length.
        what: the work, such as "drawing pictures".
        unit: one item, such as "picture".
        logger: gets these lines, and one at the beginning.
    """
    logger.info("%s: %d", what, len(items))
    last = time.monotonic()
    with progress_bar(total=len(items), desc=what, unit=unit) as shown:
        for done, item in enumerate(items, start=1):
            yield item
            shown.update()
            if shown.disable and time.monotonic() - last > SECONDS:
                logger.info("%s: %d of %d", what, done, len(items))
                last = time.monotonic()
