"""Curves of one run, or of several on one figure."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..files import atomic_write, read_text
from ..text import shortened
from .fonts import add_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".jpg", ".jpeg", ".webp")

_STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")]
"""Lines and markers of the kinds of AP: a run with one evaluation has no line."""

_TITLES = ("loss", "AP (%)", "learning rate")

Rows = list[dict[str, float]]
"""Lines of a ``metrics.jsonl``."""


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
    for name, rows in read.items():
        if not any(_panels(rows, len(runs) > 1).values()):
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


def read_metrics(path: str | Path) -> Rows:
    """Lines of ``metrics.jsonl``; one that a running or stopped run left unfinished is skipped.

    Raises:
        UserError: it cannot be read.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give the metrics.jsonl of a run's folder") from error
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "iteration" in row:
                rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def metric_points(rows: Rows, name: str, smooth: int = 1) -> np.ndarray:
    """(N, 2) float64 of iteration and value; each value is the mean of the last ``smooth`` ones."""
    found = np.array([(row["iteration"], row[name]) for row in rows if name in row], dtype=float)
    found = found.reshape(-1, 2)
    if smooth > 1 and len(found):
        found[:, 1] = [_mean(found[max(0, i - smooth + 1) : i + 1, 1]) for i in range(len(found))]
    return found


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _panels(rows: Rows, several: bool) -> dict[str, list[str]]:
    """The curves of each panel."""
    names = dict.fromkeys(name for row in rows for name in row)
    losses = [name for name in names if name == "total_loss" or (name.startswith("loss_") and not several)]
    precision = [name for name in names if name.split("/")[-1] == "AP"]
    rate = [name for name in names if name == "lr"]
    curves = (sorted(losses, key=lambda name: name != "total_loss"), precision, rate)
    return dict(zip(_TITLES, curves, strict=True))


def _draw_one(rows: Rows, smooth: int) -> Figure:
    panels = {title: shown for title, shown in _panels(rows, False).items() if shown}
    figure, all_axes = _axes(list(panels))
    for (title, shown), axes in zip(panels.items(), all_axes, strict=True):
        for name in shown:
            colour, width = ("0.15", 1.8) if name == "total_loss" else (None, 1.3)
            _line(axes, metric_points(rows, name, smooth if title == "loss" else 1), title, colour, width)
        if len(shown) > 1:
            add_legend(axes, axes.get_lines(), shown, fontsize=8, frameon=False)
    return figure


def _draw_several(runs: Mapping[str, Rows], smooth: int) -> Figure:
    """A colour for each run and a line style for each kind of AP; one legend for all panels below them."""
    from matplotlib.lines import Line2D

    panels = {name: _panels(rows, True) for name, rows in runs.items()}
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
    x, y = line.T
    axes.plot(x, y, marker=marker, markersize=4, color=colour, linewidth=width, linestyle=style)


def _colours(count: int) -> list[Any]:
    """Far from each other: a fixed list of ten, or the hues between dark blue and yellow."""
    import matplotlib

    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]
