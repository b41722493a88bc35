"""Show text from files: a name must neither control the terminal nor begin a line."""

from __future__ import annotations

import copy
import logging
import os
import re
from typing import Any

_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters, the line feed and the tabulator among them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # the direction of what follows
    "\u2028\u2029\ufeff\ufff9-\ufffb"  # separators of lines, and marks that have no shape
    "\ud800-\udfff]"  # halves of characters, which no file and no terminal takes
)


def printable(text: object, keep: str = "") -> str:
    r"""Return ``str(text)`` with an escape such as ``\n``, ``\x1b`` or ``\u202e`` for each hidden character.

    Args:
        text: anything.
        keep: hidden characters that stay, such as the line feeds between lines of our own.
    """
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else escaped(found[0]), str(text))


def escaped(character: str) -> str:
    r"""Return the escape of a character, such as ``\n`` or ``\u4eba``."""
    return character.encode("unicode_escape").decode("ascii")


def shortened(text: str, most: int = 60) -> str:
    """Return ``text`` with at most ``most`` characters; a longer one loses its middle."""
    return text if len(text) <= most else f"{text[: most - 9]}…{text[-8:]}"


class Lines(str):
    """Several lines of printable parts, which a log writes unchanged."""


class LogFormatter(logging.Formatter):
    """Format log records so that no name begins a line.

    Hidden characters are escaped in arguments that are text, a path or an exception. The message, an argument
    of :class:`Lines`, and an object that makes its own text may have several lines.
    """

    def format(self, record: logging.LogRecord) -> str:
        shown = copy.copy(record)
        if isinstance(record.args, tuple):
            shown.args = tuple(map(_shown, record.args))
        return printable(super().format(shown), keep="\n\t")


def _shown(argument: Any) -> Any:
    is_name = isinstance(argument, str | os.PathLike | BaseException) and not isinstance(argument, Lines)
    return printable(argument) if is_name else argument
