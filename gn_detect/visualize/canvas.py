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

# Small images are enlarged until a side has as many pixels.
SHORT_SIDE, LONG_SIDE = 480, 1600
# A picture is enlarged further, at most so many times, until three quarters of its objects have this side ...
_MOST_ENLARGED, _OBJECT_SIDE = 4.0, 32
# ... and until labels, each of so many square pixels, cover no more than this share of it.
_LABEL_AREA, _LABEL_SHARE = 1500, 0.06
_OUTLINE_PIXELS = 1 << 22  # finding an outline takes 60 bytes per pixel: larger masks are thinned out


@dataclass(frozen=True)
class Style:
    """The look of an object.

    Attributes:
        colour: of outline, fill and label.
        fill: opacity of the mask, from 0 to 1, where no other mask covers it.
        width: factor for the width of the outline.
        dashed: draw a dashed outline.
        on_top: draw the object after those that are not on top.
    """

    colour: str
    fill: float = 0.38
    width: float = 1.0
    dashed: bool = False
    on_top: bool = False


@dataclass
class Canvas:
    """A picture and the layer over it.

    Attributes:
        picture: uint8 RGB (H, W, 3), never changed.
        figure: transparent; one pixel is one point of matplotlib.
        text_size: size of labels in pixels.
        line_width: width of outlines in pixels.
    """

    picture: np.ndarray
    figure: Figure
    text_size: float
    line_width: float

    @classmethod
    def over(cls, picture: np.ndarray, short_side: float | None = None) -> Canvas:
        """Return a canvas whose text and lines fit a picture with this short side; by default its own."""
        from matplotlib.figure import Figure

        height, width = picture.shape[:2]
        # matplotlib rounds the size down; a hundredth of a pixel keeps 28.999... from becoming 28.
        figure = Figure(figsize=((width + 0.01) / 72, (height + 0.01) / 72), dpi=72)
        figure.patch.set_visible(False)
        short_side = float(short_side or min(height, width))
        return cls(picture, figure, float(np.clip(short_side / 42, 10, 28)), max(1.2, short_side / 320))

    def add(self, artist: Any) -> None:
        """Add an artist with the picture's coordinates: pixels, y downwards."""
        from matplotlib.transforms import Affine2D

        artist.set_transform(Affine2D().scale(1, -1).translate(0, self.figure.bbox.height))
        self.figure.add_artist(artist)

    def draw_mask(self, outline: Outline, style: Style, fill: float) -> None:
        """Draw a clear fill, and a line with dark seams that set it off from its surroundings."""
        from matplotlib.patches import PathPatch

        if fill:
            self.add(PathPatch(outline, facecolor=style.colour, edgecolor="none", alpha=fill))
        width = self.line_width * style.width
        seam = {"edgecolor": "black", "linewidth": width + 1.6, "alpha": 0.45}
        line = {"edgecolor": style.colour, "linewidth": width, "linestyle": _line_style(style)}
        for look in (seam, line):
            self.add(PathPatch(outline, fill=False, **look))

    def draw_box(self, box: np.ndarray, style: Style, *, faint: bool = False) -> None:
        """Draw a box (4,) ``xyxy``; a faint one leaves the attention to its mask."""
        from matplotlib.patches import Rectangle

        width = self.line_width * style.width
        patch = Rectangle((box[0], box[1]), *(box[2:] - box[:2]), fill=False, edgecolor=style.colour)
        patch.set(linewidth=0.7 * width if faint else width, alpha=0.6 if faint else 1.0)
        patch.set_linestyle(_line_style(style))
        self.add(patch)

    def flatten(self) -> np.ndarray:
        """Return the picture under the layer, uint8 RGB."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        layer = Image.fromarray(np.array(canvas.buffer_rgba()))
        below = Image.fromarray(self.picture).convert("RGBA")
        return np.array(Image.alpha_composite(below, layer).convert("RGB"))


def _line_style(style: Style) -> Any:
    return (0, (3, 1.6)) if style.dashed else "solid"


def base_scale(height: int, width: int) -> float:
    """Return the factor by which an image of this size is enlarged, whatever it shows."""
    return max(1.0, min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width)))


def picture_scale(size: tuple[int, int], boxes: np.ndarray, labels: int = 0) -> float:
    """Return the factor by which an image is enlarged to make its objects and labels readable.

    Args:
        size: (height, width) of the image in pixels.
        boxes: (N, 4) ``xyxy`` of the objects.
        labels: number of the objects with a label.

    Returns:
        1 or more; the long side of the picture stays below :data:`LONG_SIDE` unless the image is larger.
    """
    height, width = size
    scale = base_scale(height, width)
    if not len(boxes):
        return scale
    side = float(np.quantile(np.sqrt(box_area(boxes)), 0.25))
    wanted = max(_OBJECT_SIDE / max(side, 1.0), (labels * _LABEL_AREA / _LABEL_SHARE / height / width) ** 0.5)
    return max(scale, min(wanted, _MOST_ENLARGED * scale, LONG_SIDE / max(height, width)))


def enlarged(image: np.ndarray, scale: float) -> np.ndarray:
    """Return an image, uint8 (H, W, 3) or (H, W) (else ValueError), as uint8 RGB ``scale`` times as large."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"image must be uint8 (H, W, 3) or (H, W), not {image.dtype} {image.shape}")
    picture = np.array(Image.fromarray(image).convert("RGB"))
    return resized(picture, round(image.shape[0] * scale), round(image.shape[1] * scale))


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a picture in another size."""
    if picture.shape[:2] == (height, width):
        return picture
    source = Image.fromarray(np.ascontiguousarray(picture))
    return np.array(source.resize((width, height), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Crop:
    """The part of a mask that its object covers.

    Attributes:
        top, left: first row and column of the part in the image.
        inside: (height, width) bool; all pixels of the image outside the part are False.
    """

    top: int
    left: int
    inside: np.ndarray

    @property
    def place(self) -> tuple[slice, slice]:
        """The rows and columns in the image."""
        height, width = self.inside.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


# The masks of an image's objects; None for an object without pixels or without a mask. A sequence may make
# each mask on demand: all masks of a large image are several GB.
Masks = Sequence[Crop | None]


def crop_mask(mask: np.ndarray, top: int = 0, left: int = 0) -> Crop | None:
    """Return the object in a bool mask that begins at row ``top`` and column ``left``; None without one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Crop(top + int(rows[0]), left + int(columns[0]), inside)


def mask_outline(mask: Crop | None, scale: float) -> Outline | None:
    """Return smooth closed curves around a mask and its holes, times ``scale``; None without a mask."""
    from contourpy import contour_generator
    from matplotlib.path import Path as Outline

    if mask is None:
        return None
    pad, step = 3, int(np.ceil((mask.inside.size / _OUTLINE_PIXELS) ** 0.5))
    inside = np.pad(mask.inside[::step, ::step], pad)
    blurred = Image.fromarray(inside * np.uint8(255)).filter(ImageFilter.GaussianBlur(1.0))
    # The blur rounds off the stairs of the pixels; the limits keep each pixel on its own side of the curve.
    field = np.asarray(blurred) / 255
    field = np.where(inside, np.maximum(field, 0.51), np.minimum(field, 0.49))
    curves: Any = contour_generator(z=field).lines(0.5)
    corner = np.array([mask.left, mask.top]) + 0.5
    curves = [(curve - pad) * step + corner for curve in curves]
    return Outline.make_compound_path(*[Outline(curve * scale, closed=True) for curve in curves])


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Return the areas of (..., 4) ``xyxy`` boxes; 0 for a negative side."""
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def box_overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the areas (N, M) in common of (N, 4) and (M, 4) ``xyxy`` boxes."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return box_area(np.concatenate([low, high], axis=-1))
