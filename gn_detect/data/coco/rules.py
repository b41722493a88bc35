"""Check the entries of COCO files. Training, evaluation, the doctor and its repair all use these rules.

A rule returns the value that it read, or raises a :class:`.DataError` that names the entry.
``Rules.categories``, ``Rules.images`` and ``Rules.annotations`` go through a whole list and hand each error
to ``report``: by default the first error is raised; the doctor collects all of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pycocotools.mask as coco_mask

from ...errors import Code
from ..transforms import polygon_bounds
from .faults import ERROR, FAULTS, DataError
from .file_names import leads_out
from .rle import count_pixels
from .tables import ImageRecord
from .values import (
    extent_of,
    has_fraction_box,
    has_fraction_mask,
    is_area,
    is_integer,
    is_larger_than_fractions,
)

T = TypeVar("T")

_KIND = {dict: "an object", list: "a list", str: "a string", int: "an integer"}

# A predictor of as many classes has 128 million weights. V3Det has 13,204 categories, ImageNet-21k 21,841.
MOST_CATEGORIES = 25_000

# Pillow refuses to read larger images.
MOST_PIXELS = 2 * 89_478_485

# The outline of an object may have 256 pixels for each pixel of height + width of its image, at most 4
# million, and 8 more for each of its points. Drawing takes 100 bytes for each pixel of an outline, so that a
# few kilobytes of long edges would take gigabytes. A traced outline has an edge for each one to three pixels.
# A net with meshes of 30 pixels that fills an image of 4000 x 3000 pixels has 1.6 million pixels of the 1.8
# million that are allowed without counting its points. Objects in COCO have less than 10,000.
_OUTLINE_PER_SIDE, _OUTLINE_PER_POINT, _LONGEST_OUTLINE = 256, 8, 4e6

# An outline of more than 20,000 pixels counts with its excess over twice height + width of its image (no
# convex object is longer) and over 8 pixels for each of its points. All objects of a file may have 40 million
# pixels of excess, which takes seconds to draw.
_LONG_OUTLINE, _LONG_IN_ALL = 20_000, 4e7

# A polygon may reach this many times the longer side of its image, and 1000 pixels more, from the corner.
_SIDES_AWAY = 10

# The largest share of boxes that may look like fractions in a file of pixels.
_FEW = 0.05


@dataclass(frozen=True)
class Segmentation:
    """The mask of one object in an image of ``height`` x ``width`` pixels.

    It has valid polygons, or the ``counts`` of a compressed RLE. It has neither, and is false, where all
    polygons are too short.
    """

    polygons: list[list[float]]
    rle: bytes
    height: int
    width: int

    def __bool__(self) -> bool:
        return bool(self.polygons or self.rle)

    @cached_property
    def encoded(self) -> dict[str, Any]:
        """Return the compressed RLE with text ``counts``."""
        size, counts = [self.height, self.width], self.rle
        if not counts:
            counts = coco_mask.merge(coco_mask.frPyObjects(self.polygons, *size))["counts"]
        return {"size": size, "counts": counts.decode("ascii")}

    @cached_property
    def area(self) -> float:
        """Return the number of pixels."""
        return float(coco_mask.area(self.encoded))

    @cached_property
    def box(self) -> list[float]:
        """Return ``xyxy`` around the part inside the image."""
        if self.rle:
            x, y, width, height = coco_mask.toBbox(self.encoded).tolist()
            return [x, y, x + width, y + height]
        polygons = [np.array(polygon, dtype=np.float64) for polygon in self.polygons]
        box: list[float] = polygon_bounds(polygons, self.height, self.width).tolist()
        return box


@dataclass(slots=True)
class Annotation:
    """An annotation with what the rules read of it.

    Attributes:
        what: names the annotation in messages.
        about: its ids, for :class:`.Finding`.
        image: None where its size is unknown.
        category_id: None where it was refused.
        area: in square pixels; None where there is none.
        box: ``xyxy`` in pixels; None where it is empty or was refused.
    """

    entry: dict[str, Any]
    what: str
    about: dict[str, Any]
    id: int
    image_id: int
    image: ImageRecord | None
    category_id: int | None
    crowd: bool
    area: float | None
    box: list[float] | None


# Takes an error and the ids of its entry, named like the fields of a Finding.
Report = Callable[[DataError, Mapping[str, Any]], None]


def stop(error: DataError, about: Mapping[str, Any]) -> None:
    """Raise errors; pass over warnings."""
    if FAULTS[error.code].severity == ERROR:
        raise error


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
            "image-outside",
            f"{shown(name)}, which leads out of the images folder {folder}; give names relative to that "
            "folder, or set DATASETS.ALLOW_OUTSIDE True (doctor: --allow-outside) if you trust the file",
        )
    return folder / name


def kind_of(value: Any) -> str:
    """Return the type of a JSON value in words, or the value itself, cut to some length."""
    return _KIND.get(type(value), shown(value))


def shown(value: Any) -> str:
    """Return a JSON value as text of bounded length."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def id_of(entry: Any, key: str = "id") -> int | None:
    """Return an entry's id; None where it has no proper one."""
    found = entry.get(key) if isinstance(entry, dict) else None
    return found if is_integer(found) else None


@dataclass(frozen=True)
class Rules:
    """Rules for the entries of one file.

    The rules count long outlines: each reading of the file needs rules of its own.

    Attributes:
        path: the file, for messages.
        folder: to which its file names are relative.
        evaluation: check ``area``, too, which only COCO's evaluation reads.
        allow_outside: file names may lead out of ``folder``.
    """

    path: Path
    folder: Path = Path()
    evaluation: bool = False
    allow_outside: bool = False
    _long: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    # Whole lists

    def whole(self, content: Mapping[str, Any]) -> None:
        """Check the entries together: the number of categories, and the unit of length.

        Raises:
            DataError: boxes or polygons are fractions of the image. A few may be as small as that, and in the
                image's corner.
        """
        if len(content["categories"]) > MOST_CATEGORIES:
            raise self.error(
                "malformed",
                f"it lists {len(content['categories'])} categories, more than the {MOST_CATEGORIES} that a "
                "detector can have; leave out those without an object",
            )
        if any(map(is_larger_than_fractions, content["images"])):
            entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
            self._unit("boxes", entries, map(has_fraction_box, entries))
            self._unit("segmentations", entries, map(has_fraction_mask, entries))

    def _unit(self, noun: str, entries: list[dict[str, Any]], answers: Iterable[bool | None]) -> None:
        known = [
            (entry, answer) for entry, answer in zip(entries, answers, strict=True) if answer is not None
        ]
        wrong, number = [entry for entry, is_fraction in known if is_fraction], len(known)
        if len(wrong) > _FEW * number:
            folder = self.folder if self.folder.name else "FOLDER"
            raise self.error(
                "fractions",
                f"{len(wrong)} of {number} {noun} are fractions of the image, such as that of annotation "
                f"{shown(wrong[0].get('id'))}; COCO's are in pixels: gn-detect doctor {self.path} "
                f"--images {folder} --fix OUT.json multiplies them by the image's size",
            )

    def categories(self, entries: list[Any], report: Report = stop) -> dict[int, str]:
        """Return the names by id, in the file's order."""
        names: dict[int, str] = {}
        for position, entry in enumerate(entries):
            try:
                category_id = self.field(entry, "id", int, f"category {position} (counted from 0)")
                name = self.field(entry, "name", str, f"category {category_id}")
                if category_id in names:
                    raise self.repeated(
                        "duplicate-category-id", category_id, f" ({shown(names[category_id])}, {shown(name)})"
                    )
                names[category_id] = name
            except DataError as error:
                report(error, {"category_id": id_of(entry)})
        if not entries:
            report(self.error("empty-list", "it lists no categories; add the classes of its annotations"), {})
        return names

    def images(
        self, entries: list[Any], report: Report = stop, *, files: bool = True
    ) -> dict[int, ImageRecord | None]:
        """Return the images by id, in the file's order; None for an image that was refused.

        Args:
            entries: of the file.
            report: takes each error.
            files: images need a file name and a size. Without, an image of unknown size is None.
        """
        images: dict[int, ImageRecord | None] = {}
        for position, entry in enumerate(entries):
            try:
                image_id = self.field(entry, "id", int, f"image {position} (counted from 0)")
                if image_id in images:
                    raise self.repeated(
                        "duplicate-image-id", image_id, f" (entry {position} counted from 0 repeats it)"
                    )
                images[image_id] = None
                if files:
                    images[image_id] = self.image(entry, position)
                elif None not in (entry.get("height"), entry.get("width")):
                    images[image_id] = ImageRecord(image_id, "", *self.size(entry, f"image {image_id}"))
            except DataError as error:
                name = entry.get("file_name") if isinstance(entry, dict) else None
                name = name if isinstance(name, str) else None
                report(error, {"image_id": id_of(entry), "file_name": name})
        if files and not entries:
            report(self.error("empty-list", "it lists no images; give a file with images"), {})
        return images

    def annotations(
        self,
        entries: list[Any],
        images: Mapping[int, ImageRecord | None],
        categories: Container[int],
        report: Report = stop,
    ) -> Iterator[Annotation]:
        """Yield each annotation of a listed image; its mask is not read."""
        seen: set[int] = set()

        def attempt(rule: Callable[..., T], *arguments: Any) -> T | None:
            try:
                return rule(*arguments)
            except DataError as error:
                report(error, about)
                return None

        for position, entry in enumerate(entries):
            about = {"annotation_id": id_of(entry), "category_id": id_of(entry, "category_id")}
            ids = attempt(self.ids, entry, position)
            if ids is None:
                continue
            annotation_id, image_id = ids
            about["image_id"] = image_id
            what = f"annotation {annotation_id} of image {image_id}"
            if annotation_id in seen and not self.ids_may_repeat:
                report(self.repeated("duplicate-annotation-id", annotation_id), about)
            seen.add(annotation_id)
            if image_id not in images:
                report(self._unlisted_image(annotation_id, image_id), about)
                continue
            image = images[image_id]
            category_id = attempt(self.category_id, entry, categories, what)
            crowd = attempt(self.crowd, entry, what) or False
            area = attempt(self.area, entry, what) if self.evaluation else None
            box = attempt(self.box, entry, image, what)
            yield Annotation(entry, what, about, *ids, image, category_id, crowd, area, box)

    # Single entries

    def error(self, code: Code, message: str) -> DataError:
        """Return an error that names the file."""
        return DataError(code, message, self.path)

    def field(self, entry: Any, key: str, expected: type, what: str) -> Any:
        """Return ``entry[key]``, which must be of a type; ``what`` names the entry in a message."""
        if not isinstance(entry, dict):
            fault = f"is {kind_of(entry)}, not an object; give a COCO annotation file"
        elif key not in entry:
            fault = f"has no {key!r}; add it"
        elif not isinstance(value := entry[key], expected) or isinstance(value, bool):
            fault = f"has {key!r} {shown(value)}; it must be {_KIND[expected]}"
        elif expected is int and not is_integer(value):
            fault = f"has a {key!r} of more than 64 bits; give it a smaller number"
        else:
            return value
        raise self.error("malformed", f"{what} {fault}")

    def repeated(self, code: Code, entry_id: int, details: str = "") -> DataError:
        """Return the error for an id that occurs twice; ``code`` is ``duplicate-...-id``."""
        noun = code.split("-")[1]
        fault = f"id {entry_id} occurs twice{details}; give each {noun} its own id"
        return self.error(code, f"{noun} {fault}")

    def image(self, entry: Any, position: int) -> ImageRecord:
        """Return the record of an image, its path included."""
        image_id = self.field(entry, "id", int, f"image {position} (counted from 0)")
        what = f"image {image_id}"
        height, width = self.size(entry, what)
        return ImageRecord(image_id, str(self.image_path(entry, what)), height, width)

    def image_path(self, entry: Any, what: str) -> Path:
        """Return the file of an image, see :func:`image_file`."""
        name = self.field(entry, "file_name", str, what)
        if not name or "\0" in name:
            raise self.error("malformed", f"{what} has 'file_name' {name!r}; give the name of a file")
        try:
            return image_file(self.folder, name, self.allow_outside)
        except DataError as error:
            raise self.error(error.code, f"{what} has 'file_name' {error}") from None

    def size(self, entry: Any, what: str) -> tuple[int, int]:
        """Return height and width of an image."""
        height, width = (self.field(entry, key, int, what) for key in ("height", "width"))
        if height <= 0 or width <= 0 or height * width > MOST_PIXELS:
            fault = f"is {width}x{height} pixels (width x height); correct its size"
            raise self.error("image-size", f"{what} {fault}")
        return height, width

    @property
    def ids_may_repeat(self) -> bool:
        """Return whether it is one of COCO's own 2014 minival files, which repeat some annotation ids."""
        return "minival" in self.path.name

    def ids(self, annotation: Any, position: int) -> tuple[int, int]:
        """Return the ids of an annotation and its image."""
        annotation_id = self.field(annotation, "id", int, f"annotation {position} (counted from 0)")
        image_id = annotation.get("image_id")
        if isinstance(image_id, str):  # those of listed images have become integers
            raise self._unlisted_image(annotation_id, shown(image_id))
        return annotation_id, self.field(annotation, "image_id", int, f"annotation {annotation_id}")

    def _unlisted_image(self, annotation_id: int, image_id: Any) -> DataError:
        fault = f"belongs to image {image_id}, which is not listed; add the image or remove the annotation"
        return self.error("dangling-image", f"annotation {annotation_id} {fault}")

    def category_id(self, annotation: dict[str, Any], known: Container[int], what: str) -> int:
        """Return the category of an annotation, one of ``known``."""
        category_id = annotation.get("category_id")
        if not isinstance(category_id, str):  # those of listed categories have become integers
            category_id = self.field(annotation, "category_id", int, what)
            if category_id in known:
                return int(category_id)
        fault = f"category id {shown(category_id)}, which 'categories' does not list"
        raise self.error("dangling-category", f"{what} has {fault}; add the category or correct the id")

    def crowd(self, annotation: dict[str, Any], what: str) -> bool:
        """Return ``iscrowd``; ``ignore`` must not say more."""
        crowd = self._flag(annotation, "iscrowd", what)
        if self._flag(annotation, "ignore", what) and not crowd:
            raise self.error("bad-flag", f"{what} has 'ignore' 1, which COCO does not know; use 'iscrowd' 1")
        return crowd

    def _flag(self, annotation: dict[str, Any], key: str, what: str) -> bool:
        value = annotation.get(key, 0)
        if value not in (0, 1):
            raise self.error("bad-flag", f"{what} has {key!r} {shown(value)}; it must be 0 or 1")
        return bool(value)

    def area(self, annotation: dict[str, Any], what: str) -> float | None:
        """Return ``area`` in square pixels; None stands for the mask's, or else the box's."""
        area = annotation.get("area")
        if area is not None and not is_area(area):
            raise self.error("bad-area", f"{what} has 'area' {shown(area)}; it must be a number of pixels")
        return area

    def box(self, annotation: dict[str, Any], image: ImageRecord | None, what: str) -> list[float]:
        """Return ``xyxy``; without an ``image`` the box may lie anywhere."""
        given = self.field(annotation, "bbox", list, what)
        if len(given) != 4 or extent_of(given) is None:
            fault = f"'bbox' {shown(given)}; it must be 4 finite numbers x, y, width, height"
            raise self.error("bad-box", f"{what} has {fault}")
        x, y, width, height = given
        if width < 0 or height < 0:
            fault = f"'bbox' {given} of negative size; it must be x, y, width, height"
            raise self.error("bad-box", f"{what} has {fault}")
        if width == 0 or height == 0:
            raise self.error("box-empty", f"{what} has a box without width or height")
        if image and (x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0):
            raise self.error(
                "box-outside",
                f"{what} has its box {given} outside the image of {image.width}x{image.height} pixels; "
                "correct the box (x, y, width, height) or remove it",
            )
        return [x, y, x + width, y + height]

    def segmentation(self, given: Any, image: ImageRecord, what: str) -> Segmentation:
        """Return the mask of an object; polygons of less than 3 points are left out."""
        if not given:
            raise self.error("no-mask", f"{what} has no segmentation; add one, or set MODEL.MASK_ON False")
        if isinstance(given, dict):
            return Segmentation([], self._rle(given, image, what), image.height, image.width)
        if not isinstance(given, list) or not all(isinstance(polygon, list) for polygon in given):
            fault = "a segmentation that is no list of polygons and no RLE; correct it"
            raise self.error("bad-polygon", f"{what} has {fault}")
        reach, farthest = 0.0, _SIDES_AWAY * max(image.height, image.width) + 1000
        for polygon in given:
            extent = extent_of(polygon) if polygon else (0, 0)
            if extent is None or extent[0] < -farthest or extent[1] > farthest:
                fault = "a polygon that is not all finite numbers near the image; mend it"
                raise self.error("bad-polygon", f"{what} has {fault}")
            if extent[1] - extent[0] > _OUTLINE_PER_POINT:
                reach += len(polygon) * (extent[1] - extent[0])
        polygons = [polygon for polygon in given if is_polygon(polygon)]
        longest = min(_OUTLINE_PER_SIDE * (image.height + image.width), _LONGEST_OUTLINE)
        if reach / 2 > min(longest, _LONG_OUTLINE):  # if each edge were as long as its polygon reaches
            self._check_outline(polygons, longest, image, what)
        return Segmentation(polygons, b"", image.height, image.width)

    def _check_outline(
        self, polygons: list[list[float]], longest: float, image: ImageRecord, what: str
    ) -> None:
        length = sum(map(_outline_length, polygons))
        usual = _OUTLINE_PER_POINT * sum(map(len, polygons)) / 2
        if length > max(_LONG_OUTLINE, usual + 2 * (image.height + image.width)):
            self._long["pixels"] += int(length - usual) - 2 * (image.height + image.width)
        reason = ""
        if self._long["pixels"] > _LONG_IN_ALL:
            reason = "and the objects before it have others as long: too much to draw in all"
        elif length > longest + usual:
            reason = f"which no object in an image of {image.width}x{image.height} pixels has"
        if reason:
            remedy = "draw it again, or encode it as RLE"
            message = f"{what} has polygons with an outline of {length:.0f} pixels, {reason}; {remedy}"
            raise self.error("bad-polygon", message)

    def _rle(self, given: dict[str, Any], image: ImageRecord, what: str) -> bytes:
        size, counts = given.get("size"), given.get("counts")
        if size != [image.height, image.width]:
            raise self.error(
                "rle-size",
                f"{what} has an RLE of 'size' {shown(size)}, but the image's is "
                f"[{image.height}, {image.width}] (height, width); correct one of them",
            )
        if isinstance(counts, str):
            try:
                found = count_pixels(counts)
            except ValueError as error:
                raise self._bad_rle(what, f"without valid 'counts' ({error})") from error
        elif isinstance(counts, list) and counts and {int}.issuperset(map(type, counts)) and min(counts) >= 0:
            found = sum(counts)
        else:
            raise self._bad_rle(what, "without valid 'counts'")
        pixels = image.height * image.width
        if found != pixels:
            raise self._bad_rle(what, f"of {shown(found)} pixels, but the image has {pixels}")
        if isinstance(counts, str):
            return counts.encode()
        encoded: bytes = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)["counts"]
        return encoded

    def _bad_rle(self, what: str, reason: str) -> DataError:
        return self.error("bad-rle", f"{what} has an RLE {reason}; encode the mask again")


def is_polygon(numbers: list[float]) -> bool:
    """Return whether there are at least 3 points, each an x and a y."""
    return len(numbers) % 2 == 0 and len(numbers) >= 6


def _outline_length(polygon: list[float]) -> float:
    """Return pixels, along the longer of the two axes for each edge: as many points are drawn."""
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
