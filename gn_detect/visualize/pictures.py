"""Put pictures into rows and grids, and write them to files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import atomic_write
from .canvas import Canvas, resized

GAP = 8  # pixels between the pictures of a row
WEBP_SIDE = 16383  # pixels; WebP has no larger pictures
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_PNG = {"compress_level": 4}  # takes 0.4 of the time of the usual 6, and 1.07 of the bytes
_LARGEST_TEXT = 48  # points of titles: a strip above pictures of any width
_LEGEND_WIDTH = 360  # least width in pixels of a picture with a legend

Legend = Sequence[tuple[str, str]]  # text and colour of each entry


def side_by_side(
    pictures: Sequence[np.ndarray], titles: Sequence[str] = (), legends: Sequence[Legend] = ()
) -> np.ndarray:
    """Return pictures in one row, as high as the highest, with their titles and legends above them.

    Args:
        pictures: uint8 RGB (H, W, 3).
        titles: one for each picture, or none.
        legends: one for each picture, or none; they need titles.

    Returns:
        uint8 RGB on white.
    """
    for given, what in ((titles, "titles"), (legends, "legends")):
        if given and len(given) != len(pictures):
            raise ValueError(f"{len(given)} {what} for {len(pictures)} pictures")
    height = max(picture.shape[0] for picture in pictures)
    if legends:
        pictures = [_widened(picture, _LEGEND_WIDTH * picture.shape[0] / height) for picture in pictures]
    row = _row(pictures, height)
    if not titles:
        return row
    size = min(max(12, row.shape[1] // 60), _LARGEST_TEXT)
    strip = np.full(((4 if legends else 2) * size, row.shape[1], 3), 255, dtype=np.uint8)
    canvas, left = Canvas.over(strip), 0.0
    for number, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        width = picture.shape[1] * row.shape[0] / picture.shape[0]
        x, y = (left + width / 2) / row.shape[1], 0.72 if legends else 0.5
        canvas.figure.text(x, y, title, size=size, ha="center", va="center_baseline", parse_math=False)
        if legends:
            _add_legend(canvas, legends[number], x, size)
        left += width + GAP
    return np.concatenate([canvas.flatten(), row])


def _widened(picture: np.ndarray, width: float) -> np.ndarray:
    """Return a picture with white at both sides, up to a width."""
    missing = max(0, round(width) - picture.shape[1])
    sides = (0, 0), (missing // 2, missing - missing // 2), (0, 0)
    return np.pad(picture, sides, constant_values=255)


def _add_legend(canvas: Canvas, legend: Legend, x: float, size: float) -> None:
    """Add a legend to the lower half of a strip, around ``x`` as a share of its width."""
    from matplotlib.patches import Patch

    canvas.figure.legend(
        handles=[Patch(facecolor=colour, edgecolor="0.3", label=text) for text, colour in legend],
        loc="center",
        bbox_to_anchor=(x, 0.26),
        ncols=max(1, len(legend)),
        fontsize=0.8 * size,
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )


def save_picture_grid(path: str | Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Write pictures in rows of equal width, whole or not at all; the suffix gives the format.

    Args:
        path: a .png, .jpg or .webp file; a missing folder is created.
        rows: uint8 RGB (H, W, 3) pictures of any sizes.

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
        raise UserError(
            "wrong-ending", f"cannot write the picture {path}: its name must end in {', '.join(_FORMATS)}"
        )
    with atomic_write(path, "wb") as file:
        Image.fromarray(picture).save(file, format=kind, **(_PNG if kind == "PNG" else {"quality": 92}))


def encode_picture(picture: np.ndarray, max_width: int, quality: int = 80) -> bytes:
    """Return a uint8 RGB (H, W, 3) picture as WebP, made smaller if it is wider or higher than allowed."""
    height, width = picture.shape[:2]
    scale = min(1.0, max_width / width, WEBP_SIDE / height)
    if scale < 1:
        picture = resized(picture, max(1, round(height * scale)), max(1, round(width * scale)))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="WEBP", quality=quality)
    return buffer.getvalue()


def _row(pictures: Sequence[np.ndarray], height: int) -> np.ndarray:
    """Return pictures of one height, with gaps between them."""
    widths = [max(1, round(picture.shape[1] * height / picture.shape[0])) for picture in pictures]
    parts = [resized(picture, height, width) for picture, width in zip(pictures, widths, strict=True)]
    gap = ((0, 0), (0, GAP), (0, 0))
    return np.concatenate([np.pad(part, gap, constant_values=255) for part in parts], axis=1)[:, :-GAP]
