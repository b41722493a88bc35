"""COCO files as tools write them, brought into the one form that :mod:`.coco_rules` asks for.

A value with one obvious reading is read and counted: ``"12"`` and ``12.0`` for 12, a flat list for a polygon.
A value without one stays as it is, and the rules refuse it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from ..transforms import polygon_bounds
from .faults import DataError
from .image_table import ImageRecord
from .rules import Rules, is_integer

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
"""What was read in another form than COCO's, by kind."""

_LISTS = (list, tuple, np.ndarray)
"""What callers of :func:`canonical` may give in place of a JSON list."""

_NUMBERS = frozenset((int, float))
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)
_SEPARATOR = re.compile(r"[\s,;]+")
_LONGEST_NUMBER = 100
"""Characters."""

_OPTIONAL = ("iscrowd", "ignore", "area", "segmentation", "bbox")
"""Keys of an annotation that may be missing."""

_DEEPEST = 4
"""Lists within lists of a segmentation."""


@dataclass
class Note:
    """One kind of reading.

    Attributes:
        kind: key of :data:`NOTES`.
        first: the first entry in which it occurred.
        count: of entries.
    """

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
        content: the JSON's; in its lists ``images``, ``annotations`` and ``categories`` all that has one
            obvious reading has COCO's form.
        notes: one for each kind of reading.
        image_ids, category_ids: ids as the file spells them by id, where they are no integers there.
    """

    path: Path
    content: dict[str, Any]
    notes: list[Note] = field(default_factory=list)
    image_ids: dict[int, Any] = field(default_factory=dict)
    category_ids: dict[int, Any] = field(default_factory=dict)


def as_number(value: Any) -> int | float | None:
    """Return the number that a JSON value is, or that its text spells; None for all else, also for a bool."""
    if type(value) in _NUMBERS:
        return value
    if isinstance(value, str) and len(value) <= _LONGEST_NUMBER and _NUMBER.fullmatch(value):
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    return as_number(value.item()) if isinstance(value, np.generic) else None


def as_integer(value: Any) -> int | None:
    """Return the integer that a JSON value is (1, 1.0, ``"1"``); None for anything else."""
    number = as_number(value)
    if isinstance(number, float):
        return int(number) if number.is_integer() else None
    return number


def as_mask(given: Any) -> tuple[Any, set[str]]:
    """Return a ``segmentation`` as a list of flat polygons or as an RLE.

    Returns:
        itself where it is one, or has no obvious reading; and the kinds of :data:`NOTES`.
    """
    if _is_plain_mask(given):
        return given, set()
    kinds: set[str] = set()
    found = given
    if isinstance(found, str) and found:
        found = _parsed(found)
        kinds.add("mask-form")
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict):
        found = found[0]
        kinds.add("mask-form")
    if isinstance(found, dict):
        return _as_rle(found, kinds), kinds
    if isinstance(found, _LISTS):
        polygons = _outlines(found, kinds, 0) if len(found) else []
        if polygons is not None:
            return polygons, kinds
    return given, set()


def as_box(given: Any) -> tuple[Any, set[str]]:
    """Return a ``bbox`` as a list of numbers, as :func:`as_mask` does."""
    if type(given) is list and _NUMBERS.issuperset(map(type, given)):
        return given, set()
    kinds: set[str] = set()
    found = given
    if isinstance(found, str):
        found = _parsed(found)
        kinds.add("text-list")
    if isinstance(found, _LISTS):
        numbers = _numbers(found, kinds)
        if numbers is not None:
            return numbers, kinds
    return given, set()


def canonical(source: Mapping[str, Any], path: Path) -> CocoFile:
    """Bring a COCO file's content into canonical form.

    Args:
        source: the JSON's content, which is left as it is.
        path: of the file, for messages.
    """
    return _Reader(path).read(source)


def has_masks(content: Mapping[str, Any]) -> bool:
    """Return whether some object of a file in canonical form has a mask; there are boxes alone otherwise.

    Crowds do not count: a dataset of boxes may have RLE crowds, and training learns nothing from them.
    """
    entries = (entry for entry in content["annotations"] if isinstance(entry, dict))
    return any(has_mask(entry) for entry in entries if not entry.get("iscrowd"))


def has_mask(entry: Mapping[str, Any]) -> bool:
    """Return whether an annotation has a segmentation with something in it."""
    mask = entry.get("segmentation")
    return any(mask) if isinstance(mask, list) else bool(mask)  # [[]] is a polygon without a corner


class _Reader:
    def __init__(self, path: Path) -> None:
        self.rules = Rules(path)
        self.notes: dict[str, Note] = {}
        self.numbered: dict[str, dict[Any, int]] = {}
        """For each list the numbers of ids that are no integers of 64 bits."""

    def read(self, source: Mapping[str, Any]) -> CocoFile:
        content = dict(source)
        for key, read in (
            ("images", self._image),
            ("categories", self._category),
            ("annotations", self._annotation),
        ):
            entries = source.get(key)
            if isinstance(entries, list):
                self.numbered[key] = _number_ids(entries)
                if key == "annotations":
                    self.sizes = {e["id"]: e for e in content.get("images") or () if _has_id(e)}
                content[key] = self._read_all(key, entries, read)
        return CocoFile(
            self.rules.path,
            content,
            [self.notes[kind] for kind in NOTES if kind in self.notes],
            _spelt_otherwise(source.get("images"), content.get("images")),
            _spelt_otherwise(source.get("categories"), content.get("categories")),
        )

    def _read_all(self, key: str, entries: list[Any], read: Any) -> list[Any]:
        """Read all entries; return the same list where there is nothing to change."""
        noun = {"images": "image", "categories": "category", "annotations": "annotation"}[key]
        quick = key == "annotations" and not any(self.numbered.values())
        changed: dict[int, Any] = {}
        for position, entry in enumerate(entries):
            if (quick and _is_plain(entry)) or not isinstance(entry, dict):
                continue
            new = dict(entry)
            kinds: set[str] = set()
            self._id(new, "id", key, kinds)
            read(new, kinds)
            for kind in kinds:
                note = self.notes.get(kind)
                if note is None:
                    self.notes[kind] = Note(kind, f"{noun} {entry.get('id', position)!s:.60}")
                else:
                    note.count += 1
            changed[position] = new
        return [changed.get(i, entry) for i, entry in enumerate(entries)] if changed else entries

    def _image(self, entry: dict[str, Any], kinds: set[str]) -> None:
        for key in ("width", "height"):
            _integer(entry, key, kinds)

    def _category(self, entry: dict[str, Any], kinds: set[str]) -> None:
        name = entry.get("name")
        if type(name) in _NUMBERS:
            entry["name"] = str(whole if (whole := as_integer(name)) is not None else name)
            kinds.add("number-name")

    def _annotation(self, entry: dict[str, Any], kinds: set[str]) -> None:
        self._id(entry, "image_id", "images", kinds)
        self._id(entry, "category_id", "categories", kinds)
        for key in _OPTIONAL:
            if _is_blank(entry.get(key)):
                entry[key] = None
        for key in ("iscrowd", "ignore"):
            _flag(entry, key, kinds)
        area = entry.get("area")
        if area is None:
            entry.pop("area", None)
            kinds.add("no-area")
        elif type(area) not in _NUMBERS and (number := as_number(area)) is not None:
            entry["area"] = number
            kinds.add("text-number")
        if "segmentation" in entry:
            entry["segmentation"], found = as_mask(entry["segmentation"])
            kinds |= found
        box, found = as_box(entry.get("bbox"))
        if box is None or (isinstance(box, list) and not box):
            self._box_of_mask(entry, kinds)
        else:
            entry["bbox"] = box
            kinds |= found

    def _box_of_mask(self, entry: dict[str, Any], kinds: set[str]) -> None:
        image, mask = self.sizes.get(entry.get("image_id")), entry.get("segmentation")
        if image is None or not mask:
            return
        try:
            record = ImageRecord(0, "", *self.rules.size(image, ""))
            polygons, rle = self.rules.segmentation(mask, record, "")
        except DataError:
            return  # the rules will say so again
        box = box_of_mask(polygons, rle, record)
        if box is not None:
            entry["bbox"] = box
            kinds.add("no-bbox")

    def _id(self, entry: dict[str, Any], key: str, owner: str, kinds: set[str]) -> None:
        """Put the integer in the place of an id: the number that it is, or the one that it was given."""
        given = entry.get(key)
        number = as_integer(given)
        if is_integer(number):
            if type(given) is not int:
                kinds.add("text-number" if isinstance(given, str) else "whole-float")
                entry[key] = number
            return
        if _is_name(given):
            known = self.numbered.get(owner, {}).get(given if number is None else number)
            if known is not None:
                entry[key] = known
                kinds.add("text-id")


def box_of_mask(polygons: list[list[float]], rle: bytes, image: ImageRecord) -> list[float] | None:
    """Return ``xywh`` around the part of a mask in the image; None where there is no such part.

    Args:
        polygons, rle: as :meth:`.Rules.segmentation` returns them.
        image: of the mask.
    """
    if rle:
        box = coco_mask.toBbox({"size": [image.height, image.width], "counts": rle}).tolist()
    elif polygons:
        arrays = [np.array(polygon, dtype=np.float64) for polygon in polygons]
        x0, y0, x1, y1 = polygon_bounds(arrays, image.height, image.width).tolist()
        box = [x0, y0, x1 - x0, y1 - y0]
    else:
        return None
    return box if box[2] > 0 and box[3] > 0 else None


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and is_integer(entry.get("id"))


def _is_name(value: Any) -> bool:
    """Return whether a value can be an id that gets a number: text, or an integer of any length."""
    return isinstance(value, str) or type(value) is int


def _number_ids(entries: list[Any]) -> dict[Any, int]:
    """Number the ids that are no integers, in order of appearance, from the first free number on."""
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


def _spelt_otherwise(given: Any, read: Any) -> dict[int, Any]:
    if given is read or not isinstance(given, list):
        return {}
    pairs = zip(given, read, strict=True)
    return {
        new["id"]: old["id"]
        for old, new in pairs
        if isinstance(old, dict) and old.get("id") != new.get("id") and is_integer(new.get("id"))
    }


def _is_plain(entry: Any) -> bool:
    """Return whether an annotation has nothing to convert; COCO's own files have a million of them."""
    if type(entry) is not dict:
        return False
    get = entry.get
    box = get("bbox")
    return (
        type(get("id")) is int
        and type(get("image_id")) is int
        and type(get("category_id")) is int
        and type(get("iscrowd")) is int
        and type(area := get("area")) in _NUMBERS
        and area == area  # no nan
        and "ignore" not in entry
        and type(box) is list
        and len(box) == 4
        and _NUMBERS.issuperset(map(type, box))
        and _is_plain_mask(get("segmentation"))
    )


def _is_plain_mask(given: Any) -> bool:
    if given is None:
        return True
    if type(given) is dict:
        size, counts = given.get("size"), given.get("counts")
        return (
            type(size) is list
            and {int}.issuperset(map(type, size))
            and (
                (type(counts) is str and not _lists_numbers(counts))
                or (type(counts) is list and {int}.issuperset(map(type, counts)))
            )
        )
    if type(given) is not list:
        return False
    for polygon in given:
        if type(polygon) is not list or len(polygon) == 2 or not _NUMBERS.issuperset(map(type, polygon)):
            return False
    return True


def _lists_numbers(counts: str) -> bool:
    """Return whether counts may be numbers in text; compressed counts have neither character."""
    return "," in counts or " " in counts


def _is_blank(value: Any) -> bool:
    """Return whether a value is what tables write for an empty cell: nan, or blank text."""
    return (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def _integer(entry: dict[str, Any], key: str, kinds: set[str]) -> None:
    given = entry.get(key)
    if type(given) is not int and (number := as_integer(given)) is not None:
        kinds.add("text-number" if isinstance(given, str) else "whole-float")
        entry[key] = number


def _flag(entry: dict[str, Any], key: str, kinds: set[str]) -> None:
    given = entry.get(key)
    if given is None:
        entry.pop(key, None)
        if key == "iscrowd":
            entry[key] = 0
            kinds.add("no-iscrowd")
    elif type(given) is not int:
        flag = as_integer(given)
        if isinstance(given, bool | np.bool_):
            flag = int(given)
        elif isinstance(given, str) and flag is None:
            flag = {"false": 0, "true": 1}.get(given.strip().lower())
        if flag is not None:
            entry[key] = flag
            kinds.add("flag")


def _as_rle(given: dict[str, Any], kinds: set[str]) -> dict[str, Any]:
    rle = dict(given)
    size, counts = given.get("size"), given.get("counts")
    if isinstance(counts, bytes):  # pycocotools' own, of one form only: no note
        rle["counts"] = counts.decode("latin-1")
    if isinstance(counts, str) and _lists_numbers(counts) and (parsed := _parsed(counts)):
        counts = parsed
        kinds.add("text-list")
    if isinstance(size, str) and (parsed := _parsed(size)):
        size = parsed
        kinds.add("text-list")
    for key, value in (("size", size), ("counts", counts)):
        integers = _integers(value, kinds) if isinstance(value, _LISTS) else None
        if integers is not None:
            rle[key] = integers
    return rle


def _integers(given: Iterable[Any], kinds: set[str]) -> list[int] | None:
    """Return integers; None where a value is none."""
    numbers = [as_integer(value) for value in given]
    if any(number is None for number in numbers):
        return None
    for value in given:
        if type(value) is not int:
            kinds.add("text-number" if isinstance(value, str) else "whole-float")
    return numbers  # type: ignore[return-value]


def _numbers(given: Iterable[Any], kinds: set[str]) -> list[float] | None:
    """Return numbers; None where a value is none."""
    numbers = [as_number(value) for value in given]
    if any(number is None for number in numbers):
        return None
    if any(isinstance(value, str) for value in given):
        kinds.add("text-number")
    return numbers  # type: ignore[return-value]


def _outlines(given: Any, kinds: set[str], depth: int) -> list[list[float]] | None:
    """Return the polygons of a list of numbers, of pairs, of polygons or of such lists; None for others."""
    if isinstance(given, str):
        given = _parsed(given)
        kinds.add("mask-form")
    if not isinstance(given, _LISTS) or depth > _DEEPEST:
        return None
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
