"""Read a value of a COCO entry in each form that tools write.

Each function returns the value in COCO's form, or the value itself where it has no obvious meaning, and adds
the kinds of its changes (keys of :data:`.canonical.NOTES`) to ``kinds``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

Kinds = set[str]

NOTHING = object()  # in the place of a value: the entry does not have the key

_LISTS = (list, tuple, np.ndarray)  # callers of canonical() may give tuples and arrays
_SEPARATOR = re.compile(r"[\s,;]+")
_DEEPEST = 4  # lists within lists of a segmentation


def is_blank(value: Any) -> bool:
    """Return whether there is no value, or what tables write for an empty cell: null, nan, blank text."""
    return (
        value is NOTHING
        or value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def read_integer(given: Any, kinds: Kinds) -> Any:
    """Read a size or an id."""
    if type(given) is int or (number := as_integer(given)) is None:
        return given
    kinds.add("text-number" if isinstance(given, str) else "whole-float")
    return number


def read_flag(given: Any, kinds: Kinds) -> Any:
    """Read ``iscrowd`` or ``ignore``."""
    if type(given) is int:
        return given
    if is_blank(given):
        return NOTHING
    flag = as_integer(given)
    if isinstance(given, bool | np.bool_):
        flag = int(given)
    elif isinstance(given, str) and flag is None:
        flag = {"false": 0, "true": 1}.get(given.strip().lower())
    if flag is None:
        return given
    kinds.add("flag")
    return flag


def read_area(given: Any, kinds: Kinds) -> Any:
    """Read ``area``."""
    if is_blank(given):
        kinds.add("no-area")
        return NOTHING
    if type(given) in NUMBERS or (number := as_number(given)) is None:
        return given
    kinds.add("text-number")
    return number


def read_box(given: Any, kinds: Kinds) -> Any:
    """Read a ``bbox``: a list of numbers, also as text, or numbers named x, y, width (w) and height (h)."""
    if is_blank(given):
        return given if given is NOTHING else None
    found = _parsed(given) if isinstance(given, str) else given
    if isinstance(found, dict):
        found = _named(found, "x", "y", "width", "height") or _named(found, "x", "y", "w", "h")
        if found and _numbers(found, kinds) is not None:
            kinds.add("named-numbers")
            return _numbers(found, kinds)
    numbers = _numbers(found, kinds) if isinstance(found, _LISTS) else None
    if numbers is None:
        return given
    if found is not given and numbers:
        kinds.add("text-list")
    return numbers


def read_mask(given: Any, kinds: Kinds) -> Any:
    """Read a ``segmentation``: polygons, flat or in pairs, or an RLE; all of it may be text."""
    if _is_polygons(given):
        return given
    if is_blank(given):
        return given if given is NOTHING else None
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
                changes[key] = [read_integer(number, kinds) for number in value]
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
    if len(given) and all(isinstance(point, dict) for point in given):
        points = [_named(point, "x", "y") for point in given]
        if None in points:
            return None
        kinds.add("named-numbers")
        given = points
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


def _named(given: dict[str, Any], *names: str) -> list[Any] | None:
    """Return the values of these names; None if the object has others."""
    return [given[name] for name in names] if given.keys() == set(names) else None


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


NUMBERS = frozenset((int, float))

# The farthest that a coordinate may be from the image's corner, in pixels.
FARTHEST = 1e6

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)
_LONGEST_NUMBER = 100  # characters


def as_number(value: Any) -> int | float | None:
    """Return the number that a JSON value is, or that its text spells; None for all else, also for a bool."""
    if type(value) in NUMBERS:
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


def is_integer(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer that fits into 64 bits; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_area(value: Any) -> bool:
    """Return whether a value is a possible number of square pixels."""
    return type(value) in NUMBERS and 0 <= value <= FARTHEST**2


def extent_of(numbers: Sequence[Any]) -> tuple[float, float] | None:
    """Return the least and the greatest coordinate; None if one is no number, not finite or too far away."""
    if not NUMBERS.issuperset(map(type, numbers)):
        return None
    low, high = min(numbers), max(numbers)
    # A nan is the least if it comes first, and in the sum otherwise.
    near = low >= -FARTHEST and high <= FARTHEST and math.isfinite(sum(numbers))
    return (low, high) if near else None


# The largest number that can be a fraction: those of boxes at the border may be rounded up.
_FRACTION = 1.01


def is_larger_than_fractions(image: Any) -> bool:
    """Return whether boxes as small as fractions would be a small part of an image entry."""
    sides = (image.get("height"), image.get("width")) if isinstance(image, dict) else ()
    return any(is_integer(side) and side > 4 for side in sides)


def has_fraction_box(entry: Mapping[str, Any]) -> bool | None:
    """Return whether the box of an annotation is fractions of the image.

    None for no proper box, an empty one, and the one that may be all of an image or its first pixel.
    """
    boxes = _lists(entry, "bbox")
    if not boxes or boxes[0][2] <= 0 or boxes[0][3] <= 0 or boxes[0] == [0, 0, 1, 1]:
        return None
    return _are_fractions(boxes)


def has_fraction_mask(entry: Mapping[str, Any]) -> bool | None:
    """Return whether the polygons of an annotation are fractions of the image.

    None for what is no polygons, and for those that may be all of an image or its first pixel.
    """
    polygons = _lists(entry, "segmentation")
    if not polygons:
        return None
    return _are_fractions(polygons) or (None if _are_fractions(polygons, whole=True) else False)


def are_all_fractions(answers: Iterable[bool | None]) -> bool:
    """Return whether no box or no mask of a file is in pixels."""
    found = set(answers)
    return True in found and False not in found


def in_pixels(
    entry: Mapping[str, Any], size: tuple[int, int], whole_boxes: bool, whole_masks: bool
) -> dict[str, Any] | None:
    """Return an annotation in pixels; None where neither box nor polygons look like fractions.

    Args:
        entry: in canonical form. Its area is left out, and follows anew.
        size: width and height of its image.
        whole_boxes, whole_masks: those of 0 and 1 alone cover the image, and not its first pixel.
    """
    new: dict[str, Any] = {}
    boxes, polygons = _lists(entry, "bbox"), _lists(entry, "segmentation")
    if boxes and _are_fractions(boxes, whole_boxes):
        new["bbox"] = _times(boxes[0], size)
    if polygons and _are_fractions(polygons, whole_masks):
        new["segmentation"] = [_times(polygon, size) for polygon in polygons]
    return {key: value for key, value in entry.items() if key != "area"} | new if new else None


def _lists(entry: Mapping[str, Any], key: str) -> list[list[float]]:
    """Return the box in a list, or the polygons; nothing where they are not proper lists of numbers."""
    value = entry.get(key)
    lists = [value] if key == "bbox" else value
    if type(lists) is not list:
        return []
    for numbers in lists:
        if type(numbers) is not list or not numbers or not NUMBERS.issuperset(map(type, numbers)):
            return []
    return [] if key == "bbox" and len(lists[0]) != 4 else lists


def _are_fractions(lists: Sequence[Sequence[float]], whole: bool = False) -> bool:
    """Return whether all numbers are between 0 and 1; unless ``whole``, one must be neither 0 nor 1."""
    return (
        lists[0][0] <= _FRACTION
        and all(max(numbers) <= _FRACTION and min(numbers) >= 0 for numbers in lists)
        and (whole or any(number % 1 for numbers in lists for number in numbers))
    )


def _times(numbers: list[float], size: tuple[int, int]) -> list[float]:
    """Multiply numbers ``x, y, ...`` by width and height; 8.000000000000002 becomes 8."""
    products = (round(float(number) * size[place % 2], 6) for place, number in enumerate(numbers))
    return [int(product) if product.is_integer() else product for product in products]
