"""What a command gives to whoever called it: text for people, or one JSON value for machines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from ..progress import HIDDEN


@dataclass(frozen=True)
class Result:
    """Attributes:
    value: JSON values; ``--json`` prints them.
    status: exit status.
    """

    value: Mapping[str, Any] | Sequence[Any]
    status: int = 0


def add_output_arguments(parser: argparse.ArgumentParser, default: object = argparse.SUPPRESS) -> None:
    """``--quiet`` and ``--json``, the latter where the command has no other meaning for it.

    Args:
        default: of both; a subcommand leaves what stood before its name.
    """
    parser.add_argument(
        "--quiet", action="store_true", default=default, help="print errors alone: no log, no progress"
    )
    if "--json" not in parser._option_string_actions:
        parser.add_argument(
            "--json",
            dest="as_json",
            action="store_true",
            default=default,
            help="print the result as JSON, and everything else on standard error",
        )


@contextmanager
def directed(quiet: bool, as_json: bool) -> Iterator[None]:
    """Standard output goes to standard error (``as_json``) or nowhere (``quiet``), also that of processes
    that are started meanwhile; with ``quiet`` there are no progress bars."""
    if not (quiet or as_json):
        yield
        return
    sys.stdout.flush()
    saved, shown = os.dup(1), os.environ.get(HIDDEN)
    if quiet:
        os.environ[HIDDEN] = "1"
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        target = nowhere if quiet else sys.stderr
        os.dup2(nowhere.fileno() if quiet else 2, 1)
        try:
            with redirect_stdout(target):
                yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            if quiet and shown is None:
                del os.environ[HIDDEN]


def print_json(value: Any) -> None:
    """One line; what is not a number becomes null."""
    print(json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
