"""Pictures for people: detections and ground truth drawn on images, grids of both, and training curves.

Outlines, fills and labels are drawn by matplotlib's Agg on a transparent layer of the picture's size, which is
then laid over the picture: pixels that nothing is drawn on stay as they were.
"""

from __future__ import annotations

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
"""With more objects than this, those with masks go without boxes, and those of the only class without names."""
_GAP = 8
"""Pixels between the pictures of a grid."""
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    class_names: Sequence[str],
    score_threshold: float = 0.5,
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
    labels = [f"{name} {score:.2f}".strip() for name, score in zip(names, chosen.scores.tolist(), strict=True)]
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
    masks: list[np.ndarray | None] = [None] * len(target)
    if target.masks is not None:
        height, width = image.shape[:2]
        masks = [
            mask.numpy() if isinstance(mask, Tensor) else rasterize_polygons(mask, height, width)
            for mask in target.masks
        ]
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
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    picture = Image.fromarray(image).convert("RGB")
    if scale > 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return np.array(picture)


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


# The transparent layer. Its coordinates are the picture's: pixels, y downwards.


def _layer(picture: np.ndarray) -> Figure:
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
    layer = Image.fromarray(np.array(canvas.buffer_rgba()), "RGBA")
    return np.array(Image.alpha_composite(Image.fromarray(picture).convert("RGBA"), layer).convert("RGB"))


def _add(figure: Figure, artist: Any) -> None:
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
    _add(figure, PathPatch(outline, fill=False, edgecolor="black", alpha=0.45, linewidth=line + 1.6))
    _add(figure, PathPatch(outline, fill=False, edgecolor=colour, linewidth=line))


def _draw_box(figure: Figure, box: np.ndarray, colour: str, faint: bool) -> None:
    """Faint beside a mask, which it should not compete with."""
    from matplotlib.patches import Rectangle

    line, alpha = _line_width(figure) * (0.7 if faint else 1.0), 0.6 if faint else 1.0
    patch = Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, edgecolor=colour, linewidth=line, alpha=alpha)
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
    curves: list[Any] = contour_generator(z=field).lines(0.5)
    parts = [
        Outline((curve + (left, top) - pad + 0.5) * scale, closed=True) for curve in curves if len(curve) > 2
    ]
    return Outline.make_compound_path(*parts)


# Labels


def _draw_labels(figure: Figure, boxes: np.ndarray, labels: Sequence[str], colours: Sequence[str]) -> None:
    """Rounded name plates near their boxes, those of large objects first."""
    from matplotlib.colors import to_rgb
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    size = min(max(min(figure.bbox.size) / 42, 10.0), 28.0)
    font = FontProperties(family="DejaVu Sans", weight="bold")
    height, room = 1.45 * size, 0.35 * size
    taken = np.zeros((0, 4))
    for index in np.argsort(-_area(boxes), kind="stable"):
        if not labels[index]:
            continue
        text = TextPath((0, 0), _printable(labels[index]), size=size, prop=font, usetex=False)
        extent = text.get_extents()
        plate = _free_place(index, boxes, taken, extent.width + 2 * room, height, figure.bbox.size)
        if plate is None:
            continue
        taken = np.vstack([taken, plate])
        red, green, blue = to_rgb(colours[index])
        dark_text = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        style = f"round,pad=0,rounding_size={0.25 * size}"
        corner, sides = plate[:2], plate[2:] - plate[:2]
        _add(
            figure,
            FancyBboxPatch(corner, *sides, boxstyle=style, facecolor=colours[index], edgecolor="none", alpha=0.9),
        )
        place = Affine2D().scale(1, -1).translate(plate[0] + room - extent.x0, plate[1] + 1.07 * size)
        ink = "black" if dark_text else "white"
        _add(figure, PathPatch(text.transformed(place), facecolor=ink, edgecolor="none"))


def _printable(text: str) -> str:
    """Without line breaks, and with $ as a plain character, which matplotlib would read as mathematics."""
    return " ".join(text.split()).replace("$", r"\$")


def _free_place(
    index: int, boxes: np.ndarray, taken: np.ndarray, width: float, height: float, size: np.ndarray
) -> np.ndarray | None:
    """Where the label of ``boxes[index]`` hides least: ``xyxy``, or None for a small object without room.

    Args:
        index: of the object.
        boxes: (N, 4) of all objects.
        taken: (M, 4) labels already placed.
        width, height: of the label.
        size: ``width, height`` of the picture.
    """
    x0, y0, x1, y1 = boxes[index]
    middle_x, middle_y = (x0 + x1 - width) / 2, (y0 + y1 - height) / 2
    corners = np.array(
        [
            *[(x0, y0 - height - 1), (x0, y1 + 1), (x0 + 2, y0 + 2), (x0 + 2, y1 - height - 2)],
            *[(x1 - width, y0 - height - 1), (x1 - width, y1 + 1), (x1 + 2, middle_y), (x0 - width - 2, middle_y)],
            *[(middle_x, y0 - height - 1), (middle_x, y1 + 1), (middle_x, middle_y)],
        ]
    )
    corners = np.clip(corners, 1, np.maximum(size - (width, height) - 1, 1))
    plates = np.concatenate([corners, corners + (width, height)], axis=1)
    # What it hides, as parts of the objects' boxes: a corner of a large one costs little, a small one all.
    hidden = (_overlap(plates, boxes) / np.maximum(_area(boxes), 1)).sum(axis=1)
    collides = _overlap(plates, taken).sum(axis=1) / (width * height)
    best = int((10 * collides + hidden + 0.01 * np.arange(len(plates))).argmin())
    large = min(x1 - x0, y1 - y0) > 2 * height
    if (collides[best] > 0.02 and not large) or hidden[best] > 0.4:
        return None
    return plates[best]


def _overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Areas (N, M) in common of (N, 4) and (M, 4) ``xyxy`` boxes."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return _area(np.concatenate([low, high], axis=-1))


# Pictures together


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
    size = max(12, row.shape[0] // 28)
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
    same_height = [_row(row, round(float(np.mean([p.shape[0] for p in row])))) for row in rows]
    width = round(float(np.median([row.shape[1] for row in same_height])))
    blocks: list[np.ndarray] = []
    for row in same_height:
        height = max(1, round(row.shape[0] * width / row.shape[1]))
        blocks += [_resized(row, height, width), np.full((_GAP, width, 3), 255, dtype=np.uint8)]
    save_picture(path, np.concatenate(blocks[:-1]))


def save_picture(path: str | Path, picture: np.ndarray) -> None:
    """Write one uint8 RGB (H, W, 3) picture; see :func:`save_picture_grid`."""
    kind = _FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise UserError(f"cannot write the picture {path}: its name must end in {', '.join(_FORMATS)}")
    with atomic_write(path, "wb") as file:
        Image.fromarray(picture).save(file, format=kind, **({} if kind == "PNG" else {"quality": 92}))


def _row(pictures: Sequence[np.ndarray], height: int) -> np.ndarray:
    gap = np.full((height, _GAP, 3), 255, dtype=np.uint8)
    parts: list[np.ndarray] = []
    for picture in pictures:
        parts += [_resized(picture, height, max(1, round(picture.shape[1] * height / picture.shape[0]))), gap]
    return np.concatenate(parts[:-1], axis=1)


def _resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    if picture.shape[:2] == (height, width):
        return picture
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


# Curves


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
    names = list(dict.fromkeys(name for row in rows for name in row))
    panels = {
        "loss": [name for name in names if name == "total_loss" or name.startswith("loss_")],
        "AP (%)": [name for name in names if name.split("/")[-1] == "AP"],
        "learning rate": [name for name in names if name == "lr"],
    }
    panels = {title: shown for title, shown in panels.items() if shown}
    if not panels:
        raise UserError(f"{metrics_jsonl} has no losses and no AP yet; wait for the first log line of the run")
    figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=150, layout="constrained", facecolor="white")
    for axes, (title, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in sorted(shown, key=lambda name: name != "total_loss"):
            points = [(row["iteration"], row[name]) for row in rows if name in row]
            iterations, values = np.array(points, dtype=float).T
            total = name == "total_loss"
            marker = "o" if title == "AP (%)" or len(points) == 1 else ""
            axes.plot(
                *(iterations, values),
                label=name,
                marker=marker,
                markersize=4,
                color="0.15" if total else None,
                linewidth=1.8 if total else 1.3,
            )
        axes.set(title=title, xlabel="iteration")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(shown) > 1:
            axes.legend(fontsize=8, frameon=False)
    blank = np.full((int(figure.bbox.height), int(figure.bbox.width), 3), 255, dtype=np.uint8)
    save_picture(path, _flatten(figure, blank))


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``; one that a running or stopped run left unfinished is skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give the metrics.jsonl of a run's folder") from error
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("iteration"), int | float):
            rows.append(
                {key: math.nan if v is None else v for key, v in row.items() if v is None or isinstance(v, int | float)}
            )
    return rows
