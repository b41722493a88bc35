"""Draw the curves of one run, of several runs on one figure, or of a page."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..files import atomic_write
from ..text import shortened
from .fonts import add_legend
from .metrics import Metrics, is_average, is_loss, is_validation_loss, metric_points, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = (".png", ".svg", ".jpg", ".jpeg", ".webp")
_AP_STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")]  # markers show a run with one evaluation
_LOSS, _AP, _RATE = "loss", "AP (%)", "learning rate"
_MOST_POINTS = 8000  # of a curve: ten per column of pixels
_MOST_CHART_POINTS = 300  # of a curve on a page
_LEAST_TOP = 1e-30  # smaller values, such as subnormal ones, give no axis


def plot_curves(
    metrics_jsonl: str | Path | Mapping[str, str | Path], path: str | Path, smooth: int = 1
) -> None:
    """Draw losses, AP and learning rate by iteration, of one run or of several in the same axes.

    A single run gets a curve for each loss. Several runs get one colour each, and only total loss and AP.

    Args:
        metrics_jsonl: the run's file, or the file of each run by the name to show. Each line has
            ``iteration`` and numbers, or null for values that are not finite.
        path: picture to write; its suffix, .png, .svg, .jpg or .webp, gives the format.
        smooth: losses are means over so many log lines.

    Raises:
        UserError: there is nothing to plot, or the picture cannot be written.
    """
    import matplotlib
    from matplotlib.lines import Line2D

    runs = metrics_jsonl if isinstance(metrics_jsonl, Mapping) else {"": metrics_jsonl}
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise UserError(
            "wrong-ending", f"cannot write the picture {path}: its name must end in {', '.join(_FORMATS)}"
        )
    read = {name: read_metrics(source) for name, source in runs.items()}
    panels = {name: _panels(metrics, several=len(runs) > 1) for name, metrics in read.items()}
    for name, panel in panels.items():
        if not any(panel.values()):
            problem = "has neither losses nor AP; wait for the first log line of the run"
            raise UserError("no-metrics", f"{runs[name]} {problem}")
    titles = [title for title in (_LOSS, _AP, _RATE) if any(panel[title] for panel in panels.values())]
    kinds = list(dict.fromkeys(name for panel in panels.values() for name in panel[_AP]))
    styles = dict(zip(kinds, _AP_STYLES * len(kinds), strict=False))
    figure, all_axes = _make_axes(titles)
    for (run, metrics), colour in zip(read.items(), _colours(len(read)), strict=True):
        for title, axes in zip(titles, all_axes, strict=True):
            for name in panels[run][title]:
                points = metric_points(metrics, name, smooth if title == _LOSS else 1)
                look: dict[str, Any] = {"linewidth": 1.3}
                if len(read) > 1:
                    style, marker = styles.get(name, _AP_STYLES[0])
                    look = {"color": colour, "linewidth": 1.5, "linestyle": style, "marker": marker}
                elif name == "total_loss":
                    look = {"color": "0.15", "linewidth": 1.8}
                _draw_line(axes, points, marked=title == _AP or is_validation_loss(name), **look)
    if len(read) > 1:
        _add_legend_of_runs(figure, list(read), len(titles))
        if len(kinds) > 1:
            lines = [Line2D([], [], color="0.3", ls=ls, marker=m, markersize=4) for ls, m in styles.values()]
            add_legend(all_axes[titles.index(_AP)], lines, list(styles), frameon=False, fontsize=8)
    else:
        for names, axes in zip(filter(None, panels[run].values()), all_axes, strict=True):
            if len(names) > 1:
                add_legend(axes, axes.get_lines(), names, fontsize=8, frameon=False)
    for axes in all_axes:
        axes.set_ylim(0, _top(axes))
    metadata = {"Date": None} if suffix == ".svg" else None
    with atomic_write(path, "wb") as file, matplotlib.rc_context({"svg.hashsalt": "gn_detect"}):
        figure.savefig(file, format=suffix[1:], metadata=metadata, facecolor="white")


def _panels(metrics: Metrics, several: bool) -> dict[str, list[str]]:
    names = metrics.names
    shown = [name for name in names if is_loss(name) or is_validation_loss(name)]
    losses = [name for name in shown if name == "total_loss" or not several]
    return {
        _LOSS: sorted(losses, key=lambda name: name != "total_loss"),
        _AP: [name for name in names if is_average(name, "AP")],
        _RATE: [name for name in names if name == "lr"],
    }


def _add_legend_of_runs(figure: Figure, names: Sequence[str], panels: int) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=2) for colour in _colours(len(names))]
    longest = max(len(shortened(name)) for name in names)
    columns = max(1, min(len(names), round(60 * panels / (longest + 8))))
    place = "outside lower center"
    add_legend(figure, handles, names, loc=place, ncols=columns, frameon=False, fontsize=9)


def _colours(count: int) -> list[Any]:
    """Return distinct colours: a fixed list of ten, or the hues between dark blue and yellow."""
    import matplotlib

    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _make_axes(
    titles: Sequence[str], x_label: str = "iteration", width: float = 5.2
) -> tuple[Figure, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * len(titles), 3.8), dpi=150, layout="constrained", facecolor="white")
    all_axes = figure.subplots(1, len(titles), squeeze=False, sharex=True)[0]
    for axes, title in zip(all_axes, titles, strict=True):
        axes.set(title=title, xlabel=x_label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _draw_line(
    axes: Any, points: np.ndarray, marked: bool, most: int = _MOST_POINTS, marker: str = "o", **style: Any
) -> Any:
    """Draw (N, 2) points, each with a marker if ``marked`` or alone, and at most about ``most`` of them."""
    x, y = _thinned(points, most).T
    (line,) = axes.plot(x, y, marker=marker if marked or len(points) == 1 else "", markersize=4, **style)
    return line


def _top(axes: Any) -> float | None:
    """Return the upper end of an axis, a little above the highest point; None if no point is above 0."""
    highest = float(axes.dataLim.y1)
    return 1.06 * highest if _LEAST_TOP < highest < math.inf else None


def _thinned(line: np.ndarray, most: int = _MOST_POINTS) -> np.ndarray:
    """Return what a picture can show: the least and the greatest point of each stretch of a long curve."""
    stretch = math.ceil(2 * len(line) / most)
    if stretch <= 2:
        return line
    missing = -len(line) % stretch
    heights = np.pad(line[:, 1], (0, missing), constant_values=math.nan).reshape(-1, stretch)
    known = np.isfinite(heights)
    lowest = np.where(known, heights, np.inf).argmin(axis=1)
    highest = np.where(known, heights, -np.inf).argmax(axis=1)
    first = np.arange(0, len(line), stretch)
    return line[np.unique([0, *(first + lowest), *(first + highest), len(line) - 1])]


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Attributes:
        name: for the legend, and shown where the mouse rests on the curve.
        points: (N, 2) x and y; nan makes a gap.
        colour: number of the page's colour, from 0.
        group: choice on the page that shows the curve; empty for always. Only ``"all"`` is shown at first.
    """

    name: str
    points: np.ndarray
    colour: int
    group: str = ""


def draw_chart(
    curves: Sequence[Curve],
    x_label: str,
    key: str,
    *,
    x_range: tuple[float, float],
    y_max: float | None = None,
    marked: bool = False,
) -> str:
    """Return curves over common axes as an SVG element for a page of HTML; y begins at 0.

    Each curve is a ``<g class="line colourN">`` with its group in ``data-group``. The page's style gives
    the colours. Names are escaped, and are no mathematics.

    Args:
        curves: in drawing order.
        x_label: name of the horizontal axis.
        key: unique among the charts of the page.
        x_range: ends of the horizontal axis.
        y_max: upper end of the vertical axis; by default a little above the highest point.
        marked: mark each point.
    """
    import matplotlib

    figure, (axes,) = _make_axes([""], x_label, width=6.4)
    axes.spines[:].set_color("0.5")
    axes.tick_params(bottom=False, left=False)
    for number, curve in enumerate(curves):
        look: dict[str, Any] = {"gid": f"curve-{number}", "color": "black", "linewidth": 1.5}
        _draw_line(axes, curve.points, marked, _MOST_CHART_POINTS, **look)
    axes.set_xlim(*x_range)
    axes.set_ylim(0, y_max or _top(axes) or 1)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"|font[-\w]*: [^;"]*; ?| transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r' (d|x|y|width|height)="[^"]*"', lambda found: _compact(found[0]), svg)
    # The page's style has the look of markers and grid.
    svg = re.sub(r'(<(?:use|path id=)[^>]*) style="[^"]*"', r"\1", svg)
    svg = re.sub(r' style="[^"]*stroke: #b0b0b0[^"]*"', ' class="grid"', svg)
    svg = re.sub(r"(?<=>)\s+(?=<)", "", svg)
    return re.sub(r'<g id="curve-(\d+)">', lambda found: _group(curves[int(found[1])]), svg)


def _compact(attribute: str) -> str:
    """Round the numbers of an SVG attribute to a tenth of a point, and remove spaces."""
    rounded = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", attribute)
    return re.sub(r"\s*([A-Zz\"])\s*", r"\1", rounded)


def _group(curve: Curve) -> str:
    group = f' data-group="{html.escape(curve.group)}"' if curve.group else ""
    hidden = " hidden" if curve.group not in ("", "all") else ""
    name = html.escape(curve.name)
    return f'<g class="line colour{curve.colour % 8}"{group}{hidden}><title>{name}</title>'
