"""A transparent layer over a picture, and the outlines, fills and boxes that are drawn on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.path import Path as Outline

SHORT_SIDE, LONG_SIDE = 480, 1600
"""Small images are enlarged until the short side or the long side has this many pixels."""

_OBJECT_SIDE = 32
"""A picture with smaller objects is enlarged further, until three quarters of them have this side."""
_LABEL_SHARE, _LABEL_AREA = 0.06, 1500
"""Or until labels, each of so many square pixels, cover no more than this part of the picture."""
_OUTLINE_PIXELS = 1 << 22
"""Of a mask around which an outline is looked for, some 60 bytes each; of a larger one some are left out."""
_MOST = 4.0
"""Times that crowds and small objects enlarge a picture at most."""


@dataclass
class Canvas:
    """A picture and the layer over it.

    Attributes:
        picture: uint8 RGB (H, W, 3), which stays as it is.
        figure: transparent, one pixel to matplotlib's point.
        text_size: of labels, in pixels.
        line_width: of outlines, in pixels.
    """

    picture: np.ndarray
    figure: Figure
    text_size: float
    line_width: float

    @classmethod
    def over(cls, picture: np.ndarray, short_side: float | None = None) -> Canvas:
        """Text and lines fit a picture with this short side; its own by default."""
        short_side = float(short_side or min(picture.shape[:2]))
        text = float(np.clip(short_side / 42, 10, 28))
        return cls(picture, _transparent(picture), text, max(1.2, short_side / 320))

    def add(self, artist: Any) -> None:
        """Put in what has the picture's coordinates: pixels, y downwards."""
        from matplotlib.transforms import Affine2D

        artist.set_transform(Affine2D().scale(1, -1).translate(0, self.figure.bbox.height))
        self.figure.add_artist(artist)

    def draw_mask(self, outline: Outline, colour: str, *, fill: float, dashed: bool = False) -> None:
        """A clear fill, and a line that dark seams set off from what is around it."""
        from matplotlib.patches import PathPatch

        if fill:
            self.add(PathPatch(outline, facecolor=colour, edgecolor="none", alpha=fill))
        for edge, width, alpha in (("black", self.line_width + 1.6, 0.45), (colour, self.line_width, 1.0)):
            patch = PathPatch(outline, fill=False, edgecolor=edge, linewidth=width, alpha=alpha)
            patch.set_linestyle(_line_style(dashed and edge != "black"))
            self.add(patch)

    def draw_box(self, box: np.ndarray, colour: str, *, faint: bool = False, dashed: bool = False) -> None:
        """A box (4,) ``xyxy``; faint beside a mask, which it should not compete with."""
        from matplotlib.patches import Rectangle

        width, alpha = (0.7 * self.line_width, 0.6) if faint else (self.line_width, 1.0)
        patch = Rectangle((box[0], box[1]), *(box[2:] - box[:2]), fill=False, edgecolor=colour)
        patch.set(linewidth=width, alpha=alpha, linestyle=_line_style(dashed))
        self.add(patch)

    def flatten(self) -> np.ndarray:
        """The picture with what was drawn laid over it."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        layer = Image.fromarray(np.array(canvas.buffer_rgba()))
        below = Image.fromarray(self.picture).convert("RGBA")
        return np.array(Image.alpha_composite(below, layer).convert("RGB"))


def _transparent(picture: np.ndarray) -> Figure:
    from matplotlib.figure import Figure

    height, width = picture.shape[:2]
    # The canvas rounds its size down; a hundredth of a pixel keeps 28.999... from becoming 28.
    figure = Figure(figsize=((width + 0.01) / 72, (height + 0.01) / 72), dpi=72)
    figure.patch.set_visible(False)
    return figure


def _line_style(dashed: bool) -> Any:
    return (0, (3, 1.6)) if dashed else "solid"


def base_scale(height: int, width: int) -> float:
    """How much an image of this size is enlarged, whatever is on it."""
    return max(1.0, min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width)))


def picture_scale(size: tuple[int, int], boxes: np.ndarray, labels: int = 0) -> float:
    """How much to enlarge an image so that its objects and their labels are readable.

    Args:
        size: (height, width) of the image in pixels.
        boxes: (N, 4) ``xyxy`` of the objects.
        labels: how many of them get one.

    Returns:
        1 or more; the long side of the picture stays below :data:`LONG_SIDE` unless the image is larger.
    """
    height, width = size
    scale = base_scale(height, width)
    if not len(boxes):
        return scale
    side = float(np.quantile(np.sqrt(box_area(boxes)), 0.25))
    wanted = max(_OBJECT_SIDE / max(side, 1.0), (labels * _LABEL_AREA / _LABEL_SHARE / height / width) ** 0.5)
    wanted = min(wanted, _MOST * scale, LONG_SIDE / max(height, width))
    return max(scale, wanted)


def enlarged(image: np.ndarray, scale: float) -> np.ndarray:
    """An image as RGB, ``scale`` times as large.

    Raises:
        ValueError: it is not uint8 (H, W, 3) or (H, W).
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"image must be uint8 (H, W, 3) or (H, W), not {image.dtype} {image.shape}")
    picture = np.array(Image.fromarray(image).convert("RGB"))
    return resized(picture, round(image.shape[0] * scale), round(image.shape[1] * scale))


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture of another size."""
    if picture.shape[:2] == (height, width):
        return picture
    source = Image.fromarray(np.ascontiguousarray(picture))
    return np.array(source.resize((width, height), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Crop:
    """The part of a mask that its object takes.

    Attributes:
        top, left: its first row and column in the image.
        inside: (height, width) bool; all pixels of the image around it are False.
    """

    top: int
    left: int
    inside: np.ndarray

    @property
    def place(self) -> tuple[slice, slice]:
        """Return rows and columns in the image."""
        height, width = self.inside.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


Masks = Sequence[Crop | None]
"""Of the objects of an image, None for one without pixels or without a mask. Each may be made when it is
asked for: all those of a large image are several GB."""


def crop_mask(mask: np.ndarray, top: int = 0, left: int = 0) -> Crop | None:
    """Return the object in a bool mask that begins at row ``top`` and column ``left``; None without one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Crop(top + int(rows[0]), left + int(columns[0]), inside)


def mask_outline(mask: Crop | None, scale: float) -> Outline | None:
    """Return smooth closed curves around a mask and its holes, times ``scale``; None without any."""
    from contourpy import contour_generator
    from matplotlib.path import Path as Outline

    if mask is None:
        return None
    pad, step = 3, int(np.ceil((mask.inside.size / _OUTLINE_PIXELS) ** 0.5))
    inside = np.pad(mask.inside[::step, ::step], pad)
    blurred = Image.fromarray(inside * np.uint8(255)).filter(ImageFilter.GaussianBlur(1.0))
    # Blur rounds off the stairs of the pixels; the limits keep each pixel on its own side of the curve.
    field = np.asarray(blurred) / 255
    field = np.where(inside, np.maximum(field, 0.51), np.minimum(field, 0.49))
    curves: Any = contour_generator(z=field).lines(0.5)
    corner = np.array([mask.left, mask.top]) + 0.5
    curves = [(curve - pad) * step + corner for curve in curves]
    return Outline.make_compound_path(*[Outline(curve * scale, closed=True) for curve in curves])


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Of (..., 4) ``xyxy`` boxes; 0 where a side is negative."""
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def box_overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Areas (N, M) in common of (N, 4) and (M, 4) ``xyxy`` boxes."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return box_area(np.concatenate([low, high], axis=-1))
