"""Read the ``metrics.jsonl`` of a run."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import open_file

logger = logging.getLogger(__name__)

_LARGEST = 3.5e38  # training computes in float32, where anything above is infinite
_LAST_ITERATION = 10**12  # far beyond any training
_NUMBERS = frozenset((int, float, type(None)))
_LINES_AT_ONCE = 1000
_MOST_BYTES = 64_000_000  # of a file that is read line by line; about 250,000 lines
_COMMA_PER_LINE = bytes.maketrans(b"\n", b",")


class Metrics:
    """The numbers of a ``metrics.jsonl`` by name, as columns: a dictionary per line would take gigabytes.

    Attributes:
        last: the greatest iteration; -1 without any line.
    """

    def __init__(self) -> None:
        self._columns: dict[str, tuple[array[float], array[float]]] = {}
        self.last = -1

    def __bool__(self) -> bool:
        return self.last >= 0

    @property
    def names(self) -> list[str]:
        """The names of the values, in order of appearance."""
        return list(self._columns)

    def add(self, names: Sequence[str], values: np.ndarray) -> np.ndarray:
        """Add lines.

        Args:
            names: the keys of each line.
            values: (N, K) float64; nan for a value that is not finite.

        Returns:
            (N,) bool, False for each line that is left out: it has no valid iteration.
        """
        if "iteration" not in names:
            return np.zeros(len(values), dtype=bool)
        iterations = values[:, names.index("iteration")]
        valid = (iterations >= 0) & (iterations <= _LAST_ITERATION) & (iterations == np.floor(iterations))
        if valid.any():
            iterations = iterations[valid]
            self.last = max(self.last, int(iterations.max()))
            for name, column in zip(names, values[valid].T, strict=True):
                stored = self._columns.setdefault(name, (array("d"), array("d")))
                stored[0].frombytes(iterations.tobytes())
                stored[1].frombytes(column.tobytes())
        return valid

    def points(self, name: str) -> np.ndarray:
        """Return (N, 2) float64 iterations and values of the lines that have this name."""
        return np.array(self._columns.get(name, ([], [])), dtype=float).T


def read_metrics(path: str | Path) -> Metrics:
    """Read a ``metrics.jsonl``. Values that are null or not finite become nan.

    A damaged line, such as the last one of a killed run, is left out with a warning. A file above 64 MB has
    more lines than a curve can show: every second (third, ...) one is read, and each line of an evaluation.

    Raises:
        UserError: the file cannot be read, or no line in it is valid.
    """
    metrics, count = Metrics(), 0
    damaged: list[int] = []
    try:
        with open_file(path) as file:
            step = 1 + os.fstat(file.fileno()).st_size // _MOST_BYTES
            while lines := [*islice(file, _LINES_AT_ONCE)]:
                last = len(lines) - 1
                kept = [i for i, line in enumerate(lines) if i % step == 0 or i == last or b"/AP" in line]
                done = 0
                for names, values in _parse([lines[i] for i in kept]):
                    bad = np.flatnonzero(~metrics.add(names, values)) + done
                    damaged += [count + kept[i] + 1 for i in bad.tolist() if lines[kept[i]].strip()]
                    done += len(values)
                count += len(lines)
    except OSError as error:
        raise UserError(
            "no-metrics", f"cannot read {path}: {error.strerror}; give the metrics.jsonl of a run's folder"
        ) from error
    if damaged and not metrics:
        remedy = "give the metrics.jsonl of a run's folder"
        raise UserError("no-metrics", f"{path} has no line with an iteration and its numbers; {remedy}")
    if damaged:
        text = "%s: %d of %d lines are damaged and left out, the first of them line %d"
        logger.warning(text, path, len(damaged), count, damaged[0])
    return metrics


def _parse(lines: list[bytes]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield names and (N, K) float64 values of successive lines that have the same names.

    A line that is not an object of numbers gets no names, or values of nan.
    """
    block = _parse_block(lines)
    if block is not None:
        yield block
        return
    if len(lines) > 32:  # most blocks have few other lines
        half = len(lines) // 2
        yield from _parse(lines[:half])
        yield from _parse(lines[half:])
        return
    rows = [_parse_line(line) for line in lines]
    for names, group in groupby(rows, key=list):
        yield names, _finite(np.array([[*row.values()] for row in group], dtype=float))


def _parse_block(lines: list[bytes]) -> tuple[list[str], np.ndarray] | None:
    """Parse lines that have the same keys and numbers alone, as json.dumps writes them; None for other lines.

    The time goes into the numbers then: with a dictionary for each line it is twice as long.
    """
    text = b"".join(lines)
    parts, keys = text.split(b'"'), lines[0].split(b'"')[1::2]
    numbers = b"".join(parts[::2])  # "{: 1, : 2.5}" for each line
    form = b"{" + b", ".join([b": "] * len(keys)) + b"}\n"
    if (
        b"\\" in text
        or parts[1::2] != keys * len(lines)
        or len(set(keys)) < len(keys)
        or numbers.translate(None, b"0123456789.eE+-") != form * len(lines)
    ):
        return None
    with suppress(ValueError, OverflowError):
        names = [json.loads(b'"' + key + b'"') for key in keys]
        flat = numbers.translate(_COMMA_PER_LINE, b"{:} ")[:-1]
        values = np.array(json.loads(b"[" + flat + b"]"), dtype=float)
        return names, _finite(values.reshape(len(lines), len(keys)))
    return None


def _parse_line(line: bytes) -> dict[str, float]:
    """Return the numbers of a line by name; nothing for a line that is not an object of numbers."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # also text that is not UTF-8, and very long integers
        return {}
    if not isinstance(row, dict) or not _NUMBERS.issuperset(map(type, row.values())):
        return {}
    return {
        name: math.nan if value is None or abs(value) > _LARGEST else value for name, value in row.items()
    }


def _finite(values: np.ndarray) -> np.ndarray:
    values[~(np.abs(values) <= _LARGEST)] = math.nan
    return values


def is_loss(name: str) -> bool:
    """Return whether a name is that of a loss; metrics of several datasets begin with the dataset's name."""
    return name == "total_loss" or (name.startswith("loss_") and "/" not in name)


def is_validation_loss(name: str) -> bool:
    """Return whether a name is that of the total loss on a test set."""
    return re.fullmatch("([^/]+/)?validation/total_loss", name) is not None


def is_average(name: str, *metrics: str) -> bool:
    """Return whether a name is one of ``metrics`` over all categories; categories may have any name."""
    return re.fullmatch(rf"([^/]+/)?(bbox|segm)/({'|'.join(metrics)})", name) is not None


def metric_points(metrics: Metrics, name: str, smooth: int = 1) -> np.ndarray:
    """Return (N, 2) float64 iterations and values; each value is the mean of the last ``smooth`` ones."""
    points = metrics.points(name)
    if smooth > 1:
        points[:, 1] = _trailing_means(points[:, 1], smooth)
    return points


def _trailing_means(values: np.ndarray, count: int) -> np.ndarray:
    """Return the mean of the finite values among each value and the ``count - 1`` before it."""
    known = np.isfinite(values)
    sums = _trailing_sums(np.where(known, values, 0), count)
    numbers = _trailing_sums(known.astype(float), count)
    return np.divide(sums, numbers, out=np.full(len(values), math.nan), where=numbers > 0)


def _trailing_sums(values: np.ndarray, count: int) -> np.ndarray:
    """Return the sum of each value and the ``count - 1`` before it, from sums of 1, 2, 4, ... values."""
    total, taken, size = np.zeros(len(values)), 0, 1
    while taken < min(count, len(values)):
        if count & size:
            total[taken:] += values[: len(values) - taken]
            taken += size
        values = values + np.concatenate([np.zeros(size), values])[: len(values)]
        size *= 2
    return total
