"""Draw name plates next to objects, where they hide least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .canvas import Canvas, box_area, box_overlap
from .fonts import WEIGHT, set_text

_PAD = 0.18  # around the text of a plate, as a share of the text's size


def draw_labels(canvas: Canvas, boxes: np.ndarray, labels: Sequence[str], colours: Sequence[str]) -> None:
    """Draw rounded plates near their boxes (N, 4) ``xyxy``, those of large objects first.

    Plates do not cover each other. Empty labels, and small objects in a crowded place, get none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, font_size = canvas.figure, canvas.text_size
    renderer = FigureCanvasAgg(figure).get_renderer()
    picture_size = np.array(figure.bbox.size)
    taken = np.zeros((0, 4))
    for index in np.argsort(-box_area(boxes), kind="stable"):
        if not labels[index]:
            continue
        text = figure.text(0, 0, "", size=font_size, weight=WEIGHT)
        text.set(ha="center", va="center", transform=None)
        set_text(text, labels[index])
        extent = text.get_window_extent(renderer)
        size = np.array([extent.width, extent.height]) + 2 * _PAD * font_size
        plate = _free_place(boxes[index], size, picture_size, boxes, taken)
        if plate is None:
            text.remove()
            continue
        taken = np.vstack([taken, plate])
        text.set_position(((plate[0] + plate[2]) / 2, figure.bbox.height - (plate[1] + plate[3]) / 2))
        style = f"round,pad={_PAD},rounding_size=0.25"
        text.set_bbox({"boxstyle": style, "facecolor": colours[index], "edgecolor": "none", "alpha": 0.9})


def _free_place(
    box: np.ndarray, size: np.ndarray, picture_size: np.ndarray, boxes: np.ndarray, taken: np.ndarray
) -> np.ndarray | None:
    """Return the place ``xyxy`` where a label hides least; None for a small object without a free one.

    Args:
        box: the object's, ``xyxy``.
        size, picture_size: ``width, height`` of the label and of the picture.
        boxes: (N, 4) of all objects.
        taken: (M, 4) labels already placed.
    """
    (x0, y0, x1, y1), (width, height) = box, size
    above, below, middle = y0 - height - 1, y1 + 1, (y0 + y1 - height) / 2
    left, right, centre = x0, x1 - width, (x0 + x1 - width) / 2
    places = [(x, y) for x in (left, right, centre) for y in (above, below, y0 + 2, y1 - height - 2)]
    places += [(x1 + 2, middle), (x0 - width - 2, middle), (centre, middle)]
    corners = np.clip(places, 1, np.maximum(picture_size - size - 1, 1))
    plates = np.concatenate([corners, corners + size], axis=1)
    # A hidden area counts as a share of its box: a corner of a large box costs little, a small box all.
    hidden = (box_overlap(plates, boxes) / np.maximum(box_area(boxes), 1)).sum(axis=1)
    collides = box_overlap(plates, taken).sum(axis=1) / size.prod()
    best = int((10 * collides + hidden + 0.01 * np.arange(len(plates))).argmin())
    large = min(x1 - x0, y1 - y0) > 2 * height
    return None if (collides[best] > 0.02 and not large) or hidden[best] > 0.4 else plates[best]
