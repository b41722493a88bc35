"""What one entry of a COCO file must look like. Each rule raises a DataError, or returns what it read.

:mod:`.coco_json` stops at the first error, :mod:`.doctor` goes on: both ask these rules.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import pycocotools.mask as coco_mask

from .faults import DataError
from .file_names import leads_out
from .image_table import ImageRecord
from .rle import count_pixels

_KIND = {dict: "an object", list: "a list", str: "a string", int: "an integer"}

FARTHEST = 1e6
"""Pixels by which a number may be away from the image's corner."""

MOST_CATEGORIES = 25_000
"""Of a file: a predictor of as many classes has 128 million weights. V3Det has 13,204 categories,
ImageNet-21k 21,841."""

_OUTLINE_PER_SIDE, _OUTLINE_PER_POINT, _LONGEST_OUTLINE = 256, 8, 4e6
"""How long the outline of an object may be, in pixels: so many times height + width of its image, but no more
than the last, and so many more for each of its points.

Drawing takes 100 bytes for each pixel of a polygon's outline, so that a few kilobytes of long edges would
take gigabytes. A traced outline has an edge for each one to three pixels. A net with meshes of 30 pixels that
fills an image of 4000 x 3000 pixels, the longest outline of few points that somebody might draw, has 1.6
million pixels of the 1.8 that are allowed without counting its points; objects in COCO have less than
10,000."""

_LONG_OUTLINE, _LONG_IN_ALL = 20_000, 4e7
"""Pixels. An object's outline that is longer than the first counts with what it has more than twice
height + width of its image, as no convex object has, and a few for each of its points. All objects of a file
may have so many in all, which takes seconds to draw."""

_SIDES_AWAY = 10
"""How far from the image's corner a polygon may reach, in times the longer side, and 1000 pixels more."""

_NUMBERS = frozenset((int, float))

_FRACTION = 1.01
"""The largest number that can be a fraction: those of boxes at the border may be rounded up."""

_FEW = 0.05
"""Share of the boxes of a file that may look like fractions and be pixels of the image's corner."""

MOST_PIXELS = 2 * 89_478_485
"""Of an image: Pillow refuses to read larger ones."""


def is_integer(value: Any) -> TypeGuard[int]:
    """A JSON integer that fits into 64 bits; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_coordinate(value: Any) -> bool:
    """A JSON number of pixels: finite, and near enough to be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -FARTHEST <= value <= FARTHEST


def extent_of(numbers: Sequence[Any]) -> tuple[float, float] | None:
    """Return the least and the greatest coordinate; None where a value is none (:func:`is_coordinate`)."""
    if not _NUMBERS.issuperset(map(type, numbers)):
        return None
    low, high = min(numbers), max(numbers)
    # A nan is the least if it comes first, and in the sum otherwise.
    near = -FARTHEST <= low and high <= FARTHEST and math.isfinite(sum(numbers))
    return (low, high) if near else None


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
    if not allow_outside and leads_out(name) and os.path.lexists(folder / name):
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

    It counts the long outlines that it was asked about: each reading of the file needs rules of its own.
    """

    path: Path
    folder: Path = Path()
    evaluation: bool = False
    allow_outside: bool = False
    _long: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

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

    def whole(self, content: Mapping[str, Any]) -> None:
        """Check the entries together: the number of categories, and the unit of length.

        Raises:
            DataError: boxes or polygons are fractions of the image. A few may be as small as that, and in the
                image's corner.
        """
        if len(content["categories"]) > MOST_CATEGORIES:
            raise self.error(
                f"it lists {len(content['categories'])} categories, more than the {MOST_CATEGORIES} that a "
                "detector can have; leave out those without an object",
                "malformed",
            )
        if not any(map(_is_larger, content["images"])):
            return
        entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
        self._unit("boxes", entries, map(has_fraction_box, entries))
        self._unit("segmentations", entries, map(has_fraction_mask, entries))

    def _unit(self, noun: str, entries: list[dict[str, Any]], fractions: Iterable[bool | None]) -> None:
        """Refuse fractions; ``fractions`` has True or False for each entry, None where it cannot be told."""
        number, wrong = 0, []
        for entry, answer in zip(entries, fractions, strict=True):
            number += answer is not None
            if answer:
                wrong.append(entry)
        if len(wrong) > _FEW * number:
            folder = self.folder if self.folder.name else "FOLDER"
            raise self.error(
                f"{len(wrong)} of {number} {noun} are fractions of the image, such as that of annotation "
                f"{shown(wrong[0].get('id'))}; COCO's are in pixels: gn-detect doctor {self.path} "
                f"--images {folder} --fix OUT.json multiplies them by the image's size",
                "fractions",
            )

    def category(self, entry: Any, position: int) -> tuple[int, str]:
        """Id and name."""
        category_id = self.field(entry, "id", int, f"category {position} (counted from 0)")
        return category_id, self.field(entry, "name", str, f"category {category_id}")

    def image(self, entry: Any, position: int) -> ImageRecord:
        """The record, its path included."""
        image_id = self.image_id(entry, position)
        what = f"image {image_id}"
        height, width = self.size(entry, what)
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

    def image_id(self, entry: Any, position: int) -> int:
        """The id of an image."""
        image_id: int = self.field(entry, "id", int, f"image {position} (counted from 0)")
        return image_id

    def size(self, entry: Any, what: str) -> tuple[int, int]:
        """Height and width of an image."""
        height, width = (self.field(entry, key, int, what) for key in ("height", "width"))
        if height <= 0 or width <= 0 or height * width > MOST_PIXELS:
            raise self.error(
                f"{what} is {width}x{height} pixels (width x height); correct its size", "image-size"
            )
        return height, width

    def repeated(self, noun: str, entry_id: int) -> DataError:
        """An error for an id that occurs twice."""
        return self.error(
            f"{noun} id {entry_id} occurs twice; give each {noun} its own id", f"duplicate-{noun}-id"
        )

    def ids(self, annotation: Any, position: int) -> tuple[int, int]:
        """Ids of an annotation and its image."""
        annotation_id = self.field(annotation, "id", int, f"annotation {position} (counted from 0)")
        image_id = annotation.get("image_id")
        if isinstance(image_id, str):  # those of listed images have become integers
            raise self.unlisted_image(annotation_id, shown(image_id))
        return annotation_id, self.field(annotation, "image_id", int, f"annotation {annotation_id}")

    def unlisted_image(self, annotation_id: int, image_id: Any) -> DataError:
        """An error for an annotation of no image."""
        return self.error(
            f"annotation {annotation_id} belongs to image {image_id}, which is not listed; "
            "add the image or remove the annotation",
            "dangling-image",
        )

    def category_id(self, annotation: dict[str, Any], known: Any, what: str) -> int:
        """The category of an annotation, one of ``known``."""
        if isinstance(annotation.get("category_id"), str):  # those of listed categories have become integers
            raise self._unlisted_category(annotation["category_id"], what)
        category_id: int = self.field(annotation, "category_id", int, what)
        if category_id not in known:
            raise self._unlisted_category(category_id, what)
        return category_id

    def _unlisted_category(self, category_id: Any, what: str) -> DataError:
        return self.error(
            f"{what} has category id {shown(category_id)}, which 'categories' does not list; "
            "add the category or correct the id",
            "dangling-category",
        )

    def crowd(self, annotation: dict[str, Any], what: str) -> bool:
        """``iscrowd``; ``ignore`` must not say more."""
        crowd = self._flag(annotation, "iscrowd", what)
        if self._flag(annotation, "ignore", what) and not crowd:
            raise self.error(f"{what} has 'ignore' 1, which COCO does not know; use 'iscrowd' 1", "bad-flag")
        return crowd

    def _flag(self, annotation: dict[str, Any], key: str, what: str) -> bool:
        value = annotation.get(key, 0)
        if value not in (0, 1):
            raise self.error(f"{what} has {key!r} {shown(value)}; it must be 0 or 1", "bad-flag")
        return bool(value)

    def area(self, annotation: dict[str, Any], what: str) -> float | None:
        """``area`` in square pixels; None where there is none, which is then the mask's or else the box's."""
        area = annotation.get("area")
        if area is not None and not is_area(area):
            raise self.error(f"{what} has 'area' {shown(area)}; it must be a number of pixels", "bad-area")
        return area

    def box(self, annotation: dict[str, Any], image: ImageRecord | None, what: str) -> list[float] | None:
        """``xyxy``, or None for a box without width or height; without an ``image`` it may lie anywhere."""
        given = self.field(annotation, "bbox", list, what)
        if len(given) != 4 or extent_of(given) is None:
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
        if image and (x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0):
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
        reach, farthest = 0.0, _SIDES_AWAY * max(image.height, image.width) + 1000
        for polygon in given:
            extent = extent_of(polygon) if polygon else (0, 0)
            if extent is None or extent[0] < -farthest or extent[1] > farthest:
                raise self.error(
                    f"{what} has a polygon that is not all finite numbers near the image; mend it",
                    "bad-polygon",
                )
            if extent[1] - extent[0] > _OUTLINE_PER_POINT:
                reach += len(polygon) * (extent[1] - extent[0])
        polygons = [polygon for polygon in given if is_polygon(polygon)]
        longest = min(_OUTLINE_PER_SIDE * (image.height + image.width), _LONGEST_OUTLINE)
        if reach / 2 > min(longest, _LONG_OUTLINE):  # if each edge were as long as its polygon reaches
            self._check_outline(polygons, longest, image, what)
        return polygons, b""

    def _check_outline(
        self, polygons: list[list[float]], longest: float, image: ImageRecord, what: str
    ) -> None:
        length = sum(map(_outline_length, polygons))
        usual = _OUTLINE_PER_POINT * sum(map(len, polygons)) / 2
        if length > max(_LONG_OUTLINE, usual + 2 * (image.height + image.width)):
            self._long["pixels"] += int(length - usual) - 2 * (image.height + image.width)
        if self._long["pixels"] > _LONG_IN_ALL:
            raise self.error(
                f"{what} has polygons with an outline of {length:.0f} pixels, and the objects before it have "
                "others as long: too much to draw in all; draw them again, or encode them as RLE",
                "bad-polygon",
            )
        if length > longest + usual:
            raise self.error(
                f"{what} has polygons with an outline of {length:.0f} pixels, which no object in an image of "
                f"{image.width}x{image.height} pixels has; draw it again, or encode it as RLE",
                "bad-polygon",
            )

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
        if isinstance(counts, list) and counts and {int}.issuperset(map(type, counts)) and min(counts) >= 0:
            if sum(counts) != pixels:
                raise self._other_pixels(what, sum(counts), pixels)
            whole = {"size": size, "counts": counts}
            return coco_mask.frPyObjects(whole, image.height, image.width)["counts"]
        raise self.error(f"{what} has an RLE without valid 'counts'; encode the mask again", "bad-rle")

    def _other_pixels(self, what: str, found: int, pixels: int) -> DataError:
        return self.error(
            f"{what} has an RLE of {shown(found)} pixels, but the image has {pixels}; encode the mask again",
            "bad-rle",
        )


def is_polygon(numbers: list[float]) -> bool:
    """At least 3 points, each an x and a y."""
    return len(numbers) % 2 == 0 and len(numbers) >= 6


def is_area(value: Any) -> bool:
    """A JSON number of square pixels."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= FARTHEST**2


def are_fractions(lists: Sequence[Sequence[float]], whole: bool = False) -> bool:
    """Return whether boxes or polygons look like fractions of the image: all numbers are between 0 and 1.

    Args:
        lists: of numbers, none empty.
        whole: all of them may be 0 or 1, as those of a whole image are.
    """
    return (
        lists[0][0] <= _FRACTION
        and all(max(numbers) <= _FRACTION and min(numbers) >= 0 for numbers in lists)
        and (whole or any(number % 1 for numbers in lists for number in numbers))
    )


def is_box(value: Any) -> TypeGuard[list[float]]:
    """Return whether a value is a list of four numbers."""
    return type(value) is list and len(value) == 4 and _NUMBERS.issuperset(map(type, value))


def is_polygons(value: Any) -> TypeGuard[list[list[float]]]:
    """Return whether a value is a list of lists of numbers, none empty."""
    return (
        type(value) is list
        and bool(value)
        and all(type(part) is list and part and _NUMBERS.issuperset(map(type, part)) for part in value)
    )


def _is_larger(image: Any) -> bool:
    """Return whether boxes as small as fractions would be a small part of an image."""
    sides = (image.get("height"), image.get("width")) if isinstance(image, dict) else ()
    return any(is_integer(side) and side > 4 for side in sides)


def has_fraction_box(entry: Mapping[str, Any]) -> bool | None:
    """Return whether the box of an annotation is fractions of the image.

    None for no proper box, an empty one, and the one that may be all of an image or its first pixel.
    """
    box = entry.get("bbox")
    if not is_box(box) or box[2] <= 0 or box[3] <= 0 or box == [0, 0, 1, 1]:
        return None
    return are_fractions([box])


def has_fraction_mask(entry: Mapping[str, Any]) -> bool | None:
    """Return whether the polygons of an annotation are fractions of the image.

    None for what is no polygons, and for those that may be all of an image or its first pixel.
    """
    mask = entry.get("segmentation")
    if not is_polygons(mask):
        return None
    return are_fractions(mask) or (None if are_fractions(mask, whole=True) else False)


def _outline_length(polygon: list[float]) -> float:
    """Pixels, along the longer of the two axes for each edge: as many points are drawn."""
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
