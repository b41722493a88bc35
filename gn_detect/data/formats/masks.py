"""Read a folder of images with mask PNGs.

The masks lie in one of three places:

- in a folder ``masks`` (or ``mask``, ``labels``, ``annotations``) next to ``images``, named as the image;
- in the folder of the images, as ``STEM_mask.png``;
- with one PNG for each object, in ``ID/masks/*.png`` for ``ID/images/ID.png``.

Their content decides how they are read (:func:`choose_reading`), unless the format is named with the reading,
such as ``masks-classes``:

- *files*: several masks belong to one image; each file is an object.
- *binary*: no mask has more than one value other than 0; each connected piece is an object.
- *instances*: in each mask the values are 1, 2, ... without a gap, not always as many, and nearly all are one
  connected piece; each value is an object.
- *classes*: the rest; each value is a class, and each connected piece of it an object.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...errors import UserError
from ..coco.faults import DataError
from ..coco.rules import MOST_PIXELS
from ..images import DAMAGED, open_image
from .builder import WHOLE, Builder, Imported, Shape, SourceImage
from .image_index import ImageIndex, image_size
from .shapes import connected_pieces, encode_pixels

READINGS = {
    "files": "each file is one object",
    "binary": "each connected piece is one object",
    "instances": "each value is one object",
    "classes": "each value is a class, and each connected piece of it one object",
}

_FOLDERS = ("masks", "mask", "labels", "annotations", "segmentation", "segmentations")
_ENDINGS = re.compile(r"[_-](mask|masks|seg|label|labels|gt)$", re.IGNORECASE)
_VOID = 255  # a border that belongs to nothing, among other values
_ONE_PIECE = 0.9  # the least share of values that are one piece, for instances
_LOOKED_AT, _RUNS_LOOKED_AT = 50, 200_000  # masks, at most, that decide about the reading, and their runs
_MOST_OBJECTS = 20_000  # of one image


def find_pairs(index: ImageIndex) -> dict[Path, list[Path]]:
    """Return the masks of each image of a folder; only images with masks are in it."""
    paths, root = index.all(), index.root
    masks = [path for path in paths if _is_mask(path, root)]
    images: dict[tuple[Path, str], list[Path]] = {}
    alone: dict[Path, list[Path]] = {}  # images by their place, for masks of other names
    for path in paths:
        if not _is_mask(path, root):
            images.setdefault((_place(path, root), path.stem), []).append(path)
            alone.setdefault(_place(path, root), []).append(path)
    pairs: dict[Path, list[Path]] = {}
    for mask in masks:
        place, stem = _place(mask, root), _ENDINGS.sub("", mask.stem)
        found = images.get((place, mask.stem)) or images.get((place, stem))
        if not found and len(alone.get(place, [])) == 1 and mask.parent.name.lower() in _FOLDERS:
            found = alone[place]
        if found and len(found) == 1:
            pairs.setdefault(found[0], []).append(mask)
    return pairs


def _is_mask(path: Path, root: Path) -> bool:
    in_folder = any(part.lower() in _FOLDERS for part in path.relative_to(root).parent.parts[-2:])
    return path.suffix.lower() == ".png" and (in_folder or bool(_ENDINGS.search(path.stem)))


def _place(path: Path, root: Path) -> Path:
    """Return the folder, relative to the root, without its component ``images`` or ``masks``."""
    parts = list(path.relative_to(root).parent.parts)
    for position in range(len(parts) - 1, -1, -1):
        if parts[position].lower() in (*_FOLDERS, "images", "image"):
            return Path(*parts[:position], *parts[position + 1 :])
    return Path(*parts)


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
    builder.note(f"the masks are read as {reading}: {READINGS[reading]}", str(path))
    for image, masks in sorted(pairs.items()):
        size = image_size(masks[0])[1]  # of the picture as it is stored, perhaps
        added = builder.add_image(image, masks[0], "its image", WHOLE, size)
        builder.sources.update(masks)
        for mask in masks:
            builder.add(added, _shapes(mask, added, reading, builder))
    for image in index.all():
        if not _is_mask(image, index.root) and image not in pairs:
            builder.note("images without a mask are left out", str(image))
    return builder.finish()


def choose_reading(masks: list[Path]) -> str:
    """Return the reading of masks, one for each image; the module says by which rule."""
    counts: set[int] = set()
    values_seen: set[int] = set()
    gapless, whole, all_values = True, 0, 0
    for mask in masks[:: -(-len(masks) // _LOOKED_AT)]:
        values = read_mask(mask)
        found = _without_border(_values(values))
        values_seen.update(_values(values))
        counts.add(len(found))
        gapless &= found == list(range(1, len(found) + 1))
        all_values += len(found)
        with suppress(ValueError):
            pieces = Counter(value for value, *_ in connected_pieces(values, _RUNS_LOOKED_AT))
            whole += sum(pieces[value] == 1 for value in found)
    if len(values_seen) <= 1:
        return "binary"
    several = len(counts - {0}) > 1 or max(counts) > 2
    return "instances" if gapless and several and whole >= _ONE_PIECE * all_values else "classes"


def _values(values: np.ndarray) -> list[int]:
    found: list[int] = np.unique(values).tolist()
    return [value for value in found if value]


def _without_border(values: list[int]) -> list[int]:
    """Return the values without 255, if that is the last and far from the others."""
    is_border = len(values) > 1 and values[-1] == _VOID and values[-2] < _VOID - 1
    return values[:-1] if is_border else values


def _shapes(mask: Path, image: SourceImage, reading: str, builder: Builder) -> Iterator[Shape]:
    values = read_mask(mask)
    size = (image.record.height, image.record.width)
    if values.shape != size:
        raise DataError(
            "size-differs",
            f"{mask} has {values.shape[1]}x{values.shape[0]} pixels (width x height), but its image "
            f"{size[1]}x{size[0]}; correct one of them",
        )
    if reading == "files":
        yield Shape("object", "its pixels", bitmap=(values != 0, 0, 0))
        return
    if reading == "binary":
        values = values != 0
    numbers = _without_border(_values(values))
    if numbers != _values(values):
        builder.note("the value 255 is left out, a border", str(mask))
    if len(numbers) > _MOST_OBJECTS:
        raise DataError("malformed", f"{mask} has {len(numbers)} values, too many objects; check the mask")
    if reading == "instances":
        yield from _instances(values, numbers)
        return
    try:
        pieces = connected_pieces(values)
    except ValueError as error:
        raise DataError("malformed", f"{mask} has {error}; check the mask") from error
    if len(pieces) > _MOST_OBJECTS:
        raise DataError("malformed", f"{mask} has more than {_MOST_OBJECTS} pieces; check the mask")
    known = set(numbers)
    for value, left, top, piece in pieces:
        label = str(value) if reading == "classes" else "object"
        if value in known:
            yield Shape(label, f"value {value}, piece at {left}, {top}", bitmap=(piece, left, top))


def _instances(values: np.ndarray, numbers: list[int]) -> Iterator[Shape]:
    """Yield an object for each of the values, in time for the pixels and not for each value's."""
    columns = values.T.ravel()
    order = np.argsort(columns, kind="stable")
    edges = np.searchsorted(columns[order], [numbers, [number + 1 for number in numbers]])
    for number, start, end in zip(numbers, *edges.tolist(), strict=True):
        yield Shape("object", f"value {number}", rle=encode_pixels(order[start:end], *values.shape))


def read_mask(path: Path) -> np.ndarray:
    """Return the values (H, W) of a mask: greyscale, palette indices, or equal channels.

    Raises:
        UserError: it cannot be read, is no PNG, or has colours.
    """
    try:
        with open_image(path) as image:
            if image.format != "PNG":
                raise DataError("unreadable-image", f"mask {path} is {image.format}; save it as PNG")
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise DataError("image-size", f"mask {path} has {width}x{height} pixels, too many")
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
    except DAMAGED as error:
        raise DataError(
            "unreadable-image", f"cannot read mask {path}: {' '.join(str(error).split())}; replace it"
        ) from error
