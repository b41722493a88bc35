"""Pictures for people: detections and ground truth drawn on images, grids of both, and training curves.

Outlines, fills and labels are drawn by matplotlib's Agg on a transparent layer that is then laid over the
picture: pixels that nothing is drawn on stay as they were.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from .errors import UserError
from .files import atomic_write
from .ops.masks import rasterize_polygons
from .structures import Detections, Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.path import Path as Outline

COLOURS = (
    "#ff4d4d #3fa7ff #48d65a #ffc02e #c56bff #12d3d3 #ff7ac6 #ff8a3d #a5e02a #8186ff #f2ee4a #1fc495".split()
)
"""Of instances, in turn: bright, and each far from the next."""

SHORT_SIDE, LONG_SIDE = 480, 1600
"""Small images are enlarged until the short side or the long side has this many pixels."""

_CROWDED = 15
"""With more objects than this, masks go without boxes, and objects of the only class without names."""
_GAP = 8
"""Pixels between the pictures of a grid."""
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def draw_detections(
    image: np.ndarray, detections: Detections, class_names: Sequence[str], score_threshold: float = 0.5
) -> np.ndarray:
    """The image with masks, boxes, names and scores of what was detected.

    Labels do not cover each other; small objects in a crowded place go without.

    Args:
        image: uint8 RGB (H, W, 3), or grey (H, W).
        detections: in the image's pixels.
        class_names: name of each contiguous label.
        score_threshold: detections below it are left out.

    Returns:
        uint8 RGB (H', W', 3); small images are enlarged so that the text is legible, see ``SHORT_SIDE``.

    Raises:
        ValueError: the image has another type or shape.
    """
    chosen = detections.to("cpu")
    chosen = chosen[chosen.scores >= score_threshold]
    names = _names(chosen.labels, class_names)
    labels = [
        f"{name} {score:.2f}".strip() for name, score in zip(names, chosen.scores.tolist(), strict=True)
    ]
    masks = [None] * len(chosen) if chosen.masks is None else list(chosen.masks.numpy())
    return _draw(image, chosen.boxes.double().numpy(), masks, labels)


def draw_ground_truth(image: np.ndarray, target: Target, class_names: Sequence[str]) -> np.ndarray:
    """The image with the masks, boxes and names of its annotations; see :func:`draw_detections`.

    Args:
        image: uint8 RGB (H, W, 3), or grey (H, W).
        target: in the image's pixels; polygons or bitmaps.
        class_names: name of each contiguous label.
    """
    target = target.to("cpu")
    masks: list[np.ndarray | None] = [
        mask.numpy() if isinstance(mask, Tensor) else rasterize_polygons(mask, *image.shape[:2])
        for mask in target.masks or []
    ]
    masks = masks or [None] * len(target)
    return _draw(image, target.boxes.double().numpy(), masks, _names(target.labels, class_names))


def _names(labels: Tensor, class_names: Sequence[str]) -> list[str]:
    if len(class_names) == 1 and len(labels) > _CROWDED:
        return [""] * len(labels)
    return [
        class_names[label] if 0 <= label < len(class_names) else f"class {label}" for label in labels.tolist()
    ]


def _draw(
    image: np.ndarray, boxes: np.ndarray, masks: Sequence[np.ndarray | None], labels: Sequence[str]
) -> np.ndarray:
    """Large objects below small ones, then all labels on top. ``boxes`` are (N, 4) ``xyxy``."""
    picture = _enlarged(image)
    if not len(boxes):
        return picture
    scale = picture.shape[0] / image.shape[0]
    boxes = boxes * scale
    colours = _pick_colours(boxes)
    figure = _layer(picture)
    for index in np.argsort(-_area(boxes), kind="stable"):
        outline = _outline(masks[index], scale)
        if outline is not None:
            _draw_mask(figure, outline, colours[index])
        if outline is None or len(boxes) <= _CROWDED:
            _draw_box(figure, boxes[index], colours[index], faint=outline is not None)
    _draw_labels(figure, boxes, labels, colours)
    return _flatten(figure, picture)


def _enlarged(image: np.ndarray) -> np.ndarray:
    """RGB at the size to draw on."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"image must be uint8 (H, W, 3) or (H, W), not {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    scale = max(1.0, min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width)))
    picture = np.array(Image.fromarray(image).convert("RGB"))
    return _resized(picture, round(height * scale), round(width * scale))


def _area(boxes: np.ndarray) -> np.ndarray:
    """Of (..., 4) ``xyxy`` boxes; 0 where a side is negative."""
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def _pick_colours(boxes: np.ndarray) -> list[str]:
    """The colour of each box: the first one unused, or else the one whose nearest bearer is farthest away."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    picked: list[int] = []
    for number, centre in enumerate(centres):
        nearest = np.full(len(COLOURS), np.inf)
        np.minimum.at(nearest, picked, np.linalg.norm(centres[:number] - centre, axis=1))
        picked.append(int(nearest.argmax()))
    return [COLOURS[index] for index in picked]


def _layer(picture: np.ndarray) -> Figure:
    """A transparent figure of the picture's size, one pixel to matplotlib's point."""
    from matplotlib.figure import Figure

    height, width = picture.shape[:2]
    # The canvas rounds its size down; a hundredth of a pixel keeps 28.999... from becoming 28.
    figure = Figure(figsize=((width + 0.01) / 72, (height + 0.01) / 72), dpi=72)
    figure.patch.set_visible(False)
    return figure


def _flatten(figure: Figure, picture: np.ndarray) -> np.ndarray:
    """The picture with what was drawn laid over it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    layer = Image.fromarray(np.array(canvas.buffer_rgba()))
    return np.array(Image.alpha_composite(Image.fromarray(picture).convert("RGBA"), layer).convert("RGB"))


def _add(figure: Figure, artist: Any) -> None:
    """Put in what has the picture's coordinates: pixels, y downwards."""
    from matplotlib.transforms import Affine2D

    artist.set_transform(Affine2D().scale(1, -1).translate(0, figure.bbox.height))
    figure.add_artist(artist)


def _line_width(figure: Figure) -> float:
    return max(1.2, min(figure.bbox.size) / 320)


def _draw_mask(figure: Figure, outline: Outline, colour: str) -> None:
    """A clear fill, and a line that dark seams set off from what is around it."""
    from matplotlib.patches import PathPatch

    line = _line_width(figure)
    _add(figure, PathPatch(outline, facecolor=colour, edgecolor="none", alpha=0.38))
    for edge, width, alpha in (("black", line + 1.6, 0.45), (colour, line, 1.0)):
        _add(figure, PathPatch(outline, fill=False, edgecolor=edge, linewidth=width, alpha=alpha))


def _draw_box(figure: Figure, box: np.ndarray, colour: str, faint: bool) -> None:
    """Faint beside a mask, which it should not compete with."""
    from matplotlib.patches import Rectangle

    line, alpha = _line_width(figure) * (0.7 if faint else 1.0), 0.6 if faint else 1.0
    patch = Rectangle((box[0], box[1]), *(box[2:] - box[:2]), fill=False, edgecolor=colour)
    patch.set(linewidth=line, alpha=alpha)
    _add(figure, patch)


def _outline(mask: np.ndarray | None, scale: float) -> Outline | None:
    """Smooth closed curves around a bool (H, W) mask and its holes, times ``scale``; None without any."""
    from contourpy import contour_generator
    from matplotlib.path import Path as Outline

    if mask is None or not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    pad, top, left = 3, rows[0], columns[0]
    inside = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], pad)
    blurred = Image.fromarray(inside * np.uint8(255)).filter(ImageFilter.GaussianBlur(1.0))
    # Blur rounds off the stairs of the pixels; the limits keep each pixel on its own side of the curve.
    field = np.asarray(blurred) / 255
    field = np.where(inside, np.maximum(field, 0.51), np.minimum(field, 0.49))
    curves: Any = contour_generator(z=field).lines(0.5)
    corner = np.array([left, top]) - pad + 0.5
    return Outline.make_compound_path(*[Outline((curve + corner) * scale, closed=True) for curve in curves])


def _draw_labels(figure: Figure, boxes: np.ndarray, labels: Sequence[str], colours: Sequence[str]) -> None:
    """Rounded name plates near their boxes, those of large objects first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    picture_size = np.array(figure.bbox.size)
    font_size, pad = float(np.clip(picture_size.min() / 42, 10, 28)), 0.18
    taken = np.zeros((0, 4))
    for index in np.argsort(-_area(boxes), kind="stable"):
        if not labels[index]:
            continue
        text = figure.text(0, 0, " ".join(labels[index].split()), size=font_size, weight="bold")
        text.set(family="DejaVu Sans", ha="center", va="center", parse_math=False, transform=None)
        extent = text.get_window_extent(renderer)
        size = np.array([extent.width, extent.height]) + 2 * pad * font_size
        plate = _free_place(boxes[index], size, picture_size, boxes, taken)
        if plate is None:
            text.remove()
            continue
        taken = np.vstack([taken, plate])
        text.set_position(((plate[0] + plate[2]) / 2, figure.bbox.height - (plate[1] + plate[3]) / 2))
        style = f"round,pad={pad},rounding_size=0.25"
        text.set_bbox({"boxstyle": style, "facecolor": colours[index], "edgecolor": "none", "alpha": 0.9})


def _free_place(
    box: np.ndarray, size: np.ndarray, picture_size: np.ndarray, boxes: np.ndarray, taken: np.ndarray
) -> np.ndarray | None:
    """Where the label of ``box`` hides least: ``xyxy``, or None for a small object without room.

    Args:
        box: of the object, ``xyxy``.
        size, picture_size: ``width, height`` of the label and the picture.
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
    # What it hides, as parts of the objects' boxes: a corner of a large one costs little, a small one all.
    hidden = (_overlap(plates, boxes) / np.maximum(_area(boxes), 1)).sum(axis=1)
    collides = _overlap(plates, taken).sum(axis=1) / size.prod()
    best = int((10 * collides + hidden + 0.01 * np.arange(len(plates))).argmin())
    large = min(x1 - x0, y1 - y0) > 2 * height
    return None if (collides[best] > 0.02 and not large) or hidden[best] > 0.4 else plates[best]


def _overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Areas (N, M) in common of (N, 4) and (M, 4) ``xyxy`` boxes."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return _area(np.concatenate([low, high], axis=-1))


def side_by_side(pictures: Sequence[np.ndarray], titles: Sequence[str] = ()) -> np.ndarray:
    """Pictures in one row at the height of the highest, each with its title above.

    Args:
        pictures: uint8 RGB (H, W, 3).
        titles: one for each, or none.

    Returns:
        uint8 RGB on white.
    """
    if titles and len(titles) != len(pictures):
        raise ValueError(f"{len(titles)} titles for {len(pictures)} pictures")
    row = _row(pictures, max(picture.shape[0] for picture in pictures))
    if not titles:
        return row
    size = max(12, row.shape[1] // 60)
    strip = np.full((2 * size, row.shape[1], 3), 255, dtype=np.uint8)
    figure, left = _layer(strip), 0.0
    for picture, title in zip(pictures, titles, strict=True):
        width = picture.shape[1] * row.shape[0] / picture.shape[0]
        x = (left + width / 2) / row.shape[1]
        figure.text(x, 0.5, title, size=size, ha="center", va="center_baseline", parse_math=False)
        left += width + _GAP
    return np.concatenate([_flatten(figure, strip), row])


def save_picture_grid(path: str | Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Write pictures in rows of equal width, whole or not at all; the suffix gives the format.

    Args:
        path: a .png, .jpg or .webp file; its folder is created when missing.
        rows: uint8 RGB (H, W, 3) each, of any sizes.

    Raises:
        UserError: the file cannot be written or has another suffix.
    """
    rows = [row for row in rows if len(row)]
    if not rows:
        raise ValueError("a grid needs at least one picture")
    strips = [_row(row, round(float(np.mean([picture.shape[0] for picture in row])))) for row in rows]
    width = round(float(np.median([strip.shape[1] for strip in strips])))
    columns = [strip.transpose(1, 0, 2) for strip in strips]  # a column is a row on its side
    save_picture(path, _row(columns, width).transpose(1, 0, 2))


def save_picture(path: str | Path, picture: np.ndarray) -> None:
    """Write one uint8 RGB (H, W, 3) picture; see :func:`save_picture_grid`."""
    kind = _FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise UserError(f"cannot write the picture {path}: its name must end in {', '.join(_FORMATS)}")
    with atomic_write(path, "wb") as file:
        Image.fromarray(picture).save(file, format=kind, **({} if kind == "PNG" else {"quality": 92}))


def _row(pictures: Sequence[np.ndarray], height: int) -> np.ndarray:
    """Pictures of one height, with gaps between them."""
    widths = [max(1, round(picture.shape[1] * height / picture.shape[0])) for picture in pictures]
    parts = [_resized(picture, height, width) for picture, width in zip(pictures, widths, strict=True)]
    return np.concatenate(
        [np.pad(p, ((0, 0), (0, _GAP), (0, 0)), constant_values=255) for p in parts], axis=1
    )[:, :-_GAP]


def _resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    source = Image.fromarray(np.ascontiguousarray(picture))
    return np.array(source.resize((width, height), Image.Resampling.LANCZOS))


def plot_curves(metrics_jsonl: str | Path, path: str | Path) -> None:
    """Losses, AP and learning rate of a run by iteration.

    Args:
        metrics_jsonl: the run's file; each line has ``iteration`` and numbers, or null where not finite.
        path: picture to write, see :func:`save_picture_grid`.

    Raises:
        UserError: there is nothing to plot, or the picture cannot be written.
    """
    from matplotlib.figure import Figure

    rows = _read_metrics(Path(metrics_jsonl))
    names = dict.fromkeys(name for row in rows for name in row)
    candidates = {
        "loss": [name for name in names if name == "total_loss" or name.startswith("loss_")],
        "AP (%)": [name for name in names if name.split("/")[-1] == "AP"],
        "learning rate": [name for name in names if name == "lr"],
    }
    panels = {title: shown for title, shown in candidates.items() if shown}
    if not panels:
        raise UserError(f"{metrics_jsonl} has neither losses nor AP; wait for the first log line of the run")
    figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=150, layout="constrained", facecolor="white")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, shown) in zip(all_axes, panels.items(), strict=True):
        for name in sorted(shown, key=lambda name: name != "total_loss"):
            points = [(row["iteration"], row[name]) for row in rows if name in row]
            marker = "o" if title == "AP (%)" or len(points) == 1 else ""
            colour, width = ("0.15", 1.8) if name == "total_loss" else (None, 1.3)
            x, y = np.array(points, dtype=float).T
            axes.plot(x, y, label=name, marker=marker, markersize=4, color=colour, linewidth=width)
        axes.set(title=title, xlabel="iteration", ylim=(0, None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(shown) > 1:
            axes.legend(fontsize=8, frameon=False)
    blank = np.full((int(figure.bbox.height), int(figure.bbox.width), 3), 255, dtype=np.uint8)
    save_picture(path, _flatten(figure, blank))


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of ``metrics.jsonl``; one that a running or stopped run left unfinished is skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give the metrics.jsonl of a run's folder") from error
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "iteration" in row:
                rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows
