"""Read a folder of images with mask PNGs.

The masks lie in a folder ``masks`` (or ``mask``, ``labels``, ``annotations``) beside ``images``, with the
stem of the image; or beside the images as ``STEM_mask.png``; or, one PNG for each object, as in
``ID/images/ID.png`` and ``ID/masks/*.png``.

Their content decides how they are read (:func:`choose_reading`), unless the format is named with the reading,
such as ``masks-classes``:

- *files*: several masks belong to one image; each file is an object.
- *binary*: no mask has more than one value beside 0; each connected piece is an object.
- *instances*: in each mask the values are 1, 2, ... without a gap, not always as many, and nearly all are one
  connected piece; each value is an object.
- *classes*: the rest; each value is a class, and each connected piece of it an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import UserError
from ..coco.faults import DataError
from ..coco.rules import MOST_PIXELS
from ..images import open_image
from .builder import WHOLE, Builder, Imported, Shape, SourceImage
from .image_index import ImageIndex
from .shapes import connected_pieces

READINGS = ("files", "binary", "instances", "classes")

_FOLDERS = ("masks", "mask", "labels", "annotations", "segmentation", "segmentations")
_ENDINGS = re.compile(r"[_-](mask|masks|seg|label|labels|gt)$", re.IGNORECASE)
_VOID = 255  # a border that belongs to nothing, among other values
_ONE_PIECE = 0.9  # the least share of values that are one piece, for instances
_LOOKED_AT = 200  # masks, at most, that decide about the reading
_MOST_OBJECTS = 20_000  # of one image


def find_pairs(index: ImageIndex) -> dict[Path, list[Path]]:
    """Return the masks of each image of a folder; only images with masks are in it."""
    paths = index.all()
    masks = [path for path in paths if _is_mask(path)]
    images: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        if not _is_mask(path):
            for place in {path.parent, _place(path)}:
                images.setdefault((place, path.stem), []).append(path)
    alone: dict[Path, list[Path]] = {}  # images by their place, for masks of other names
    for path in paths:
        if not _is_mask(path):
            alone.setdefault(_place(path), []).append(path)
    pairs: dict[Path, list[Path]] = {}
    for mask in masks:
        place, stem = _place(mask), _ENDINGS.sub("", mask.stem)
        found = images.get((place, mask.stem)) or images.get((place, stem)) or images.get((mask.parent, stem))
        if not found and len(alone.get(place, [])) == 1 and mask.parent.name.lower() in _FOLDERS:
            found = alone[place]
        if found and len(found) == 1:
            pairs.setdefault(found[0], []).append(mask)
    return pairs


def _is_mask(path: Path) -> bool:
    in_folder = any(part.lower() in _FOLDERS for part in path.parent.parts[-2:])
    return path.suffix.lower() == ".png" and (in_folder or bool(_ENDINGS.search(path.stem)))


def _place(path: Path) -> Path:
    """Return the folder without its component ``images`` or ``masks``."""
    parts = list(path.parent.parts)
    for position in range(len(parts) - 1, -1, -1):
        if parts[position].lower() in (*_FOLDERS, "images", "image"):
            return Path(*parts[:position], *parts[position + 1 :])
    return path.parent


def read(path: Path, index: ImageIndex, reading: str = "") -> Imported:
    """Read a folder of images and masks.

    Args:
        path: of the folder.
        index: of its images.
        reading: one of :data:`READINGS`; by content if empty.
    """
    pairs = find_pairs(index)
    if not pairs:
        raise UserError(
            "unknown-format", f"{path} has no image with a mask; put PNGs of the same names into masks/"
        )
    counted = any(len(masks) > 1 for masks in pairs.values())
    if not reading:
        reading = "files" if counted else choose_reading([masks[0] for masks in pairs.values()])
    elif counted and reading != "files":
        image = next(image for image, masks in pairs.items() if len(masks) > 1)
        raise UserError(
            "bad-argument", f"masks-{reading}: {image} has {len(pairs[image])} masks; it needs one"
        )
    classes = None if reading == "classes" else ["object"]
    builder = Builder("mask images", index, classes)
    builder.note(f"the masks are read as {reading}: {_MEANING[reading]}", str(path))
    for image, masks in sorted(pairs.items()):
        added = builder.add_image(image, masks[0], "its image", WHOLE)
        builder.sources.update(masks)
        for mask in masks:
            builder.add(added, _shapes(mask, added, reading, builder))
    unpaired = [p for p in index.all() if not _is_mask(p) and p not in pairs]
    for image in unpaired:
        builder.note("images without a mask are left out", str(image))
    return builder.finish()


_MEANING = {
    "files": "each file is one object",
    "binary": "each connected piece is one object",
    "instances": "each value is one object",
    "classes": "each value is a class, and each connected piece of it one object",
}


def choose_reading(masks: list[Path]) -> str:
    """Return the reading of masks, one for each image; the module says by which rule."""
    counts: set[int] = set()
    values_seen: set[int] = set()
    gapless, pieces, values_of_all = True, 0, 0
    for mask in masks[:: -(-len(masks) // _LOOKED_AT)]:
        values = read_mask(mask)
        found = [value for value in np.unique(values).tolist() if value]
        values_seen.update(found)
        found = [value for value in found if value != _VOID] or found
        counts.add(len(found))
        gapless &= found == list(range(1, len(found) + 1))
        if gapless and len(found) <= _MOST_OBJECTS:
            values_of_all += len(found)
            pieces += sum(len(connected_pieces(values == value)) == 1 for value in found)
    if len(values_seen) <= 1:
        return "binary"
    several = len(counts - {0}) > 1 or max(counts) > 2
    return "instances" if gapless and several and pieces >= _ONE_PIECE * values_of_all else "classes"


def _shapes(mask: Path, image: SourceImage, reading: str, builder: Builder) -> Iterator[Shape]:
    values = read_mask(mask)
    size = (image.record.height, image.record.width)
    if values.shape != size:
        raise DataError(
            "size-differs",
            f"{mask} has {values.shape[1]}x{values.shape[0]} pixels (width x height), but its image "
            f"{size[1]}x{size[0]}; correct one of them",
        )
    if reading in ("files", "binary"):
        found = [(1, values != 0)] if values.any() else []
    else:
        numbers = [value for value in np.unique(values).tolist() if value]
        if _VOID in numbers and len(numbers) > 1 and numbers[-2] < _VOID - 1:
            numbers.remove(_VOID)
            builder.note("the value 255 is left out, a border", str(mask))
        if len(numbers) > _MOST_OBJECTS:
            raise DataError(
                "malformed", f"{mask} has {len(numbers)} values, too many objects; check the mask"
            )
        found = [(value, values == value) for value in numbers]
    count = 0
    for value, bitmap in found:
        label = str(value) if reading == "classes" else "object"
        if reading in ("files", "instances"):
            rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
            window = bitmap[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            pieces = [(int(columns[0]), int(rows[0]), window)]
        else:
            pieces = connected_pieces(bitmap)
        for left, top, piece in pieces:
            count += 1
            if count > _MOST_OBJECTS:
                raise DataError("malformed", f"{mask} has more than {_MOST_OBJECTS} pieces; check the mask")
            yield Shape(label, f"value {value}, piece at {left}, {top}", bitmap=(piece, left, top))


def read_mask(path: Path) -> np.ndarray:
    """Return the values (H, W) of a mask: greyscale, palette indices, or equal channels.

    Raises:
        UserError: it cannot be read, is no PNG, or has colours.
    """
    try:
        with open_image(path) as image:
            if image.format != "PNG":
                raise DataError("unreadable-image", f"mask {path} is {image.format}; save it as PNG")
            if image.width * image.height > MOST_PIXELS:
                raise DataError(
                    "image-size", f"mask {path} has {image.width}x{image.height} pixels, too many"
                )
            if image.mode in ("RGB", "RGBA", "LA"):
                bands = [np.asarray(band) for band in image.split()[: 1 if image.mode == "LA" else 3]]
                if any((band != bands[0]).any() for band in bands[1:]):
                    raise DataError(
                        "unreadable-image",
                        f"mask {path} has colours; save the number of its class or object in each pixel",
                    )
                return bands[0]
            values = np.asarray(image)
            return values.astype(np.uint8) if values.dtype == bool else values
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            "unreadable-image", f"cannot read mask {path}: {' '.join(str(error).split())}; replace it"
        ) from error
