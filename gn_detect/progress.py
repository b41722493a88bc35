"""Show the progress of long work: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO, TypeVar
from weakref import WeakSet

from tqdm import tqdm

from .text import printable

T = TypeVar("T")

WIDTH = 99  # most characters in a line or bar of a terminal
SECONDS = 4.0  # between two log lines of announced() without a terminal
HIDDEN = (
    "TQDM_DISABLE"  # environment variable that hides all bars, also tqdm's own and those of child processes
)

_bars: WeakSet[Any] = WeakSet()


def fitted(text: str, stream: TextIO) -> str:
    """Return ``text`` with its long lines wrapped at spaces if ``stream`` is a terminal."""
    if not stream.isatty():
        return text
    wrapper = textwrap.TextWrapper(
        WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(wrapper.fill(line) if len(line) > WIDTH else line for line in text.splitlines())


def progress_bar(items: Iterable[T] | None = None, *, shown: bool = True, **options: Any) -> tqdm[T]:
    """Return a tqdm bar for a terminal, with log lines above it; it is invisible without a terminal.

    Args:
        items: what to iterate over; without items the caller updates the bar.
        shown: False in all processes except the first.
        options: options of tqdm.
    """
    stream = sys.stdout if sys.stdout.isatty() else sys.stderr
    stream = getattr(stream, "bare", stream)  # without the escapes of control characters
    disable = None if shown and HIDDEN not in os.environ else True
    # Give both sizes: tqdm draws nothing in a terminal of unknown size.
    size = shutil.get_terminal_size()
    options = {"leave": False, "ncols": min(size.columns, WIDTH), "nrows": size.lines, **options}
    options["desc"] = printable(options.get("desc") or "")
    bar = tqdm(items, file=stream, disable=disable, **options)
    _bars.add(bar)
    return bar


def close_bars() -> None:
    """Remove the bars that an error has left: the next output must begin a line."""
    for bar in list(_bars):
        bar.close()


def announced(items: Sequence[T], what: str, unit: str, logger: logging.Logger) -> Iterator[T]:
    """Iterate over ``items`` with a bar, or without a terminal with a log line every :data:`SECONDS`.

    Args:
        items: what to iterate over.
        what: the work, such as "drawing pictures".
        unit: one item, such as "picture".
        logger: for these lines, and one at the beginning.
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
