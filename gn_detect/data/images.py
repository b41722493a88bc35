"""Find and read image files: all common modes become 8-bit RGB or BGR, with the EXIF orientation applied."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import UserError
from ..files import open_file
from .coco.faults import DataError
from .coco.file_names import nearby_file
from .video import VIDEO_SUFFIXES

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}

# Undoes each value of the EXIF tag ``Orientation``; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Formats that are read, by Pillow's names, whatever the name of the file; Pillow has AVIF from 11.3 on.
# Pillow reads many more, among them PostScript, for which it starts another program.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")

# What Pillow raises for damaged files.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_PIXELS_AT_ONCE = 1 << 20  # converted or copied
DARK = 64  # greys of 256 that remain of a 16-bit greyscale image with 14 bits or less


def find_images(inputs: Iterable[str], videos: bool = False) -> list[Path]:
    """Return files as given, the images in folders, and the matches of patterns, each once.

    Folders and patterns leave out hidden files, such as macOS's ``._photo.jpg``, and files of other kinds,
    such as ``Thumbs.db``.

    Args:
        inputs: paths and patterns.
        videos: take videos as well.

    Raises:
        UserError: an input does not exist, a folder or pattern holds no image, or there is no input.
    """
    suffixes = IMAGE_SUFFIXES | (VIDEO_SUFFIXES if videos else set())
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_file():
            matches = [path]
        else:
            listed = path.iterdir() if path.is_dir() else map(Path, glob.glob(text, recursive=True))
            shown = sorted(p for p in listed if p.is_file() and not p.name.startswith("."))
            matches = [p for p in shown if p.suffix.lower() in suffixes]
            if not path.is_dir():
                matches = matches or shown  # a pattern such as '*.dat' names them
        if not matches:
            raise UserError(
                "no-such-image", f"no image at {text}; give image files, a folder of them or a pattern"
            )
        found.update(dict.fromkeys(matches))
    if not found:
        raise UserError(
            "missing-argument", "no images: name files, a folder or a pattern before the config keys"
        )
    return list(found)


def cannot_read(path: str | Path, error: BaseException) -> DataError:
    """Return the error for an image file that Pillow cannot read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError("unreadable-image", f"cannot read image {path}: {reason}; replace or remove it")


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, the only way for images of a user: size and mode are known, pixels are not read.

    Raises:
        DataError: the file is not regular, or has none of the :data:`FORMATS`.
        OSError: the file is missing or damaged; Pillow raises other types as well.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        file = open_file(path)
    except UserError as error:
        raise DataError("unreadable-image", f"cannot read image {error}") from error
    with file:
        try:
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError as error:
            raise DataError(
                "unreadable-image",
                f"cannot read image {path}: it is none of {', '.join(formats)}, or damaged; convert it to "
                "PNG or JPEG, replace or remove it",
            ) from error
        with image:
            yield image


def read_image(
    path: str | Path, channel_order: str = "BGR", expected_size: tuple[int, int] | None = None
) -> np.ndarray:
    """Return the pixels of an image file.

    Greyscale, palette and CMYK become RGB; alpha is dropped. Greyscale with more than 8 bits is read by the
    high byte of 16, whatever its values: up to 255 is black, and 12-bit values give at most 15 of 255.

    Args:
        path: a regular file of one of the :data:`FORMATS`, or a link to one.
        channel_order: ``"BGR"`` or ``"RGB"``.
        expected_size: (height, width) in the annotations. The EXIF orientation is applied unless only the
            stored picture has this size: some annotation tools ignore the tag.

    Returns:
        (H, W, 3) uint8, writable and contiguous.

    Raises:
        UserError: the file is missing or damaged, its mode has no usual meaning in 8 bits, or its size is not
            the expected one.
    """
    if channel_order not in ("BGR", "RGB"):
        raise UserError(
            "unsupported-value", f"INPUT.FORMAT {channel_order!r} is not supported; choose 'BGR' or 'RGB'"
        )
    try:
        with open_image(path) as file:
            if expected_size is not None and sorted(file.size) != sorted(expected_size):
                raise _other_size(path, file.size, expected_size)  # before the pixels take memory
            stored = _loaded(file, path)
            orientation = exif_orientation(file)
    except FileNotFoundError as error:
        near = nearby_file(path)
        there = "" if near is None else f", but {near} is there"
        raise DataError(
            "missing-image", f"image {path} is missing{there}; restore it or correct the images folder"
        ) from error
    except DAMAGED as error:
        raise cannot_read(path, error) from error
    pixels = _rgb_pixels(_upright(stored, orientation, expected_size))
    if expected_size is not None and pixels.shape[:2] != tuple(expected_size):
        raise _other_size(path, (pixels.shape[1], pixels.shape[0]), expected_size)
    return pixels if channel_order == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1])


def image_pixels(image: Image.Image) -> np.ndarray:
    """Return the (H, W, 3) uint8 RGB pixels of an opened image, upright, as :func:`read_image` reads a file.

    Raises:
        UserError: the mode has no usual meaning in 8 bits.
    """
    orientation = exif_orientation(image)
    name = getattr(image, "filename", "") or "(PIL)"
    return _rgb_pixels(_upright(_loaded(image, name), orientation, None))


def _other_size(path: str | Path, found: tuple[int, int], expected: tuple[int, int]) -> DataError:
    return DataError(
        "size-differs",
        f"image {path} is {found[0]}x{found[1]} (width x height) but the annotations say "
        f"{expected[1]}x{expected[0]}; correct the size in the JSON or replace the image",
    )


def _loaded(image: Image.Image, path: str | Path) -> Image.Image:
    """Load the pixels, in a mode that :func:`_rgb_pixels` converts."""
    if image.mode == "F":
        raise DataError("unreadable-image", f"image {path} has floating-point pixels; convert it to 8 bits")
    if is_deep(image):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    image.load()
    return image


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """Convert to (H, W, 3) uint8, some rows at a time: Pillow's copies take several bytes for each pixel."""
    width, height = image.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, _PIXELS_AT_ONCE // width)
    for top in range(0, height, rows):
        part = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(part if part.mode == "RGB" else part.convert("RGB"))
    return pixels


def is_deep(image: Image.Image) -> bool:
    """Return whether the image is greyscale of more than 8 bits: mode ``I``, ``I;16`` or similar.

    All are read as 16-bit values, by their high byte, as Pillow reads 16-bit colour. The scale does not
    depend on the brightest pixel: equal things would be bright in one image and dark in the next. Mode ``I``
    has 32 bits in memory, but Pillow opens 16-bit data with it: PNG (in older versions), PGM, which it
    scales to 16 bits, and TIFF, with the 16-bit values of cameras. Values above 65535 are white. Data that
    use fewer bits must be scaled by the user, and the doctor reports them.
    """
    return image.mode.startswith("I")


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 if there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's EXIF parser raises many types on damaged blocks, and the pixels are fine
        return 1


def _upright(image: Image.Image, orientation: int, expected_size: tuple[int, int] | None) -> Image.Image:
    method = _UPRIGHT.get(orientation)
    if method is None:
        return image
    turned = image.transpose(method)
    wanted = None if expected_size is None else tuple(expected_size[::-1])
    return image if image.size == wanted != turned.size else turned
