"""Bring COCO files, as tools write them, into the one form that :mod:`.rules` asks for.

A value with one obvious meaning gets COCO's form: ``"12"`` and ``12.0`` become 12, a flat list becomes a
polygon. Each such change is counted in a :class:`Note`. A value without an obvious meaning stays as it is,
and the rules refuse it.

From the top of a file to its values: :func:`canonical` reads the three lists, ``_Reader.image``,
``.category`` and ``.annotation`` an entry of each, :func:`as_box` and :func:`as_mask` the values that are
lists. Each function adds the kinds of its changes (keys of :data:`NOTES`) to ``kinds``.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .faults import DataError
from .numbers import NUMBERS, as_integer, as_number, is_integer
from .rules import Rules
from .tables import ImageRecord

NOTES = {
    "byte-order-mark": "the file begins with a byte order mark, which is left out",
    "text-number": "numbers that are text are read as numbers",
    "whole-float": "integers that are written as 1.0 are read as 1",
    "text-id": "ids that are no numbers are numbered in order of appearance",
    "flag": "flags that are true, false or text are read as 1 and 0",
    "mask-form": "segmentations that are a flat list, pairs, nested deeper or text are read as polygons",
    "text-list": "lists that are text are read as lists",
    "number-name": "category names that are numbers are read as text",
    "no-iscrowd": "a missing 'iscrowd' is 0",
    "no-area": "a missing 'area' is the mask's, or else the box's",
    "no-bbox": "a missing 'bbox' is the mask's",
}

_LISTS = (list, tuple, np.ndarray)  # callers of canonical() may give tuples and arrays
_SEPARATOR = re.compile(r"[\s,;]+")
_DEEPEST = 4  # lists within lists of a segmentation
_NOTHING = object()  # in the place of a value: the entry does not have the key

Kinds = set[str]


@dataclass
class Note:
    """A kind of change (a key of :data:`NOTES`), the first entry that has it, and the number of entries."""

    kind: str
    first: str
    count: int = 1

    def __str__(self) -> str:
        others = f" and {self.count - 1} more" if self.count > 1 else ""
        return f"{NOTES[self.kind]} ({self.first}{others})"


@dataclass(frozen=True)
class CocoFile:
    """A COCO file in canonical form.

    Attributes:
        path: of the file, for messages.
        content: the JSON's, its lists ``images``, ``annotations`` and ``categories`` in COCO's form.
        notes: one for each kind of change.
        image_ids, category_ids: the file's own id by id, where the two differ.
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
        self.notes: dict[str, Note] = {}
        self.numbers: dict[str, dict[Any, int]] = {}  # by list: the number of each id that is no integer
        self.own_ids: dict[str, dict[int, Any]] = {"images": {}, "categories": {}, "annotations": {}}
        self.images: dict[int, dict[str, Any]] = {}

    def read_list(self, key: str, entries: list[Any]) -> list[Any]:
        """Return the entries of a list; the same list where nothing changes."""
        noun, read = {
            "images": ("image", self.image),
            "categories": ("category", self.category),
            "annotations": ("annotation", self.annotation),
        }[key]
        self.numbers[key] = _number_ids(entries)
        found: list[Any] = []
        for position, entry in enumerate(entries):
            kinds: Kinds = set()
            new = _with(entry, read(entry, kinds)) if isinstance(entry, dict) else entry
            if new is not entry and new.get("id") != entry.get("id"):
                self.own_ids[key][new["id"]] = entry["id"]
            for kind in kinds:
                if kind in self.notes:
                    self.notes[kind].count += 1
                else:
                    self.notes[kind] = Note(kind, f"{noun} {entry.get('id', position)!s:.60}")
            found.append(new)
        if key == "images":
            self.images = {e["id"]: e for e in found if isinstance(e, dict) and is_integer(e.get("id"))}
        return entries if all(map(operator.is_, found, entries)) else found

    # Each of these returns the values of an entry, _NOTHING for a key that it does not have.

    def image(self, entry: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
        sides = {key: _integer(entry.get(key, _NOTHING), kinds) for key in ("width", "height")}
        return {"id": self.id_of(entry, "id", "images", kinds), **sides}

    def category(self, entry: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
        name = entry.get("name", _NOTHING)
        if type(name) in NUMBERS:
            kinds.add("number-name")
            whole = as_integer(name)
            name = str(name if whole is None else whole)
        return {"id": self.id_of(entry, "id", "categories", kinds), "name": name}

    def annotation(self, entry: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
        get = entry.get
        values = {
            "id": self.id_of(entry, "id", "annotations", kinds),
            "image_id": self.id_of(entry, "image_id", "images", kinds),
            "category_id": self.id_of(entry, "category_id", "categories", kinds),
            "iscrowd": _flag(get("iscrowd", _NOTHING), kinds),
            "ignore": _flag(get("ignore", _NOTHING), kinds),
            "area": _area(get("area", _NOTHING), kinds),
            "segmentation": as_mask(get("segmentation", _NOTHING), kinds),
            "bbox": as_box(get("bbox", _NOTHING), kinds),
        }
        if values["iscrowd"] is _NOTHING:
            values["iscrowd"] = 0
            kinds.add("no-iscrowd")
        box = values["bbox"]
        if _is_blank(box) or (isinstance(box, list) and not box):
            values["bbox"] = self.box_of_mask(values, kinds) or box
        return values

    def box_of_mask(self, values: dict[str, Any], kinds: Kinds) -> list[float] | None:
        image, mask = self.images.get(values["image_id"]), values["segmentation"]
        if image is None or mask is _NOTHING or not mask:
            return None
        try:
            record = ImageRecord(0, "", *self.rules.size(image, ""))
            found = self.rules.segmentation(mask, record, "")
        except DataError:
            return None  # whoever asks the rules again names the entry
        if not found:
            return None
        x0, y0, x1, y1 = found.box
        if x1 <= x0 or y1 <= y0:
            return None
        kinds.add("no-bbox")
        return [x0, y0, x1 - x0, y1 - y0]

    def id_of(self, entry: dict[str, Any], key: str, owner: str, kinds: Kinds) -> Any:
        """Return the integer that an id is, or its number in the list ``owner``; else the id itself."""
        given = entry.get(key, _NOTHING)
        number = as_integer(given)
        if is_integer(number):
            return _integer(given, kinds)
        known = (
            self.numbers.get(owner, {}).get(given if number is None else number) if _is_name(given) else None
        )
        if known is None:
            return given
        kinds.add("text-id")
        return known


def _with(entry: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with these values; the same entry where they are its own."""
    if all(value is entry.get(key, _NOTHING) for key, value in values.items()):
        return entry
    return {key: value for key, value in (entry | values).items() if value is not _NOTHING}


def _is_name(value: Any) -> bool:
    """Return whether a value can be an id that gets a number: text, or an integer of any length."""
    return isinstance(value, str) or type(value) is int


def _number_ids(entries: list[Any]) -> dict[Any, int]:
    """Number the ids that are no integers of 64 bits, in order of appearance, after the largest integer."""
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


def _is_blank(value: Any) -> bool:
    """Return whether there is no value, or what tables write for an empty cell: null, nan, blank text."""
    return (
        value is _NOTHING
        or value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def _integer(given: Any, kinds: Kinds) -> Any:
    """Return the integer that a value is; the value itself if it is none."""
    if type(given) is int or (number := as_integer(given)) is None:
        return given
    kinds.add("text-number" if isinstance(given, str) else "whole-float")
    return number


def _flag(given: Any, kinds: Kinds) -> Any:
    if type(given) is int:
        return given
    if _is_blank(given):
        return _NOTHING
    flag = as_integer(given)
    if isinstance(given, bool | np.bool_):
        flag = int(given)
    elif isinstance(given, str) and flag is None:
        flag = {"false": 0, "true": 1}.get(given.strip().lower())
    if flag is None:
        return given
    kinds.add("flag")
    return flag


def _area(given: Any, kinds: Kinds) -> Any:
    if _is_blank(given):
        kinds.add("no-area")
        return _NOTHING
    if type(given) in NUMBERS or (number := as_number(given)) is None:
        return given
    kinds.add("text-number")
    return number


def as_box(given: Any, kinds: Kinds) -> Any:
    """Return a ``bbox`` as a list of numbers; itself where it has no obvious reading.

    Args:
        given: a list of numbers, or of numbers as text, or all of it as text.
        kinds: keys of :data:`NOTES` are added.
    """
    if _is_blank(given):
        return given if given is _NOTHING else None
    found = _parsed(given) if isinstance(given, str) else given
    numbers = _numbers(found, kinds) if isinstance(found, _LISTS) else None
    if numbers is None:
        return given
    if found is not given and numbers:
        kinds.add("text-list")
    return numbers


def as_mask(given: Any, kinds: Kinds) -> Any:
    """Return a ``segmentation`` as a list of flat polygons or as an RLE; itself where it has no obvious
    reading.

    Args:
        given: polygons, flat or in pairs; or an RLE. Numbers, lists and all of it may be text.
        kinds: keys of :data:`NOTES` are added.
    """
    if _is_polygons(given):
        return given
    if _is_blank(given):
        return given if given is _NOTHING else None
    found = _parsed(given) if isinstance(given, str) else given
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict):
        found = found[0]
    own: Kinds = set() if found is given else {"mask-form"}
    if isinstance(found, dict):
        mask: Any = _rle(found, own)
    else:
        mask = _outlines(found, own, 0) if isinstance(found, _LISTS) else None
    if mask is None:
        return given
    kinds |= own
    return mask


def _is_polygons(given: Any) -> bool:
    """Return whether these are lists of numbers, none a pair, which may be a point of an outline."""
    if type(given) is not list:
        return False
    for polygon in given:
        if type(polygon) is not list or len(polygon) == 2 or not NUMBERS.issuperset(map(type, polygon)):
            return False
    return True


def _rle(given: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for key in ("size", "counts"):
        value = given.get(key)
        # Compressed counts have neither a comma nor a space.
        if isinstance(value, str) and (key == "size" or "," in value or " " in value):
            parsed = _parsed(value)
            if parsed:
                kinds.add("text-list")
                value = parsed
        if isinstance(value, bytes):  # pycocotools' own counts
            changes[key] = value.decode("latin-1")
        elif isinstance(value, _LISTS) and not (value is given[key] and {int}.issuperset(map(type, value))):
            if all(as_integer(number) is not None for number in value):
                changes[key] = [_integer(number, kinds) for number in value]
    return given | changes if changes else given


def _numbers(given: Any, kinds: Kinds) -> list[float] | None:
    """Return a list of numbers; None where a value is none."""
    if type(given) is list and NUMBERS.issuperset(map(type, given)):
        return given
    numbers: list[float] = []
    for value in given:
        number = as_number(value)
        if number is None:
            return None
        numbers.append(number)
    if any(isinstance(value, str) for value in given):
        kinds.add("text-number")
    return numbers


def _outlines(given: Any, kinds: Kinds, depth: int) -> list[list[float]] | None:
    """Return the polygons of a list of numbers, of pairs, of polygons or of such lists; None for others."""
    if isinstance(given, str):
        given = _parsed(given)
        kinds.add("mask-form")
    if not isinstance(given, _LISTS) or depth > _DEEPEST:
        return None
    if depth == 0 and not len(given):
        return []
    numbers = _numbers(given, kinds)
    if numbers is not None:
        # A box or a point among polygons is too short for one, and left out; alone it may mean anything.
        if depth == 0 and (len(numbers) < 6 or len(numbers) % 2):
            return None
        if depth != 1:
            kinds.add("mask-form")
        return [numbers]
    if len(given) >= 3 and all(isinstance(pair, _LISTS) and len(pair) == 2 for pair in given):
        numbers = _numbers([number for pair in given for number in pair], kinds)
        if numbers is not None:
            kinds.add("mask-form")
            return [numbers]
    found: list[list[float]] = []
    for part in given:
        polygons = _outlines(part, kinds, depth + 1)
        if polygons is None:
            return None
        found += polygons
    return found


def _parsed(text: str) -> Any:
    """Return the list or object that a text holds as JSON, or the numbers that it lists; None for others.

    Python's tuples are lists, too.
    """
    text = text.strip()
    if text[:1] in ("[", "("):
        text = text.replace("(", "[").replace(")", "]")
    if text[:1] in ("[", "{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, list | dict) else None
    numbers = [as_number(part) for part in _SEPARATOR.split(text) if part]
    return numbers if numbers and None not in numbers else None
