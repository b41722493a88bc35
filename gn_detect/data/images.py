"""Reading image files: every common mode becomes 8-bit RGB or BGR, EXIF orientation included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ..errors import UserError
from .faults import DataError

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


def read_image(
    path: str | Path, channel_order: str = "BGR", expected_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Pixels of an image file.

    Greyscale, palette, CMYK and 16-bit greyscale (its high byte) become RGB; alpha is dropped.

    Args:
        path: any file that Pillow reads.
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
        with Image.open(path) as file:
            if expected_size is not None and sorted(file.size) != sorted(expected_size):
                raise _other_size(path, file.size, expected_size)  # before the work, and the memory
            stored = _to_rgb(file, path)
            orientation = _orientation(file)
    except FileNotFoundError as error:
        raise DataError(
            f"image {path} is missing; restore it or correct the images folder", "missing-image"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"cannot read image {path}: {_one_line(error)}; replace or remove it", "unreadable-image"
        ) from error
    pixels = np.array(_upright(stored, orientation, expected_size))
    if expected_size is not None and pixels.shape[:2] != tuple(expected_size):
        raise _other_size(path, (pixels.shape[1], pixels.shape[0]), expected_size)
    return pixels if channel_order == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1])


def _other_size(path: str | Path, found: tuple[int, int], expected: tuple[int, int]) -> DataError:
    return DataError(
        f"image {path} is {found[0]}x{found[1]} (width x height) but the annotations say "
        f"{expected[1]}x{expected[0]}; correct the size in the JSON or replace the image",
        "size-differs",
    )


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode == "F":
        raise DataError(f"image {path} has floating-point pixels; convert it to 8 bits", "unreadable-image")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        values = np.asarray(image).astype(np.int64)
        if values.size and values.max() > 255:
            values >>= 8
        return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


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
