"""Outlines and bitmaps of drawn shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as coco_mask

_CORNERS = 64  # of a circle: its polygon has 0.2% less area


def ellipse_polygon(cx: float, cy: float, rx: float, ry: float, angle: float = 0.0) -> list[float]:
    """Return ``x0, y0, x1, y1, ...`` of an ellipse with half axes ``rx`` and ``ry``.

    Args:
        cx, cy: centre.
        rx, ry: half axes.
        angle: radians from the x axis towards the y axis, which is clockwise in an image.
    """
    turns = np.arange(_CORNERS) * (2 * math.pi / _CORNERS)
    along, across = rx * np.cos(turns), ry * np.sin(turns)
    x = cx + along * math.cos(angle) - across * math.sin(angle)
    y = cy + along * math.sin(angle) + across * math.cos(angle)
    points: list[float] = np.column_stack([x, y]).round(4).ravel().tolist()
    return points


def box_polygon(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """Return the corners of a box as a polygon."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def encode_bitmap(bitmap: np.ndarray, left: int, top: int, height: int, width: int) -> dict[str, object]:
    """Return compressed RLE of a bitmap (h, w) whose corner is at (left, top) of an image, cut to it."""
    whole = np.zeros((height, width), dtype=np.uint8, order="F")
    y0, x0 = max(top, 0), max(left, 0)
    part = bitmap[y0 - top :, x0 - left :][: max(height - y0, 0), : max(width - x0, 0)]
    whole[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part != 0
    found = coco_mask.encode(whole)
    return {"size": [height, width], "counts": found["counts"].decode("ascii")}


def runs_to_bitmap(runs: Sequence[int], height: int, width: int) -> np.ndarray:
    """Return bool (height, width) of run lengths along the rows, of background and object in turn.

    Raises:
        ValueError: a run is negative, or their sum is not ``height * width``.
    """
    lengths = np.array(runs, dtype=np.int64)
    if height <= 0 or width <= 0 or (lengths < 0).any() or (lengths > height * width).any():
        raise ValueError("a run that is negative or longer than the mask")
    if int(lengths.sum()) != height * width:
        raise ValueError(f"runs of {int(lengths.sum())} pixels for a mask of {height * width}")
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape(height, width)


def connected_pieces(bitmap: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Return the pieces of a bitmap, joined at corners, too: left, top and bool (h, w) of each, by rows.

    Runs along the rows are joined with those of the row above that they touch.
    """
    padded = np.zeros((bitmap.shape[0], bitmap.shape[1] + 2), dtype=np.int8)
    padded[:, 1:-1] = bitmap
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]  # exclusive
    if not len(rows):
        return []
    label = _join_runs(rows, starts, ends, bitmap.shape[0])
    order = np.argsort(label, kind="stable")
    pieces = []
    for members in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        top, left = int(rows[members].min()), int(starts[members].min())
        piece = np.zeros((int(rows[members].max()) - top + 1, int(ends[members].max()) - left), dtype=bool)
        for run in members.tolist():
            piece[rows[run] - top, starts[run] - left : ends[run] - left] = True
        pieces.append((left, top, piece))
    return pieces


def _join_runs(rows: np.ndarray, starts: np.ndarray, ends: np.ndarray, height: int) -> np.ndarray:
    """Return the least number of a run that each run is joined with."""
    first = np.searchsorted(rows, np.arange(height + 1)).tolist()
    begin, end, parent = starts.tolist(), ends.tolist(), list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    for row in range(1, height):
        above = first[row - 1]
        for run in range(first[row], first[row + 1]):
            while above < first[row] and end[above] < begin[run]:
                above += 1
            other = above
            while other < first[row] and begin[other] <= end[run]:
                one, two = root(run), root(other)
                parent[max(one, two)] = min(one, two)
                other += 1
    return np.array([root(run) for run in range(len(rows))])
