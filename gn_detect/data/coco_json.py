"""Reading COCO's JSON with checks: whatever is wrong is named together with what to do about it."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pycocotools.mask as coco_mask

from ..errors import UserError
from .object_table import ObjectTable, TableBuilder

logger = logging.getLogger(__name__)

_RLE_CHARACTERS = re.compile("[0-o]+")
"""Of a compressed RLE: six bits from code 48 on. pycocotools does not check them."""

_KIND = {dict: "an object", list: "a list", str: "a string", int: "an integer"}


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of the JSON; ``file_name`` is the path to read, ``height`` and ``width`` are in pixels."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoContent:
    """What was read.

    Attributes:
        category_ids, class_names: in the order of contiguous labels: ids ascending.
        images: ordered by id.
        objects: rows for ``images``, crowds left out.
        num_crowds: annotations that are crowds.
    """

    category_ids: list[int]
    class_names: list[str]
    images: list[ImageRecord]
    objects: ObjectTable
    num_crowds: int


def read_coco_json(path: Path, images: Path, *, masks: bool, evaluation: bool) -> CocoContent:
    """Read and check an annotation file.

    Args:
        path: JSON in COCO's format for instances.
        images: folder to which its file names are relative.
        masks: objects must have a segmentation; it is ignored otherwise.
        evaluation: annotations must have what COCO's evaluation needs besides: ``area`` and ``iscrowd``.

    Raises:
        UserError: the file is not COCO, or something in it is wrong.
    """
    content = _load(path)
    names = _categories(content["categories"], path)
    records = _images(content["images"], path, images)
    grouped = _group_by_image(content["annotations"], records, path)
    labels = {category_id: label for label, category_id in enumerate(names)}
    reader = _AnnotationReader(path, labels, masks, evaluation)
    for record in records:
        reader.read(record, grouped.pop(record.id, ()))
    reader.warn()
    return CocoContent(list(names), list(names.values()), records, reader.builder.build(), reader.num_crowds)


def read_image_list(path: Path, folder: Path) -> list[Path]:
    """The images that a COCO JSON names, in its order; annotations are not needed.

    Args:
        path: JSON with ``images``.
        folder: to which its file names are relative.

    Raises:
        UserError: the file is not COCO, or lists no images.
    """
    entries = _load(path, ("images",))["images"]
    if not entries:
        raise UserError(f"{path} lists no images; give a file with images")
    return [folder / _field(entry, "file_name", str, f"image {i}", path) for i, entry in enumerate(entries)]


def _load(path: Path, lists: tuple[str, ...] = ("images", "annotations", "categories")) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"annotation file {path} is missing; correct its path") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not JSON ({error.msg}, {where}); give a COCO annotation file") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}; give a COCO annotation file") from error
    if not isinstance(content, dict):
        hint = " (this looks like a result file)" if isinstance(content, list) else ""
        raise UserError(f"{path} is not COCO: it holds {_kind(content)}{hint}; give a COCO annotation file")
    for key in lists:
        if not isinstance(content.get(key), list):
            found = f"{key!r} is {_kind(content[key])}" if key in content else f"it has no {key!r}"
            needed = ", ".join(map(repr, lists))
            raise UserError(f"{path} is not COCO: {found}; it must hold the lists {needed}")
    return content


def _kind(value: Any) -> str:
    return _KIND.get(type(value), repr(value))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _field(entry: Any, key: str, expected: type, what: str, path: Path) -> Any:
    """``entry[key]``, of the expected type; ``what`` names the entry in a message."""
    if not isinstance(entry, dict):
        raise UserError(f"{path}: {what} is {_kind(entry)}, not an object; give a COCO annotation file")
    if key not in entry:
        raise UserError(f"{path}: {what} has no {key!r}; add it")
    value = entry[key]
    if not isinstance(value, expected) or isinstance(value, bool):
        raise UserError(f"{path}: {what} has {key!r} {value!r}; it must be {_KIND[expected]}")
    return value


def _categories(entries: list[Any], path: Path) -> dict[int, str]:
    """Names by category id, ids ascending."""
    names: dict[int, str] = {}
    for i, entry in enumerate(entries):
        category_id = _field(entry, "id", int, f"category {i} (counted from 0)", path)
        if category_id in names:
            raise UserError(f"{path}: category id {category_id} occurs twice; give each category its own id")
        names[category_id] = _field(entry, "name", str, f"category {category_id}", path)
    if not names:
        raise UserError(f"{path} lists no categories; add the classes of its annotations")
    return dict(sorted(names.items()))


def _images(entries: list[Any], path: Path, folder: Path) -> list[ImageRecord]:
    records: dict[int, ImageRecord] = {}
    for i, entry in enumerate(entries):
        image_id = _field(entry, "id", int, f"image {i} (counted from 0)", path)
        if image_id in records:
            raise UserError(f"{path}: image id {image_id} occurs twice; give each image its own id")
        what = f"image {image_id}"
        height, width = (_field(entry, key, int, what, path) for key in ("height", "width"))
        if height <= 0 or width <= 0:
            raise UserError(f"{path}: {what} is {width}x{height} pixels (width x height); correct its size")
        name = _field(entry, "file_name", str, what, path)
        records[image_id] = ImageRecord(image_id, str(folder / name), height, width)
    if not records:
        raise UserError(f"{path} lists no images; give a file with images")
    return [records[image_id] for image_id in sorted(records)]


def _group_by_image(
    annotations: list[Any], records: list[ImageRecord], path: Path
) -> defaultdict[int, list[dict[str, Any]]]:
    """Annotations by image id; ids are checked."""
    known = {record.id for record in records}
    seen: set[int] = set()
    grouped: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    # COCO's own 2014 minival and valminusminival files repeat some annotation ids.
    unique = "minival" not in path.name
    for i, annotation in enumerate(annotations):
        annotation_id = _field(annotation, "id", int, f"annotation {i} (counted from 0)", path)
        if unique and annotation_id in seen:
            raise UserError(f"{path}: annotation id {annotation_id} occurs twice; give each its own id")
        seen.add(annotation_id)
        image_id = _field(annotation, "image_id", int, f"annotation {annotation_id}", path)
        if image_id not in known:
            raise UserError(
                f"{path}: annotation {annotation_id} belongs to image {image_id}, which is not listed; "
                "add the image or remove the annotation"
            )
        grouped[image_id].append(annotation)
    return grouped


class _AnnotationReader:
    """Checks the annotations of one image after the other and fills a table with the objects."""

    def __init__(self, path: Path, labels: dict[int, int], masks: bool, evaluation: bool) -> None:
        self.path, self.labels, self.masks, self.evaluation = path, labels, masks, evaluation
        self.builder = TableBuilder(masks)
        self.num_crowds = 0
        self.dropped: Counter[str] = Counter()

    def warn(self) -> None:
        """One line for each kind of annotation that was dropped."""
        for reason, count in self.dropped.items():
            logger.warning("%s: dropped %d annotation(s) %s", self.path, count, reason)

    def read(self, image: ImageRecord, annotations: Any) -> None:
        """Add the objects of one image."""
        for annotation in annotations:
            self._read_one(image, annotation, f"annotation {annotation['id']} of image {image.id}")
        self.builder.end_image()

    def _read_one(self, image: ImageRecord, annotation: dict[str, Any], what: str) -> None:
        category_id = _field(annotation, "category_id", int, what, self.path)
        if category_id not in self.labels:
            raise UserError(
                f"{self.path}: {what} has category id {category_id}, which 'categories' does not list; "
                "add the category or correct the id"
            )
        crowd = self._flag(annotation, "iscrowd", what)
        if self._flag(annotation, "ignore", what):
            raise UserError(f"{self.path}: {what} has 'ignore' 1, which COCO does not know; use 'iscrowd' 1")
        if self.evaluation:
            for key in ("area", "iscrowd"):
                if key not in annotation:
                    raise UserError(f"{self.path}: {what} has no {key!r}, which the evaluation needs; add it")
        box = self._box(annotation, image, what)
        if crowd:
            self.num_crowds += 1
        elif box is None:
            self.dropped["whose box has no width or no height"] += 1
        elif not self.masks:
            self.builder.add(annotation["id"], self.labels[category_id], box)
        else:
            polygons, rle = self._segmentation(annotation.get("segmentation"), image, what)
            if polygons or rle:
                self.builder.add(annotation["id"], self.labels[category_id], box, polygons, rle)
            else:
                self.dropped["without a polygon of at least 3 points"] += 1

    def _flag(self, annotation: dict[str, Any], key: str, what: str) -> bool:
        value = annotation.get(key, 0)
        if value not in (0, 1):
            raise UserError(f"{self.path}: {what} has {key!r} {value!r}; it must be 0 or 1")
        return bool(value)

    def _box(self, annotation: dict[str, Any], image: ImageRecord, what: str) -> list[float] | None:
        """``xyxy``, or None for a box without width or height."""
        given = _field(annotation, "bbox", list, what, self.path)
        if len(given) != 4 or not all(_is_finite(number) for number in given):
            raise UserError(
                f"{self.path}: {what} has 'bbox' {given}; it must be 4 finite numbers x, y, width, height"
            )
        x, y, width, height = given
        if width < 0 or height < 0:
            raise UserError(
                f"{self.path}: {what} has 'bbox' {given} of negative size; it must be x, y, width, height"
            )
        if width == 0 or height == 0:
            return None
        if x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0:
            raise UserError(
                f"{self.path}: {what} has its box {given} outside the image of "
                f"{image.width}x{image.height} pixels; correct the box (x, y, width, height) or remove it"
            )
        return [x, y, x + width, y + height]

    def _segmentation(self, given: Any, image: ImageRecord, what: str) -> tuple[list[list[float]], bytes]:
        """Valid polygons, or the counts of a compressed RLE; one of the two, or neither, is empty."""
        if not given:
            raise UserError(f"{self.path}: {what} has no segmentation; add one, or set MODEL.MASK_ON False")
        if isinstance(given, dict):
            return [], self._rle(given, image, what)
        if not isinstance(given, list) or not all(isinstance(polygon, list) for polygon in given):
            raise UserError(
                f"{self.path}: {what} has a segmentation that is no list of polygons and no RLE; correct it"
            )
        for polygon in given:
            if not all(_is_finite(number) for number in polygon):
                raise UserError(f"{self.path}: {what} has a polygon that is not all finite numbers; mend it")
        return [polygon for polygon in given if len(polygon) % 2 == 0 and len(polygon) >= 6], b""

    def _rle(self, given: dict[str, Any], image: ImageRecord, what: str) -> bytes:
        size, counts = given.get("size"), given.get("counts")
        if size != [image.height, image.width]:
            raise UserError(
                f"{self.path}: {what} has an RLE of 'size' {size}, but the image's is "
                f"[{image.height}, {image.width}] (height, width); correct one of them"
            )
        if isinstance(counts, str) and _RLE_CHARACTERS.fullmatch(counts):
            return counts.encode("ascii")
        if isinstance(counts, list) and all(_is_integer(run) and run >= 0 for run in counts):
            if sum(counts) != image.height * image.width:
                raise UserError(
                    f"{self.path}: {what} has an RLE of {sum(counts)} pixels, but the image has "
                    f"{image.height * image.width}; encode the mask again"
                )
            return coco_mask.frPyObjects(given, image.height, image.width)["counts"]
        raise UserError(f"{self.path}: {what} has an RLE without valid 'counts'; encode the mask again")


def _is_finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
