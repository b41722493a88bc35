"""Draw the content of a dataset: classes, sizes of objects and images, objects in an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.doctor.checks import LARGE, SMALL, Part
from ..files import atomic_write
from .fonts import add_legend, drawable

_MOST_CATEGORIES = 40  # with a bar each; the title counts the others
_STEPS: dict[str, Any] = {"histtype": "stepfilled", "alpha": 0.45}


def draw_histograms(path: str | Path, parts: Sequence[Part]) -> None:
    """Write a PNG with four panels; each shows all parts.

    Args:
        path: picture to write; a missing folder is created.
        parts: what the doctor found.

    Raises:
        UserError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    categories = _categories(parts)
    height = max(6.0, 1.5 + 0.17 * len(categories) * max(1, 0.6 * len(parts)))
    figure = Figure(figsize=(13, height), dpi=100, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(3, 2, width_ratios=[1.1, 1])
    _draw_categories(figure.add_subplot(grid[:, 0]), parts, categories)
    _draw_sizes(figure.add_subplot(grid[0, 1]), parts)
    _draw_crowding(figure.add_subplot(grid[1, 1]), parts)
    _draw_images(figure.add_subplot(grid[2, 1]), parts)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


def _categories(parts: Sequence[Part]) -> list[tuple[int, str]]:
    """Return ids and names, the most frequent first."""
    names = {key: name for part in parts for key, name in part.categories.items()}
    total = {key: sum(part.category_counts[key] for part in parts) for key in names}
    order = sorted(names, key=lambda key: (-total[key], key))[:_MOST_CATEGORIES]
    return [(key, names[key]) for key in order]


def _draw_categories(axes: Any, parts: Sequence[Part], categories: Sequence[tuple[int, str]]) -> None:
    rows, height = np.arange(len(categories)), 0.8 / len(parts)
    for number, part in enumerate(parts):
        counts = [part.category_counts[key] for key, _ in categories]
        bars = axes.barh(rows + (number - (len(parts) - 1) / 2) * height, counts, height)
        axes.bar_label(bars, padding=2, fontsize=6 if len(parts) > 1 else 7)
    names = [drawable(name) for _, name in categories]
    families = list(dict.fromkeys(family for _, fonts in names for family in fonts))
    plain = {"parse_math": False, "usetex": False, "family": families or None}
    axes.set_yticks(rows, [text for text, _ in names], fontsize=8, **plain)
    axes.set_ylim(max(len(categories), 6) - 0.4, -0.6)  # a few bars stay bars
    axes.set_xscale("symlog", linthresh=1)
    known = {key for part in parts for key in part.categories}
    unused = sum(not any(part.category_counts[key] for part in parts) for key in known)
    shown = f"the {len(categories)} most frequent of {len(known)}" if len(known) > len(categories) else ""
    axes.set_title(", ".join(filter(None, ["objects of each category", shown, f"{unused} unused"])))
    _tidy(axes, parts)


def _draw_sizes(axes: Any, parts: Sequence[Part]) -> None:
    largest = max((max(part.sizes, default=1) for part in parts), default=1)
    bins = np.geomspace(1, max(largest, 2), 40)
    for part in parts:
        axes.hist(np.clip(part.sizes, 1, None), bins, **_STEPS)
    for border in (SMALL, LARGE):
        axes.axvline(border, color="0.4", linestyle=":", linewidth=1)
    sides = np.concatenate([part.sizes for part in parts]) if parts else np.zeros(0)
    small, large = (np.mean(sides < SMALL), np.mean(sides >= LARGE)) if len(sides) else (0, 0)
    axes.set_title(f"size of objects: {small:.0%} small, {1 - small - large:.0%} medium, {large:.0%} large")
    axes.set(xscale="log", xlabel="square root of the box's area (pixels)")
    _tidy(axes, parts)


def _draw_crowding(axes: Any, parts: Sequence[Part]) -> None:
    counts = [[part.image_counts[key] for key in part.images] for part in parts]
    most = max((max(values, default=0) for values in counts), default=0)
    step = max(1, round(most / 40))
    bins = np.arange(-0.5, most + 0.5 + step, step)
    for values in counts:
        axes.hist(values, bins, **_STEPS)
    axes.set(title=f"objects in an image: at most {most}", xlabel="objects")
    _tidy(axes, parts)


def _draw_images(axes: Any, parts: Sequence[Part]) -> None:
    for part in parts:
        sizes = np.array([[r.width, r.height] for r in part.images.values()]).reshape(-1, 2)
        axes.scatter(sizes[:, 0], sizes[:, 1], s=14, alpha=0.4, linewidths=0)
    axes.set(title="size of images", xlabel="width (pixels)", ylabel="height")
    _tidy(axes, parts)


def _tidy(axes: Any, parts: Sequence[Part]) -> None:
    from matplotlib.patches import Patch

    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(parts) > 1:
        patches = [Patch(color=f"C{number}", alpha=0.7) for number in range(len(parts))]
        add_legend(axes, patches, [part.name for part in parts], fontsize=8, frameon=False)
