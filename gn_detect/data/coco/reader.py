"""Reading COCO's JSON with checks: whatever is wrong is named together with what to do about it."""

from __future__ import annotations

import codecs
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import open_file
from ..formats.recognise import describe_foreign, describe_foreign_content
from .canonical import CocoFile, Note, canonical, has_masks
from .crowds import count_crowds
from .faults import DataError
from .file_names import missing_names
from .image_table import ImageRecord, ImageTable
from .rules import Rules, kind_of
from .tables import ObjectTable, TableBuilder

logger = logging.getLogger(__name__)

LISTS = ("images", "annotations", "categories")
"""What a COCO file for instances holds."""

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class CocoContent:
    """What was read.

    Attributes:
        category_ids, class_names: in the order of contiguous labels: ids ascending.
        images: ordered by id.
        objects: rows for ``images``, crowds left out.
        num_crowds: annotations that are crowds.
        file: as it was read.
    """

    category_ids: list[int]
    class_names: list[str]
    images: ImageTable
    objects: ObjectTable
    num_crowds: int
    file: CocoFile


def read_coco_json(
    path: Path, images: Path, *, masks: bool | None, evaluation: bool, outside: bool = False
) -> CocoContent:
    """Read and check an annotation file.

    Args:
        path: JSON in COCO's format for instances.
        images: folder to which its file names are relative.
        masks: objects must have a segmentation; it is ignored otherwise. None: if some object has one.
        evaluation: check what only the evaluation reads, too: areas and, with ``masks``, the segmentations of
            crowds and of empty boxes.
        outside: file names may lead out of ``images``.

    Raises:
        UserError: the file is not COCO, or something in it is wrong.
    """
    file = read_canonical(path)
    tell_notes(file)
    if not evaluation:
        _tell_crowds(file)
    rules = Rules(path, images, evaluation, outside)
    try:
        return _read(file, rules, has_masks(file.content) if masks is None else masks)
    except DataError as error:
        hint = "" if "gn-detect doctor" in str(error) else " (gn-detect doctor lists all that is wrong)"
        raise DataError(f"{error}{hint}", error.kind) from error


def tell_notes(file: CocoFile) -> None:
    """Log what was read in another form than COCO's: a line for each kind, once for each file."""
    for note in file.notes:
        _tell(f"{file.path}: {note}")


def _tell_crowds(file: CocoFile) -> None:
    crowds = count_crowds(file.content)
    if crowds.crowds:
        _tell(f"{file.path}: {crowds}", logging.WARNING if crowds.dubious else logging.INFO)


@cache
def _tell(line: str, level: int = logging.INFO) -> None:
    logger.log(level, "%s", line)


def _read(file: CocoFile, rules: Rules, masks: bool) -> CocoContent:
    content = file.content
    rules.whole(content)
    names = read_categories(content["categories"], rules)
    records = _images(content["images"], rules)
    grouped = _group_by_image(content["annotations"], records, rules)
    labels = {category_id: label for label, category_id in enumerate(names)}
    reader = _AnnotationReader(rules, labels, masks)
    for record in records:
        reader.read(record, grouped.pop(record.id, ()))
    reader.warn()
    table = ImageTable(records)
    objects = reader.builder.build()
    return CocoContent(list(names), list(names.values()), table, objects, reader.num_crowds, file)


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
    """Return the content that :func:`read_canonical` reads."""
    return read_canonical(path, lists).content


def read_canonical(path: Path, lists: tuple[str, ...] = LISTS) -> CocoFile:
    """Read a COCO file into canonical form; the entries are not checked.

    Every reader of annotations begins here.

    Raises:
        UserError: the file is missing, not JSON or not COCO.
    """
    text = _read_bytes(path)
    try:
        content = json.loads(text)  # from bytes, it finds out the encoding, and leaves out a byte order mark
    except (ValueError, RecursionError) as error:
        told = describe_foreign(path)
        if told:
            raise UserError(f"{path} is no COCO file: {told}") from error
        if not isinstance(error, json.JSONDecodeError):
            raise UserError(f"cannot read {path} as JSON: {error}; give a COCO annotation file") from error
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path} is not JSON ({error.msg}, {where}); give a COCO annotation file") from error
    check_lists(content, lists, path)
    file = canonical(content, path)
    if text.startswith(_MARKS):
        file.notes.insert(0, Note("byte-order-mark", "its first bytes"))
    return file


def _read_bytes(path: Path) -> bytes:
    try:
        with open_file(path) as file:
            return file.read()
    except FileNotFoundError as error:
        raise UserError(f"annotation file {path} is missing; correct its path") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is no COCO file: {describe_foreign(path)}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a COCO annotation file") from error


def check_lists(content: Any, lists: tuple[str, ...], path: str | Path) -> None:
    """Refuse content of a JSON file that cannot be COCO at all.

    Raises:
        UserError: it is no object with the lists.
    """
    told = describe_foreign_content(content)
    fits = isinstance(content, Mapping) and all(isinstance(content.get(key), list) for key in lists)
    if told and not (fits and "annotations" not in lists):
        raise UserError(f"{path} is no COCO file: {told}")
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is not COCO: it holds {kind_of(content)}; give a COCO annotation file")
    for key in lists:
        if not isinstance(content.get(key), list):
            found = f"{key!r} is {kind_of(content[key])}" if key in content else f"it has no {key!r}"
            needed = ", ".join(map(repr, lists))
            raise UserError(f"{path} is not COCO: {found}; it must hold the lists {needed}")


def read_categories(entries: list[Any], rules: Rules) -> dict[int, str]:
    """Names by category id, ids ascending.

    Raises:
        DataError: an entry is wrong, an id occurs twice, or there is none.
    """
    names: dict[int, str] = {}
    for i, entry in enumerate(entries):
        category_id, name = rules.category(entry, i)
        if category_id in names:
            raise rules.repeated("category", category_id)
        names[category_id] = name
    if not names:
        raise DataError(f"{rules.path} lists no categories; add the classes of its annotations", "nothing")
    return dict(sorted(names.items()))


def _images(entries: list[Any], rules: Rules) -> list[ImageRecord]:
    records: dict[int, ImageRecord] = {}
    for i, entry in enumerate(entries):
        try:
            record = rules.image(entry, i)
        except DataError as error:
            if error.kind != "image-outside":
                raise
            near = missing_names(rules.folder, [entry["file_name"]], outside=False)[entry["file_name"]]
            there = f"; {near} is there: gn-detect doctor --fix OUT.json renames it" if near else ""
            raise DataError(f"{error}{there}", error.kind) from error
        if record.id in records:
            raise rules.repeated("image", record.id)
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
            raise rules.repeated("annotation", annotation_id)
        seen.add(annotation_id)
        if image_id not in known:
            raise rules.unlisted_image(annotation_id, image_id)
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
            rules.area(annotation, what)
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
