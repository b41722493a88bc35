"""Read annotation files into canonical form."""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import open_file
from ..formats.recognise import describe_foreign, describe_foreign_content
from .canonical import CocoFile, Note, canonical
from .rules import Rules, kind_of

logger = logging.getLogger(__name__)

LISTS = ("images", "annotations", "categories")

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def log_notes(file: CocoFile) -> None:
    """Log a line for each kind of value that was read in another form than COCO's."""
    for note in file.notes:
        logger.info("%s: %s", file.path, note)


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
        raise UserError("empty-list", f"{path} lists no images; give a file with images")
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
            raise UserError("foreign-format", f"{path} is no COCO file: {foreign}") from error
        if not isinstance(error, json.JSONDecodeError):
            raise UserError(
                "not-json", f"cannot read {path} as JSON: {error}; give a COCO annotation file"
            ) from error
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(
            "not-json", f"{path} is not JSON ({error.msg}, {where}); give a COCO annotation file"
        ) from error
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
        raise UserError(
            "missing-annotations", f"annotation file {path} is missing; correct its path"
        ) from error
    except IsADirectoryError as error:
        raise UserError("foreign-format", f"{path} is no COCO file: {describe_foreign(path)}") from error
    except OSError as error:
        raise UserError(
            "cannot-read", f"cannot read {path}: {error.strerror}; give a COCO annotation file"
        ) from error


def check_lists(content: Any, lists: tuple[str, ...], path: str | Path) -> None:
    """Refuse content of a JSON file that is no object with the ``lists`` (UserError)."""
    foreign = describe_foreign_content(content)
    fits = isinstance(content, Mapping) and all(isinstance(content.get(key), list) for key in lists)
    if foreign and not (fits and "annotations" not in lists):
        raise UserError("foreign-format", f"{path} is no COCO file: {foreign}")
    if not isinstance(content, Mapping):
        raise UserError(
            "not-coco", f"{path} is not COCO: it holds {kind_of(content)}; give a COCO annotation file"
        )
    for key in lists:
        if not isinstance(content.get(key), list):
            found = f"{key!r} is {kind_of(content[key])}" if key in content else f"it has no {key!r}"
            needed = ", ".join(map(repr, lists))
            raise UserError("not-coco", f"{path} is not COCO: {found}; it must hold the lists {needed}")
