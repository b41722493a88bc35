"""Reading image files: every common mode becomes 8-bit RGB or BGR, EXIF orientation included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import UserError
from ..files import open_file
from .coco.faults import DataError
from .coco.file_names import nearby_file

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the EXIF tag ``Orientation``; 1 is upright."""

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")
"""That are read, by Pillow's names, whatever a file is called; AVIF where Pillow has it, from 11.3 on.

Pillow itself reads many more, among them PostScript, for which it starts another program.
"""

_PIXELS_AT_ONCE = 1 << 20
"""That are converted, or copied."""

DARK = 64
"""Of 256: the greys that 14 bits or less leave of a 16-bit greyscale image."""


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file: size and mode are known, pixels are not read. Every image of a user comes this way.

    Raises:
        DataError: it is no regular file, or of none of the :data:`FORMATS`.
        OSError: and what else Pillow raises for a file that is missing or damaged.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        file = open_file(path)
    except UserError as error:
        raise DataError(f"cannot read image {error}", "unreadable-image") from error
    with file:
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError as error:
            raise DataError(
                f"cannot read image {path}: it is none of {', '.join(formats)}, or damaged; convert it to "
                "PNG or JPEG, replace or remove it",
                "unreadable-image",
            ) from error
        with image:
            yield image


def read_image(
    path: str | Path, channel_order: str = "BGR", expected_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Pixels of an image file.

    Greyscale, palette and CMYK become RGB; alpha is dropped. Of greyscale with more than 8 bits the high byte
    of 16 is taken, whatever the picture holds: values up to 255 are black, 12-bit ones at most 15 of 255.

    Args:
        path: a regular file of one of the :data:`FORMATS`, or a link to one.
        channel_order: ``"BGR"`` or ``"RGB"``.
        expected_size: (height, width) that the annotations state. The EXIF orientation is applied unless only
            the picture as stored has this size: some annotation tools ignore the tag.

    Returns:
        (H, W, 3) uint8, writable and contiguous.

    Raises:
        UserError: the file is missing, damaged, of a mode without a usual meaning in 8 bits, or not of the
            expected size.
    """
    if channel_order not in ("BGR", "RGB"):
        raise UserError(f"INPUT.FORMAT {channel_order!r} is not supported; choose 'BGR' or 'RGB'")
    try:
        with open_image(path) as file:
            if expected_size is not None and sorted(file.size) != sorted(expected_size):
                raise _other_size(path, file.size, expected_size)  # before the work, and the memory
            stored = _loaded(file, path)
            orientation = _orientation(file)
    except FileNotFoundError as error:
        near = nearby_file(path)
        there = "" if near is None else f", but {near} is there"
        raise DataError(
            f"image {path} is missing{there}; restore it or correct the images folder", "missing-image"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"cannot read image {path}: {_one_line(error)}; replace or remove it", "unreadable-image"
        ) from error
    pixels = _rgb_pixels(_upright(stored, orientation, expected_size))
    if expected_size is not None and pixels.shape[:2] != tuple(expected_size):
        raise _other_size(path, (pixels.shape[1], pixels.shape[0]), expected_size)
    return pixels if channel_order == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1])


def image_pixels(image: Image.Image) -> np.ndarray:
    """Return the (H, W, 3) uint8 RGB pixels of an opened image, upright, as :func:`read_image` reads a file.

    Raises:
        UserError: the mode has no usual meaning in 8 bits.
    """
    orientation = _orientation(image)
    name = getattr(image, "filename", "") or "(PIL)"
    return _rgb_pixels(_upright(_loaded(image, name), orientation, None))


def _other_size(path: str | Path, found: tuple[int, int], expected: tuple[int, int]) -> DataError:
    return DataError(
        f"image {path} is {found[0]}x{found[1]} (width x height) but the annotations say "
        f"{expected[1]}x{expected[0]}; correct the size in the JSON or replace the image",
        "size-differs",
    )


def _loaded(image: Image.Image, path: str | Path) -> Image.Image:
    """With its pixels in memory, of a mode that :func:`_rgb_pixels` converts."""
    if image.mode == "F":
        raise DataError(f"image {path} has floating-point pixels; convert it to 8 bits", "unreadable-image")
    if is_deep(image):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    image.load()
    return image


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8; some rows at a time, as Pillow's copies take several bytes for each pixel."""
    width, height = image.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, height, rows):
        part = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(part if part.mode == "RGB" else part.convert("RGB"))
    return pixels


def is_deep(image: Image.Image) -> bool:
    """Whether it is greyscale of more than 8 bits: mode ``I;16`` and its kin, or ``I``.

    All are read as 16-bit values, by their high byte, as Pillow reads 16-bit colour. The picture itself has
    no say in it: a scale that followed its brightest pixel would show equal things bright in one image and
    dark in the next. Neither has the mode: ``I`` is 32 bits in memory, but what Pillow opens so are 16-bit
    PNG (in its older versions), PGM, which it stretches to 16 bits, and TIFF, into which tools write camera
    values of 16 bits; beyond 65535 is white. Data that fill less of the 16 bits must be scaled, and the
    doctor says so.
    """
    return image.mode.startswith("I")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's EXIF parser raises many types on damaged blocks, and the pixels are fine
        return 1


def _upright(image: Image.Image, orientation: int, expected_size: tuple[int, int] | None) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    if method is None:
        return image
    turned = image.transpose(method)
    if expected_size is not None:
        height, width = expected_size
        if turned.size != (width, height) and image.size == (width, height):
            return image
    return turned


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
