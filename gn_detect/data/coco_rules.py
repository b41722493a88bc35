"""What one entry of a COCO file must look like. Each rule raises a DataError, or returns what it read.

:mod:`.coco_json` stops at the first error, :mod:`.doctor` goes on: both ask these rules.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pycocotools.mask as coco_mask

from .faults import DataError
from .image_table import ImageRecord
from .rle import count_pixels

_KIND = {dict: "an object", list: "a list", str: "a string", int: "an integer"}

FARTHEST = 1e6
"""Pixels; drawing takes memory in proportion to the length of a polygon."""

_MOST_PIXELS = 2 * 89_478_485
"""Of an image: Pillow refuses to read larger ones."""


def is_integer(value: Any) -> bool:
    """A JSON integer that fits into 64 bits; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_coordinate(value: Any) -> bool:
    """A JSON number of pixels: finite, and near enough to be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -FARTHEST <= value <= FARTHEST


def image_file(folder: Path, name: str, allow_outside: bool) -> Path:
    """Return the path of an annotation file's image.

    A name that leads out of the folder to nothing is that of a missing image: nothing can be opened there.

    Args:
        folder: of the images.
        name: ``file_name`` of the image.
        allow_outside: ``DATASETS.ALLOW_OUTSIDE``.

    Raises:
        DataError: the name is absolute or has a ``..`` in it, and there is such a file.
    """
    relative = Path(name)
    if not allow_outside and (relative.anchor or ".." in relative.parts) and os.path.lexists(folder / name):
        raise DataError(
            f"{shown(name)}, which leads out of the images folder {folder}; give names relative to that "
            "folder, or set DATASETS.ALLOW_OUTSIDE True (doctor: --allow-outside) if you trust the file",
            "image-outside",
        )
    return folder / name


def kind_of(value: Any) -> str:
    """A JSON value in words, cut to some length."""
    return _KIND.get(type(value), shown(value))


def shown(value: Any) -> str:
    """A JSON value as text of bounded length."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


@dataclass(frozen=True)
class Rules:
    """Rules for the entries of one file.

    Attributes:
        path: the file, for messages.
        folder: to which its file names are relative.
        evaluation: annotations must have what COCO's evaluation needs besides: ``area`` and ``iscrowd``.
        allow_outside: file names may lead out of ``folder``.
    """

    path: Path
    folder: Path = Path()
    evaluation: bool = False
    allow_outside: bool = False

    def error(self, message: str, kind: str) -> DataError:
        """An error that names the file."""
        return DataError(f"{self.path}: {message}", kind)

    def field(self, entry: Any, key: str, expected: type, what: str) -> Any:
        """``entry[key]``, of the expected type; ``what`` names the entry in a message."""
        if not isinstance(entry, dict):
            raise self.error(
                f"{what} is {kind_of(entry)}, not an object; give a COCO annotation file", "malformed"
            )
        if key not in entry:
            raise self.error(f"{what} has no {key!r}; add it", "malformed")
        value = entry[key]
        if not isinstance(value, expected) or isinstance(value, bool):
            raise self.error(f"{what} has {key!r} {shown(value)}; it must be {_KIND[expected]}", "malformed")
        if expected is int and not is_integer(value):
            raise self.error(
                f"{what} has a {key!r} of more than 64 bits; give it a smaller number", "malformed"
            )
        return value

    def category(self, entry: Any, position: int) -> tuple[int, str]:
        """Id and name."""
        category_id = self.field(entry, "id", int, f"category {position} (counted from 0)")
        return category_id, self.field(entry, "name", str, f"category {category_id}")

    def image(self, entry: Any, position: int) -> ImageRecord:
        """The record, its path included."""
        image_id = self.field(entry, "id", int, f"image {position} (counted from 0)")
        what = f"image {image_id}"
        height, width = (self.field(entry, key, int, what) for key in ("height", "width"))
        if height <= 0 or width <= 0 or height * width > _MOST_PIXELS:
            raise self.error(
                f"{what} is {width}x{height} pixels (width x height); correct its size", "image-size"
            )
        return ImageRecord(image_id, str(self.image_path(entry, what)), height, width)

    def image_path(self, entry: Any, what: str) -> Path:
        """The file of an image. A name that leads out of the folder to nothing is a missing image's."""
        name = self.field(entry, "file_name", str, what)
        if not name or "\0" in name:
            raise self.error(f"{what} has 'file_name' {name!r}; give the name of a file", "malformed")
        try:
            return image_file(self.folder, name, self.allow_outside)
        except DataError as error:
            raise self.error(f"{what} has 'file_name' {error}", error.kind) from None

    def ids(self, annotation: Any, position: int) -> tuple[int, int]:
        """Ids of an annotation and its image."""
        annotation_id = self.field(annotation, "id", int, f"annotation {position} (counted from 0)")
        return annotation_id, self.field(annotation, "image_id", int, f"annotation {annotation_id}")

    def category_id(self, annotation: dict[str, Any], known: Any, what: str) -> int:
        """The category of an annotation, one of ``known``."""
        category_id = self.field(annotation, "category_id", int, what)
        if category_id not in known:
            raise self.error(
                f"{what} has category id {category_id}, which 'categories' does not list; "
                "add the category or correct the id",
                "dangling-category",
            )
        return category_id

    def crowd(self, annotation: dict[str, Any], what: str) -> bool:
        """``iscrowd``; ``ignore`` must not be set."""
        crowd = self._flag(annotation, "iscrowd", what)
        if self._flag(annotation, "ignore", what):
            raise self.error(f"{what} has 'ignore' 1, which COCO does not know; use 'iscrowd' 1", "bad-flag")
        return crowd

    def _flag(self, annotation: dict[str, Any], key: str, what: str) -> bool:
        value = annotation.get(key, 0)
        if value not in (0, 1):
            raise self.error(f"{what} has {key!r} {shown(value)}; it must be 0 or 1", "bad-flag")
        return bool(value)

    def complete(self, annotation: dict[str, Any], what: str) -> None:
        """Whether the evaluation finds what it needs."""
        for key in ("area", "iscrowd"):
            if key not in annotation:
                raise self.error(f"{what} has no {key!r}, which the evaluation needs; add it", "incomplete")
        area = annotation["area"]
        if not is_area(area):
            raise self.error(f"{what} has 'area' {shown(area)}; it must be a number of pixels", "bad-area")

    def box(self, annotation: dict[str, Any], image: ImageRecord, what: str) -> list[float] | None:
        """``xyxy``, or None for a box without width or height."""
        given = self.field(annotation, "bbox", list, what)
        if len(given) != 4 or not all(map(is_coordinate, given)):
            raise self.error(
                f"{what} has 'bbox' {shown(given)}; it must be 4 finite numbers x, y, width, height",
                "bad-box",
            )
        x, y, width, height = given
        if width < 0 or height < 0:
            raise self.error(
                f"{what} has 'bbox' {given} of negative size; it must be x, y, width, height", "bad-box"
            )
        if width == 0 or height == 0:
            return None
        if x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0:
            raise self.error(
                f"{what} has its box {given} outside the image of {image.width}x{image.height} pixels; "
                "correct the box (x, y, width, height) or remove it",
                "box-outside",
            )
        return [x, y, x + width, y + height]

    def segmentation(self, given: Any, image: ImageRecord, what: str) -> tuple[list[list[float]], bytes]:
        """Valid polygons, or the counts of a compressed RLE; one of the two, or neither, is empty."""
        if not given:
            raise self.error(f"{what} has no segmentation; add one, or set MODEL.MASK_ON False", "no-mask")
        if isinstance(given, dict):
            return [], self._rle(given, image, what)
        if not isinstance(given, list) or not all(isinstance(polygon, list) for polygon in given):
            raise self.error(
                f"{what} has a segmentation that is no list of polygons and no RLE; correct it", "bad-polygon"
            )
        for polygon in given:
            if not all(map(is_coordinate, polygon)):
                raise self.error(
                    f"{what} has a polygon that is not all finite numbers near the image; mend it",
                    "bad-polygon",
                )
        return [polygon for polygon in given if is_polygon(polygon)], b""

    def _rle(self, given: dict[str, Any], image: ImageRecord, what: str) -> bytes:
        size, counts = given.get("size"), given.get("counts")
        if size != [image.height, image.width]:
            raise self.error(
                f"{what} has an RLE of 'size' {shown(size)}, but the image's is "
                f"[{image.height}, {image.width}] (height, width); correct one of them",
                "rle-size",
            )
        pixels = image.height * image.width
        if isinstance(counts, str):
            try:
                found = count_pixels(counts)
            except ValueError as error:
                raise self.error(
                    f"{what} has an RLE without valid 'counts' ({error}); encode the mask again", "bad-rle"
                ) from error
            if found != pixels:
                raise self._other_pixels(what, found, pixels)
            return counts.encode()
        if isinstance(counts, list) and all(is_integer(run) and run >= 0 for run in counts):
            if sum(counts) != pixels:
                raise self._other_pixels(what, sum(counts), pixels)
            return coco_mask.frPyObjects(given, image.height, image.width)["counts"]
        raise self.error(f"{what} has an RLE without valid 'counts'; encode the mask again", "bad-rle")

    def _other_pixels(self, what: str, found: int, pixels: int) -> DataError:
        return self.error(
            f"{what} has an RLE of {found} pixels, but the image has {pixels}; encode the mask again",
            "bad-rle",
        )


def is_polygon(numbers: list[float]) -> bool:
    """At least 3 points, each an x and a y."""
    return len(numbers) % 2 == 0 and len(numbers) >= 6


def is_area(value: Any) -> bool:
    """A JSON number of square pixels."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= FARTHEST**2
