"""Reading COCO's JSON with checks: whatever is wrong is named together with what to do about it."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_text
from .coco_rules import Rules, kind_of
from .faults import DataError
from .image_table import ImageRecord, ImageTable
from .object_table import ObjectTable, TableBuilder

logger = logging.getLogger(__name__)

LISTS = ("images", "annotations", "categories")
"""What a COCO file for instances holds."""


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
    images: ImageTable
    objects: ObjectTable
    num_crowds: int


def read_coco_json(
    path: Path, images: Path, *, masks: bool, evaluation: bool, outside: bool = False
) -> CocoContent:
    """Read and check an annotation file.

    Args:
        path: JSON in COCO's format for instances.
        images: folder to which its file names are relative.
        masks: objects must have a segmentation; it is ignored otherwise.
        evaluation: annotations must have what COCO's evaluation needs besides: ``area``, ``iscrowd`` and,
            with ``masks``, a segmentation of crowds and of empty boxes, too.
        outside: file names may lead out of ``images``.

    Raises:
        UserError: the file is not COCO, or something in it is wrong.
    """
    content = load_coco(path)
    rules = Rules(path, images, evaluation, outside)
    try:
        return _read(content, rules, masks)
    except DataError as error:
        raise DataError(f"{error} (gn-detect doctor lists all that is wrong)", error.kind) from error


def _read(content: dict[str, Any], rules: Rules, masks: bool) -> CocoContent:
    names = _categories(content["categories"], rules)
    records = _images(content["images"], rules)
    grouped = _group_by_image(content["annotations"], records, rules)
    labels = {category_id: label for label, category_id in enumerate(names)}
    reader = _AnnotationReader(rules, labels, masks)
    for record in records:
        reader.read(record, grouped.pop(record.id, ()))
    reader.warn()
    table = ImageTable(records)
    return CocoContent(list(names), list(names.values()), table, reader.builder.build(), reader.num_crowds)


def read_image_list(path: Path, folder: Path, outside: bool = False) -> list[Path]:
    """The images that a COCO JSON names, in its order; annotations are not needed.

    Args:
        path: JSON with ``images``.
        folder: to which its file names are relative.
        outside: they may lead out of it.

    Raises:
        UserError: the file is not COCO, lists no images, or a name leads out of the folder.
    """
    entries = load_coco(path, ("images",))["images"]
    if not entries:
        raise UserError(f"{path} lists no images; give a file with images")
    rules = Rules(path, folder, allow_outside=outside)
    return [rules.image_path(entry, f"image {i}") for i, entry in enumerate(entries)]


def load_coco(path: Path, lists: tuple[str, ...] = LISTS) -> dict[str, Any]:
    """The JSON's content, in which only the lists have been looked for.

    Raises:
        UserError: the file is missing, not JSON or not COCO.
    """
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"annotation file {path} is missing; correct its path") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not JSON ({error.msg}, {where}); give a COCO annotation file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}; give a COCO annotation file") from error
    if not isinstance(content, dict):
        hint = " (this looks like a result file)" if isinstance(content, list) else ""
        raise UserError(f"{path} is not COCO: it holds {kind_of(content)}{hint}; give a COCO annotation file")
    for key in lists:
        if not isinstance(content.get(key), list):
            found = f"{key!r} is {kind_of(content[key])}" if key in content else f"it has no {key!r}"
            needed = ", ".join(map(repr, lists))
            raise UserError(f"{path} is not COCO: {found}; it must hold the lists {needed}")
    return content


def _categories(entries: list[Any], rules: Rules) -> dict[int, str]:
    """Names by category id, ids ascending."""
    names: dict[int, str] = {}
    for i, entry in enumerate(entries):
        category_id, name = rules.category(entry, i)
        if category_id in names:
            raise rules.error(
                f"category id {category_id} occurs twice; give each category its own id",
                "duplicate-category-id",
            )
        names[category_id] = name
    if not names:
        raise DataError(f"{rules.path} lists no categories; add the classes of its annotations", "nothing")
    return dict(sorted(names.items()))


def _images(entries: list[Any], rules: Rules) -> list[ImageRecord]:
    records: dict[int, ImageRecord] = {}
    for i, entry in enumerate(entries):
        record = rules.image(entry, i)
        if record.id in records:
            raise rules.error(
                f"image id {record.id} occurs twice; give each image its own id", "duplicate-image-id"
            )
        records[record.id] = record
    if not records:
        raise DataError(f"{rules.path} lists no images; give a file with images", "nothing")
    return [records[image_id] for image_id in sorted(records)]


def ids_may_repeat(path: Path) -> bool:
    """COCO's own 2014 minival and valminusminival files repeat some annotation ids."""
    return "minival" in path.name


def _group_by_image(
    annotations: list[Any], records: list[ImageRecord], rules: Rules
) -> defaultdict[int, list[dict[str, Any]]]:
    """Annotations by image id; ids are checked."""
    known = {record.id for record in records}
    seen: set[int] = set()
    grouped: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    unique = not ids_may_repeat(rules.path)
    for i, annotation in enumerate(annotations):
        annotation_id, image_id = rules.ids(annotation, i)
        if unique and annotation_id in seen:
            raise rules.error(
                f"annotation id {annotation_id} occurs twice; give each its own id",
                "duplicate-annotation-id",
            )
        seen.add(annotation_id)
        if image_id not in known:
            raise rules.error(
                f"annotation {annotation_id} belongs to image {image_id}, which is not listed; "
                "add the image or remove the annotation",
                "dangling-image",
            )
        grouped[image_id].append(annotation)
    return grouped


class _AnnotationReader:
    """Checks the annotations of one image after the other and fills a table with the objects."""

    def __init__(self, rules: Rules, labels: dict[int, int], masks: bool) -> None:
        self.rules, self.labels, self.masks = rules, labels, masks
        self.builder = TableBuilder(masks)
        self.num_crowds = 0
        self.dropped: Counter[str] = Counter()

    def warn(self) -> None:
        """One line for each kind of annotation that was dropped."""
        for reason, count in self.dropped.items():
            logger.warning("%s: dropped %d annotation(s) %s", self.rules.path, count, reason)

    def read(self, image: ImageRecord, annotations: Any) -> None:
        """Add the objects of one image."""
        for annotation in annotations:
            self._read_one(image, annotation, f"annotation {annotation['id']} of image {image.id}")
        self.builder.end_image()

    def _read_one(self, image: ImageRecord, annotation: dict[str, Any], what: str) -> None:
        rules = self.rules
        label = self.labels[rules.category_id(annotation, self.labels, what)]
        crowd = rules.crowd(annotation, what)
        if rules.evaluation:
            rules.complete(annotation, what)
        box = rules.box(annotation, image, what)
        learned = not crowd and box is not None
        polygons: list[list[float]] = []
        rle = b""
        # The evaluation reads every mask, also those of crowds and of empty boxes: what it would refuse after
        # all of the training is refused here.
        if self.masks and (learned or rules.evaluation):
            polygons, rle = rules.segmentation(annotation.get("segmentation"), image, what)
        if crowd:
            self.num_crowds += 1
        elif box is None:
            self.dropped["whose box has no width or no height"] += 1
        elif self.masks and not polygons and not rle:
            self.dropped["without a polygon of at least 3 points"] += 1
        else:
            self.builder.add(annotation["id"], label, box, polygons, rle)
