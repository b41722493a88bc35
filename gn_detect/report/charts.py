"""Line charts as SVG paths and ticks, which the page's template draws in its own colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 38
"""Margins around the plot, for ticks and names of the axes."""
_MOST_POINTS = 400
"""Of a line; more cannot be told apart."""
_LEAST = 1e-30
"""A highest value of an axis that begins at 0; with less, as where all values are negative, it ends at 1."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: in the legend.
        path: SVG's ``d``.
        colour: a number, from 0, of the page's palette.
        group: which choice on the page shows it; empty for always.
        dots: centres of markers in SVG units; empty for a plain line.
    """

    name: str
    path: str
    colour: int
    group: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """What the template draws; places are in SVG units of a ``WIDTH`` x ``HEIGHT`` picture."""

    title: str
    x_label: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def line_chart(
    title: str,
    x_label: str,
    series: Mapping[str, np.ndarray] | Sequence[tuple[str, np.ndarray, int, str]],
    *,
    x_range: tuple[float, float] | None = None,
    y_max: float | None = None,
    dots: bool = False,
) -> Chart:
    """Curves over common axes; y begins at 0.

    Args:
        title: says what y is.
        x_label: of the horizontal axis.
        series: (N, 2) x and y by name, or tuples of name, points, colour and group, see :class:`Line`.
        x_range, y_max: of the axes; by default what the data need.
        dots: mark each point.
    """
    if isinstance(series, Mapping):
        series = [(name, points, number, "") for number, (name, points) in enumerate(series.items())]
    everything = np.concatenate([points for _, points, _, _ in series] or [np.zeros((0, 2))])
    everything = everything[np.isfinite(everything).all(axis=1)]
    x0, x1 = x_range or (everything[:, 0].min(), everything[:, 0].max()) if len(everything) else (0, 1)
    x0, x1 = (x0, x1) if x1 > x0 else (x0 - 0.5, x0 + 0.5)
    highest = float(everything[:, 1].max()) if len(everything) else 0.0
    y_ticks = ticks(0, y_max or (highest if highest > _LEAST else 1.0))
    y1 = y_max or y_ticks[-1]
    across, up = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def place(points: np.ndarray) -> np.ndarray:
        x = _LEFT + (points[:, 0] - x0) / (x1 - x0) * across
        return np.stack([x, HEIGHT - _BOTTOM - np.clip(points[:, 1] / y1, 0, 1) * up], axis=1)

    lines = []
    for name, points, colour, group in series:
        placed = place(points[:: max(1, len(points) // _MOST_POINTS)])
        finite = placed[np.isfinite(placed).all(axis=1)]
        marked = [(round(x, 1), round(y, 1)) for x, y in finite] if dots or len(finite) == 1 else []
        lines.append(Line(name, _path(placed), colour, group, marked))
    return Chart(
        title,
        x_label,
        lines,
        [(_LEFT + (x - x0) / (x1 - x0) * across, _number(x)) for x in ticks(x0, x1) if x0 <= x <= x1],
        [(HEIGHT - _BOTTOM - y / y1 * up, _number(y)) for y in y_ticks if y <= y1 * 1.0001],
    )


def _path(points: np.ndarray) -> str:
    """A new stroke begins behind each point that is not finite."""
    parts, pen_down = [], False
    for x, y in points.tolist():
        if math.isfinite(x) and math.isfinite(y):
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
            pen_down = True
        else:
            pen_down = False
    return "".join(parts)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from ``low`` or below to ``high`` or above: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}".replace("e-0", "e-")
