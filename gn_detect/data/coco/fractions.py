"""Boxes and polygons in fractions of the image: find them, and multiply them into pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .values import NUMBERS, is_integer

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
