"""Outlines and bitmaps of drawn shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pycocotools.mask as coco_mask

from ..coco.rle import join_runs

MOST_RUNS = 3_000_000  # along the rows of a mask: some seconds

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
    """Return compressed RLE of a bitmap (h, w) whose corner is at (left, top) of an image, cut to it.

    It takes time and memory for the bitmap, whatever the size of the image.
    """
    y0, x0 = max(top, 0), max(left, 0)
    part = bitmap[y0 - top :, x0 - left :][: max(height - y0, 0), : max(width - x0, 0)]
    columns, rows = np.nonzero(part.T)
    return encode_pixels((columns + x0) * height + rows + y0, height, width)


def encode_pixels(places: np.ndarray, height: int, width: int) -> dict[str, object]:
    """Return compressed RLE of pixels by their ascending places ``x * height + y``."""
    breaks = np.flatnonzero(np.diff(places) > 1)
    starts = places[np.append(0, breaks + 1)] if len(places) else places
    ends = places[np.append(breaks, len(places) - 1)] + 1 if len(places) else places
    edges = np.column_stack([starts, ends]).ravel()
    counts = np.diff(edges, prepend=0, append=height * width).tolist()
    found = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
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


def connected_pieces(values: np.ndarray, most: int = MOST_RUNS) -> list[tuple[int, int, int, np.ndarray]]:
    """Return the pieces of equal values other than 0; pixels that meet at a corner are joined.

    Runs along the rows are joined with those of the row above that they touch.

    Args:
        values: (H, W) integers or bool.
        most: runs.

    Returns:
        Value, left, top and bool (h, w) of each piece, by the rows of their first pixels.

    Raises:
        ValueError: there are more than ``most`` runs.
    """
    height, width = values.shape
    padded = np.zeros((height, width + 2), dtype=values.dtype)
    padded[:, 1:-1] = values
    rows, columns = np.nonzero(padded[:, 1:] != padded[:, :-1])
    found = padded[rows, columns + 1]  # of the run that begins here; the last of a row is 0
    begins = np.flatnonzero(found)
    if len(begins) > most:
        raise ValueError(f"more than {most} runs of pixels")
    if not len(begins):
        return []
    rows, starts, ends, found = rows[begins], columns[begins], columns[begins + 1], found[begins]
    label = join_runs(rows, starts, ends, found, height)
    order = np.argsort(label, kind="stable")
    pieces = []
    for members in np.split(order, np.flatnonzero(np.diff(label[order])) + 1):
        top, left = int(rows[members].min()), int(starts[members].min())
        piece = np.zeros((int(rows[members].max()) - top + 1, int(ends[members].max()) - left), dtype=bool)
        for run in members.tolist():
            piece[rows[run] - top, starts[run] - left : ends[run] - left] = True
        pieces.append((int(found[members[0]]), left, top, piece))
    return pieces
