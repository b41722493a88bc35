"""Curves of one run, or of several on one figure."""

from __future__ import annotations

import json
import logging
import math
import re
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..files import atomic_write, open_file
from ..text import shortened
from .fonts import add_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_FORMATS = (".png", ".svg", ".jpg", ".jpeg", ".webp")

_STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")]
"""Lines and markers of the kinds of AP: a run with one evaluation has no line."""

_TITLES = ("loss", "AP (%)", "learning rate")

_LARGEST = 3.5e38
"""Of a value; training computes in float32, where anything above is infinite."""

_KINDS = frozenset((int, float, type(None)))
"""Of values, before null becomes nan."""

_AT_ONCE = 1000
"""Lines that are read together."""

_LAST = 10**12
"""Iteration, far beyond any training."""

_MOST_POINTS = 8000
"""Of a curve, ten for each column of pixels; no training of usual length has as many."""


class Metrics:
    """Lines of a ``metrics.jsonl`` by name: a dictionary for each of a million lines would take gigabytes.

    Attributes:
        last: the greatest iteration; -1 where there is no line.
    """

    def __init__(self) -> None:
        self._columns: dict[str, tuple[array[float], array[float]]] = {}
        self.last = -1

    def __bool__(self) -> bool:
        return self.last >= 0

    @property
    def names(self) -> list[str]:
        """Of values, in the order of their appearance."""
        return list(self._columns)

    def add(self, line: Mapping[str, float]) -> None:
        """One line, with its iteration."""
        iteration = line["iteration"]
        self.last = max(self.last, int(iteration))
        for name, value in line.items():
            column = self._columns.get(name)
            if column is None:
                column = self._columns[name] = array("d"), array("d")
            column[0].append(iteration)
            column[1].append(value)

    def points(self, name: str) -> np.ndarray:
        """(N, 2) float64 of iteration and value, of the lines that have one."""
        return np.array(self._columns.get(name, ([], [])), dtype=float).T


def plot_curves(
    metrics_jsonl: str | Path | Mapping[str, str | Path], path: str | Path, smooth: int = 1
) -> None:
    """Losses, AP, learning rate and speed by iteration, of one run or of several in the same axes.

    Of one run each loss has a curve; of several each run has one colour, and total loss and AP alone are
    drawn.

    Args:
        metrics_jsonl: the run's file, or the file of each run by the name to show; each line has
            ``iteration`` and numbers, or null where not finite.
        path: picture to write; its suffix, .png, .svg, .jpg or .webp, gives the format.
        smooth: losses are means over so many log lines.

    Raises:
        UserError: there is nothing to plot, or the picture cannot be written.
    """
    runs = metrics_jsonl if isinstance(metrics_jsonl, Mapping) else {"": metrics_jsonl}
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise UserError(f"cannot write the picture {path}: its name must end in {', '.join(_FORMATS)}")
    read = {name: read_metrics(source) for name, source in runs.items()}
    for name, metrics in read.items():
        if not any(_panels(metrics, len(runs) > 1).values()):
            raise UserError(f"{runs[name]} has neither losses nor AP; wait for the first log line of the run")
    figure = _draw_one(next(iter(read.values())), smooth) if len(read) == 1 else _draw_several(read, smooth)
    for axes in figure.axes:
        highest = axes.dataLim.y1
        axes.set_ylim(0, 1.06 * highest if 0 < highest < math.inf else None)
    import matplotlib

    with atomic_write(path, "wb") as file, matplotlib.rc_context({"svg.hashsalt": "gn_detect"}):
        figure.savefig(
            file, format=suffix[1:], metadata={"Date": None} if suffix == ".svg" else None, facecolor="white"
        )


def read_metrics(path: str | Path) -> Metrics:
    """Return the lines of a ``metrics.jsonl``, with nan where a value is null or not finite.

    A line that is no such line, as one that a stopped run left unfinished, is left out with a warning.

    Raises:
        UserError: the file cannot be read, or none of its lines is one of a run.
    """
    metrics, number = Metrics(), 0
    damaged: list[int] = []
    try:
        with open_file(path) as file:
            while lines := [*islice(file, _AT_ONCE)]:
                for line, value in zip(lines, _parsed(lines), strict=True):
                    number += 1
                    row = _row(value)
                    if row is not None:
                        metrics.add(row)
                    elif line.strip():
                        damaged.append(number)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give the metrics.jsonl of a run's folder"
        ) from error
    if damaged and not metrics:
        raise UserError(
            f"{path} has no line with an iteration and its numbers; give the metrics.jsonl of a run's folder"
        )
    if damaged:
        logger.warning(
            "%s: %d of %d lines are damaged and left out, the first of them line %d",
            path,
            len(damaged),
            number,
            damaged[0],
        )
    return metrics


def _parsed(lines: list[bytes]) -> list[Any]:
    """The JSON value of each line, None where there is none.

    Together they are read several times as quickly.
    """
    text = b",".join(lines)
    if text.count(b"{") == text.count(b"}") == len(lines) and all(line[:1] == b"{" for line in lines):
        with suppress(ValueError, RecursionError):
            values: list[Any] = json.loads(b"[" + text + b"]")
            if len(values) == len(lines):  # no text goes on from line to line
                return values
    return [_value(line) for line in lines]


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # also of text that is not UTF-8, and of very long integers
        return None


def _row(row: Any) -> dict[str, float] | None:
    """Numbers by name; None where the value of a line is anything else, or has no iteration."""
    if not isinstance(row, dict) or not _KINDS.issuperset(map(type, row.values())):
        return None
    for key, value in row.items():
        if value is None or not abs(value) <= _LARGEST:
            row[key] = math.nan
    iteration = row.get("iteration", math.nan)
    return row if 0 <= iteration <= _LAST and iteration == int(iteration) else None


def is_loss(name: str) -> bool:
    """Tell a loss from a metric, whose name begins with that of its dataset where there are several."""
    return name == "total_loss" or (name.startswith("loss_") and "/" not in name)


def is_average(name: str, *metrics: str) -> bool:
    """Tell a metric over all categories from that of a category, which may have any name."""
    return re.fullmatch(rf"([^/]+/)?(bbox|segm)/({'|'.join(metrics)})", name) is not None


def metric_points(metrics: Metrics, name: str, smooth: int = 1) -> np.ndarray:
    """(N, 2) float64 of iteration and value; each value is the mean of the last ``smooth`` ones."""
    found = metrics.points(name)
    if smooth > 1:
        found[:, 1] = _trailing_means(found[:, 1], smooth)
    return found


def _trailing_means(values: np.ndarray, count: int) -> np.ndarray:
    """The mean of each value and those before it, ``count`` at most; of the finite ones."""
    known = np.isfinite(values)
    sums = _trailing_sums(np.where(known, values, 0), count)
    numbers = _trailing_sums(known.astype(float), count)
    return np.divide(sums, numbers, out=np.full(len(values), math.nan), where=numbers > 0)


def _trailing_sums(values: np.ndarray, count: int) -> np.ndarray:
    """The sum of each value and those before it, ``count`` at most; put together from sums of 1, 2, 4, ..."""
    total, taken, size = np.zeros(len(values)), 0, 1
    while taken < min(count, len(values)):
        if count & size:
            total[taken:] += values[: len(values) - taken]
            taken += size
        values = values + np.concatenate(
            [np.zeros(min(size, len(values))), values[: max(len(values) - size, 0)]]
        )
        size *= 2
    return total


def _thinned(line: np.ndarray) -> np.ndarray:
    """The points that a picture can show: of each stretch of a long curve the least and the greatest."""
    stretch = math.ceil(2 * len(line) / _MOST_POINTS)
    if stretch <= 2:
        return line
    whole = len(line) // stretch * stretch
    heights = line[:whole, 1].reshape(-1, stretch)
    known = np.isfinite(heights)
    ends = [np.where(known, heights, np.inf).argmin(axis=1), np.where(known, heights, -np.inf).argmax(axis=1)]
    first = np.arange(0, whole, stretch)
    return line[
        np.unique([0, *(first + ends[0]), *(first + ends[1]), *range(whole, len(line)), len(line) - 1])
    ]


def _panels(metrics: Metrics, several: bool) -> dict[str, list[str]]:
    """The curves of each panel."""
    names = metrics.names
    losses = [name for name in names if name == "total_loss" or (is_loss(name) and not several)]
    precision = [name for name in names if is_average(name, "AP")]
    rate = [name for name in names if name == "lr"]
    curves = (sorted(losses, key=lambda name: name != "total_loss"), precision, rate)
    return dict(zip(_TITLES, curves, strict=True))


def _draw_one(metrics: Metrics, smooth: int) -> Figure:
    panels = {title: shown for title, shown in _panels(metrics, False).items() if shown}
    figure, all_axes = _axes(list(panels))
    for (title, shown), axes in zip(panels.items(), all_axes, strict=True):
        for name in shown:
            colour, width = ("0.15", 1.8) if name == "total_loss" else (None, 1.3)
            _line(axes, metric_points(metrics, name, smooth if title == "loss" else 1), title, colour, width)
        if len(shown) > 1:
            add_legend(axes, axes.get_lines(), shown, fontsize=8, frameon=False)
    return figure


def _draw_several(runs: Mapping[str, Metrics], smooth: int) -> Figure:
    """A colour for each run and a line style for each kind of AP; one legend for all panels below them."""
    from matplotlib.lines import Line2D

    panels = {name: _panels(metrics, True) for name, metrics in runs.items()}
    titles = [
        title for title in next(iter(panels.values())) if any(panel[title] for panel in panels.values())
    ]
    figure, all_axes = _axes(titles)
    kinds = list(dict.fromkeys(name for panel in panels.values() for name in panel["AP (%)"]))
    styles: dict[str, tuple[str, str]] = dict(zip(kinds, _STYLES * len(kinds), strict=False))
    colours = _colours(len(runs))
    for (run, panel), colour in zip(panels.items(), colours, strict=True):
        for title, axes in zip(titles, all_axes, strict=True):
            for name in panel[title]:
                line = metric_points(runs[run], name, smooth if title == "loss" else 1)
                _line(axes, line, title, colour, 1.5, *styles.get(name, ()))
    handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours]
    longest = max(len(shortened(name)) for name in runs)
    columns = max(1, min(len(runs), round(60 * len(titles) / (longest + 8))))
    place = "outside lower center"
    add_legend(figure, handles, list(runs), loc=place, ncols=columns, frameon=False, fontsize=9)
    if len(kinds) > 1 and "AP (%)" in titles:
        axes = all_axes[titles.index("AP (%)")]
        lines = [
            Line2D([], [], color="0.3", ls=style, marker=marker, markersize=4)
            for style, marker in styles.values()
        ]
        add_legend(axes, lines, list(styles), frameon=False, fontsize=8)
    return figure


def _axes(titles: Sequence[str]) -> tuple[Figure, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(titles), 3.8), dpi=150, layout="constrained", facecolor="white")
    all_axes = figure.subplots(1, len(titles), squeeze=False, sharex=True)[0]
    for axes, title in zip(all_axes, titles, strict=True):
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _line(
    axes: Any,
    line: np.ndarray,
    title: str,
    colour: Any,
    width: float,
    style: str = "-",
    marker: str = "o",
) -> None:
    marker = marker if title == "AP (%)" or len(line) == 1 else ""
    x, y = _thinned(line).T
    axes.plot(x, y, marker=marker, markersize=4, color=colour, linewidth=width, linestyle=style)


def _colours(count: int) -> list[Any]:
    """Far from each other: a fixed list of ten, or the hues between dark blue and yellow."""
    import matplotlib

    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]
