"""Read annotation files: JSON to canonical form, and on to the arrays that training needs."""

from __future__ import annotations

import codecs
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import open_file
from ..datasets import DatasetSource
from ..formats.recognise import describe_foreign, describe_foreign_content
from .canonical import CocoFile, Note, canonical, has_masks
from .crowds import count_crowds
from .faults import DataError
from .file_names import missing_names
from .rules import Rules, kind_of, stop
from .tables import ImageTable, ObjectRow, ObjectTable, build_table

logger = logging.getLogger(__name__)

LISTS = ("images", "annotations", "categories")

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class CocoContent:
    """An annotation file as training uses it.

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
    source: DatasetSource, *, masks: bool | None, evaluation: bool = False, quiet: bool = False
) -> CocoContent:
    """Read and check an annotation file.

    Args:
        source: where the files are.
        masks: objects must have a segmentation; it is ignored otherwise. None: if some object has one.
        evaluation: check what only the evaluation reads, too: areas and, with ``masks``, the segmentations of
            crowds and of empty boxes.
        quiet: do not log notes and crowds.

    Raises:
        UserError: the file is not COCO, or something in it is wrong.
    """
    file = read_canonical(source.annotations)
    if not quiet:
        log_notes(file)
        if not evaluation:
            _log_crowds(file)
    rules = Rules(source.annotations, source.images, evaluation, source.allow_outside)
    try:
        return _read(file, rules, has_masks(file.content) if masks is None else masks)
    except DataError as error:
        hint = "" if "gn-detect doctor" in str(error) else " (gn-detect doctor lists all that is wrong)"
        raise DataError(f"{error}{hint}", error.kind) from error


def log_notes(file: CocoFile) -> None:
    """Log a line for each kind of value that was read in another form than COCO's."""
    for note in file.notes:
        logger.info("%s: %s", file.path, note)


def _log_crowds(file: CocoFile) -> None:
    crowds = count_crowds(file.content)
    if crowds.crowds:
        logger.log(logging.WARNING if crowds.dubious else logging.INFO, "%s: %s", file.path, crowds)


def _read(file: CocoFile, rules: Rules, masks: bool) -> CocoContent:
    content = file.content
    rules.whole(content)
    names = dict(sorted(rules.categories(content["categories"]).items()))
    images = rules.images(content["images"], partial(_stop_with_name, rules.folder))
    labels = {category_id: label for label, category_id in enumerate(names)}
    crowds, dropped = 0, Counter[str]()
    objects: dict[int, list[ObjectRow]] = {image_id: [] for image_id in images}
    for found in rules.annotations(content["annotations"], images, labels):
        mask = None
        # The evaluation reads every mask, also those of crowds and of empty boxes: what it would refuse after
        # all of the training is refused here.
        if masks and found.image and (rules.evaluation or not (found.crowd or found.box is None)):
            mask = rules.segmentation(found.entry.get("segmentation"), found.image, found.what)
        if found.crowd:
            crowds += 1
        elif found.box is None or found.category_id is None:
            dropped["whose box has no width or no height"] += 1
        elif masks and not mask:
            dropped["without a polygon of at least 3 points"] += 1
        else:
            parts = (mask.polygons, mask.rle) if mask else ()
            objects[found.image_id].append(ObjectRow(found.id, labels[found.category_id], found.box, *parts))
    for reason, count in dropped.items():
        logger.warning("%s: dropped %d annotation(s) %s", rules.path, count, reason)
    table = ImageTable(record for _, record in sorted(images.items()) if record is not None)
    rows = build_table([objects[image_id] for image_id in sorted(images)], masks)
    return CocoContent(list(names), list(names.values()), table, rows, crowds, file)


def _stop_with_name(folder: Path, error: DataError, about: Mapping[str, Any]) -> None:
    """Raise an error; name the file in the images folder that a name outside of it obviously means."""
    name = str(about.get("file_name"))
    if error.kind == "image-outside" and (near := missing_names(folder, [name], outside=False)[name]):
        message = f"{error}; {near} is there: gn-detect doctor --fix OUT.json renames it"
        raise DataError(message, error.kind) from error
    stop(error, about)


def read_image_list(path: Path, folder: Path, outside: bool = False) -> list[Path]:
    """Return the images that a COCO JSON names, in its order; annotations are not needed.

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
        if foreign := describe_foreign(path):
            raise UserError(f"{path} is no COCO file: {foreign}") from error
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
    foreign = describe_foreign_content(content)
    fits = isinstance(content, Mapping) and all(isinstance(content.get(key), list) for key in lists)
    if foreign and not (fits and "annotations" not in lists):
        raise UserError(f"{path} is no COCO file: {foreign}")
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is not COCO: it holds {kind_of(content)}; give a COCO annotation file")
    for key in lists:
        if not isinstance(content.get(key), list):
            found = f"{key!r} is {kind_of(content[key])}" if key in content else f"it has no {key!r}"
            needed = ", ".join(map(repr, lists))
            raise UserError(f"{path} is not COCO: {found}; it must hold the lists {needed}")
