"""Bring COCO files, as tools write them, into the one form that :mod:`.rules` asks for.

A value with one obvious meaning gets COCO's form: ``"12"`` and ``12.0`` become 12, a flat list becomes a
polygon. Each such change is counted in a :class:`Note`. A value without an obvious meaning stays as it is,
and the rules refuse it.

:func:`canonical` reads the three lists of a file, images first. ``_Reader`` reads their entries, and
:mod:`.values` reads the values. Two steps need other entries, too: ids that are text get numbers, and a
missing box comes from the mask, whose image gives its size.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .faults import DataError
from .rules import Rules
from .tables import ImageRecord
from .values import (
    NOTHING,
    NUMBERS,
    Kinds,
    as_integer,
    is_blank,
    is_integer,
    read_area,
    read_box,
    read_flag,
    read_integer,
    read_mask,
)

NOTES = {
    "byte-order-mark": "the file begins with a byte order mark, which is left out",
    "text-number": "numbers that are text are read as numbers",
    "whole-float": "integers that are written as 1.0 are read as 1",
    "text-id": "ids that are no numbers are numbered in order of appearance",
    "flag": "flags that are true, false or text are read as 1 and 0",
    "mask-form": "segmentations that are a flat list, pairs, nested deeper or text are read as polygons",
    "text-list": "lists that are text are read as lists",
    "named-numbers": "boxes and points with named coordinates are read as lists",
    "by-name": "an image or a category that is given by its name is read as its id",
    "number-name": "category names that are numbers are read as text",
    "no-iscrowd": "a missing 'iscrowd' is 0",
    "no-area": "a missing 'area' is the mask's, or else the box's",
    "no-bbox": "a missing 'bbox' is the mask's",
}


@dataclass
class Note:
    """Something that a reader changed or left out: key of :data:`NOTES` or text, first case, and number."""

    kind: str
    first: str
    count: int = 1

    def __str__(self) -> str:
        others = f" and {self.count - 1} more" if self.count > 1 else ""
        return f"{NOTES.get(self.kind, self.kind)} ({self.first}{others})"


class Notes(dict[str, Note]):
    """Notes by their kind."""

    def add(self, kind: str, first: str) -> None:
        """Count a case; ``first`` names it, and is kept where it is the first one."""
        if kind in self:
            self[kind].count += 1
        else:
            self[kind] = Note(kind, first)


@dataclass(frozen=True)
class CocoFile:
    """A COCO file in canonical form.

    Attributes:
        path: of the file, for messages.
        content: the file's content, with the lists ``images``, ``annotations`` and ``categories`` in COCO's
            form.
        notes: one for each kind of change.
        image_ids, category_ids: canonical id -> id as the file spells it, where the two differ.
    """

    path: Path
    content: dict[str, Any]
    notes: list[Note] = field(default_factory=list)
    image_ids: dict[int, Any] = field(default_factory=dict)
    category_ids: dict[int, Any] = field(default_factory=dict)


def canonical(source: Mapping[str, Any], path: Path) -> CocoFile:
    """Bring a COCO file's content into canonical form.

    Args:
        source: the JSON's content; it is not changed.
        path: of the file, for messages.
    """
    reader, content = _Reader(path), dict(source)
    for key in ("images", "categories", "annotations"):
        if isinstance(source.get(key), list):
            content[key] = reader.read_list(key, source[key])
    notes = [reader.notes[kind] for kind in NOTES if kind in reader.notes]
    return CocoFile(path, content, notes, reader.own_ids["images"], reader.own_ids["categories"])


def has_masks(content: Mapping[str, Any]) -> bool:
    """Return whether some object of a file in canonical form has a mask.

    Crowds do not count: a dataset of boxes may have RLE crowds, and training learns nothing from them.
    """
    entries = (entry for entry in content["annotations"] if isinstance(entry, dict))
    return any(has_mask(entry) for entry in entries if not entry.get("iscrowd"))


def has_mask(entry: Mapping[str, Any]) -> bool:
    """Return whether an annotation has a segmentation with something in it."""
    mask = entry.get("segmentation")
    return any(mask) if isinstance(mask, list) else bool(mask)  # [[]] is a polygon without a corner


class _Reader:
    """Reads the entries of one file, images and categories before annotations."""

    def __init__(self, path: Path) -> None:
        self.rules = Rules(path)
        self.notes = Notes()
        self.numbers: dict[str, dict[Any, int]] = {}  # by list: the number of each id that is no integer
        self.own_ids: dict[str, dict[int, Any]] = {"images": {}, "categories": {}, "annotations": {}}
        self.images: dict[int, dict[str, Any]] = {}
        self.names: dict[str, dict[str, int]] = {}  # by list: the id of each name that is there once

    def read_list(self, key: str, entries: list[Any]) -> list[Any]:
        """Return the entries of a list; the same list where nothing changes."""
        noun, read = {
            "images": ("image", self.read_image),
            "categories": ("category", self.read_category),
            "annotations": ("annotation", self.read_annotation),
        }[key]
        self.numbers[key] = _number_ids(entries)
        found: list[Any] = []
        for position, entry in enumerate(entries):
            kinds: Kinds = set()
            new = _with(entry, read(entry, kinds)) if isinstance(entry, dict) else entry
            if new is not entry and new.get("id") != entry.get("id"):
                self.own_ids[key][new["id"]] = entry["id"]
            for kind in kinds:
                self.notes.add(kind, f"{noun} {entry.get('id', position)!s:.60}")
            found.append(new)
        name = {"images": "file_name", "categories": "name"}.get(key)
        if name:
            self.names[key] = _ids_by_name(found, name)
        if key == "images":
            self.images = {e["id"]: e for e in found if isinstance(e, dict) and is_integer(e.get("id"))}
        return entries if all(map(operator.is_, found, entries)) else found

    # Each of these returns the values of an entry, NOTHING for a key that it does not have.

    def read_image(self, entry: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
        sides = {key: read_integer(entry.get(key, NOTHING), kinds) for key in ("width", "height")}
        return {"id": self.id_of(entry, "id", "images", kinds), **sides}

    def read_category(self, entry: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
        name = entry.get("name", NOTHING)
        if type(name) in NUMBERS:
            kinds.add("number-name")
            whole = as_integer(name)
            name = str(name if whole is None else whole)
        return {"id": self.id_of(entry, "id", "categories", kinds), "name": name}

    def read_annotation(self, entry: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
        get = entry.get
        values = {
            "id": self.id_of(entry, "id", "annotations", kinds),
            "image_id": self.id_of(entry, "image_id", "images", kinds),
            "category_id": self.id_of(entry, "category_id", "categories", kinds),
            "iscrowd": read_flag(get("iscrowd", NOTHING), kinds),
            "ignore": read_flag(get("ignore", NOTHING), kinds),
            "area": read_area(get("area", NOTHING), kinds),
            "segmentation": read_mask(get("segmentation", NOTHING), kinds),
            "bbox": read_box(get("bbox", NOTHING), kinds),
        }
        if values["iscrowd"] is NOTHING:
            values["iscrowd"] = 0
            kinds.add("no-iscrowd")
        box = values["bbox"]
        if is_blank(box) or (isinstance(box, list) and not box):
            values["bbox"] = self.box_of_mask(values, kinds) or box
        return values

    def box_of_mask(self, values: dict[str, Any], kinds: Kinds) -> list[float] | None:
        image_id, mask = values["image_id"], values["segmentation"]
        if not is_integer(image_id) or image_id not in self.images or mask is NOTHING or not mask:
            return None
        try:
            record = ImageRecord(0, "", *self.rules.size(self.images[image_id], ""))
            found = self.rules.segmentation(mask, record, "")
        except DataError:
            return None  # the check of the annotation reports the fault
        x0, y0, x1, y1 = found.box if found else (0, 0, 0, 0)
        if x1 <= x0 or y1 <= y0:
            return None
        kinds.add("no-bbox")
        return [x0, y0, x1 - x0, y1 - y0]

    def id_of(self, entry: dict[str, Any], key: str, owner: str, kinds: Kinds) -> Any:
        """Return the integer that an id is, or its number in the list ``owner``; else the id itself."""
        given = entry.get(key, NOTHING)
        number = as_integer(given)
        if is_integer(number):
            return read_integer(given, kinds)
        name = given if number is None else number
        numbers = self.numbers.get(owner, {})
        if _is_name(given) and name in numbers:
            kinds.add("text-id")
            return numbers[name]
        if key != "id" and isinstance(given, str) and given in self.names.get(owner, {}):
            kinds.add("by-name")
            return self.names[owner][given]
        return given


def _with(entry: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with these values; the same entry where they are its own."""
    if all(value is entry.get(key, NOTHING) for key, value in values.items()):
        return entry
    return {key: value for key, value in (entry | values).items() if value is not NOTHING}


def _is_name(value: Any) -> bool:
    """Return whether a value can be an id that gets a number: text, or an integer of any length."""
    return isinstance(value, str) or type(value) is int


def _ids_by_name(entries: list[Any], key: str) -> dict[str, int]:
    """Return the id of each name that exactly one entry has."""
    named = [
        e for e in entries if isinstance(e, dict) and isinstance(e.get(key), str) and is_integer(e.get("id"))
    ]
    counts = Counter(entry[key] for entry in named)
    return {entry[key]: entry["id"] for entry in named if counts[entry[key]] == 1}


def _number_ids(entries: list[Any]) -> dict[Any, int]:
    """Assign numbers to ids that are not integers of 64 bits, by appearance, after the largest integer."""
    ids: list[Any] = [entry.get("id") for entry in entries if isinstance(entry, dict)]
    if {int}.issuperset(map(type, ids)) and all(map(is_integer, [min(ids, default=0), max(ids, default=0)])):
        return {}
    integers = [as_integer(value) for value in ids]
    free = max([0, *(value for value in integers if is_integer(value))])
    numbers: dict[Any, int] = {}
    for value, integer in zip(ids, integers, strict=True):
        key = value if integer is None else integer
        if _is_name(value) and not is_integer(integer) and key not in numbers:
            numbers[key] = free = free + 1
    return numbers
