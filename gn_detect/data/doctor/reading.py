"""Read a COCO file as it is meant: put right the forms, units and image names that have one obvious reading.

What was put right is found once, here: the doctor reports it, and the repaired copy keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..coco.canonical import has_masks
from ..coco.faults import DataError
from ..coco.file_names import missing_names
from ..coco.reader import read_canonical
from ..coco.rules import (
    Rules,
    are_fractions,
    has_fraction_box,
    has_fraction_mask,
    is_box,
    is_integer,
    is_polygons,
)
from ..datasets import DatasetSource


@dataclass
class Reading:
    """A COCO file as it is meant.

    Attributes:
        rules: for its entries.
        content: the lists, with all that was put right.
        masks: objects must have one.
        told: kind of fault, one line, and the ids that a finding has, for each thing that was put right.
        changes: one line for each of them that a repaired copy keeps.
        num_changes: entries that were changed.
    """

    rules: Rules
    content: dict[str, Any]
    masks: bool
    told: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    num_changes: int = 0

    def change(self, line: str, count: int = 1) -> None:
        """Note what a repaired copy keeps."""
        self.changes.append(line)
        self.num_changes += count


def read_as_meant(source: DatasetSource, *, names: bool, masks: bool) -> Reading:
    """Read an annotation file and put right what has one obvious reading.

    Args:
        source: where the files are.
        names: look for images whose file has a nearly equal name.
        masks: objects must have a mask, if some has one.

    Raises:
        UserError: the file is missing, not JSON or not COCO at all.
    """
    file = read_canonical(source.annotations)
    rules = Rules(source.annotations, source.images, True, source.allow_outside)
    reading = Reading(rules, dict(file.content), masks and has_masks(file.content))
    for note in file.notes:
        reading.told.append(("other-form", str(note), {}))
        reading.change(str(note), note.count)
    annotations = file.content["annotations"]
    if masks and not reading.masks and annotations:
        detail = f"none of {len(annotations)} annotations has a mask that can be learned"
        reading.told.append(("boxes-alone", detail, {}))
    if names:
        _rename(reading)
    _multiply_fractions(reading)
    return reading


def _rename(reading: Reading) -> None:
    images = reading.content["images"]
    names = [entry.get("file_name") for entry in images if isinstance(entry, dict)]
    usable = [name for name in names if isinstance(name, str) and name and "\0" not in name]
    found = missing_names(reading.rules.folder, usable, reading.rules.allow_outside)
    renamed = []
    for entry in images:
        name = entry.get("file_name") if isinstance(entry, dict) else None
        other = found.get(name) if isinstance(name, str) else None
        if other is not None:
            image_id = entry.get("id")
            detail = f"image {image_id}: there is no {name}, but {other}"
            about = {"image_id": image_id if is_integer(image_id) else None, "file_name": name}
            reading.told.append(("misnamed-image", detail, about))
            reading.change(f"image {image_id}: 'file_name' {name!r} becomes {other!r}")
            entry = {**entry, "file_name": other}
        renamed.append(entry)
    reading.content["images"] = renamed


def _multiply_fractions(reading: Reading) -> None:
    try:
        reading.rules.whole(reading.content)
        _tell_of_some(reading)
        return
    except DataError as error:
        if error.kind != "fractions":
            return  # the checks say so again
        reading.told.append((error.kind, str(error).removeprefix(f"{reading.rules.path}: "), {}))
    entries = [entry for entry in reading.content["annotations"] if isinstance(entry, dict)]
    whole_boxes = _are_all_fractions(map(has_fraction_box, entries))
    whole_masks = _are_all_fractions(map(has_fraction_mask, entries))
    sizes: dict[Any, tuple[int, int]] = {}
    for position, entry in enumerate(reading.content["images"]):
        with suppress(DataError):
            image = reading.rules.image(entry, position)
            sizes[image.id] = (image.width, image.height)
    scaled = []
    for entry in reading.content["annotations"]:
        size = sizes.get(entry.get("image_id")) if isinstance(entry, dict) else None
        multiplied = None if size is None else _multiplied(entry, size, whole_boxes, whole_masks)
        if multiplied is not None:
            what = f"annotation {entry.get('id')} of image {entry.get('image_id')}"
            reading.change(f"{what}: fractions multiplied by {size}, width and height")
        scaled.append(multiplied or entry)
    reading.content["annotations"] = scaled


def _tell_of_some(reading: Reading) -> None:
    """Report boxes that look like fractions in a file of pixels; only a person can decide."""
    for entry in reading.content["annotations"]:
        box = entry.get("bbox") if isinstance(entry, dict) else None
        if isinstance(entry, dict) and is_box(box) and min(box[2:]) > 0 and are_fractions([box]):
            detail = f"annotation {entry.get('id')} of image {entry.get('image_id')} has 'bbox' {box}"
            annotation_id = entry.get("id")
            about = {"annotation_id": annotation_id if is_integer(annotation_id) else None}
            reading.told.append(("some-fractions", detail, about))


def _are_all_fractions(answers: Iterable[bool | None]) -> bool:
    """Return whether no box or no mask of a file is in pixels."""
    found = set(answers)
    return True in found and False not in found


def _multiplied(
    entry: Mapping[str, Any], size: tuple[int, int], whole_boxes: bool, whole_masks: bool
) -> dict[str, Any] | None:
    """Return an annotation in pixels: box and polygons, each if it looks like fractions.

    Args:
        entry: in canonical form. Its area is left out, and follows anew.
        size: width and height of its image.
        whole_boxes, whole_masks: those of 0 and 1 alone cover the image, and not its first pixel.

    Returns:
        None where neither looks like fractions.
    """
    box, mask = entry.get("bbox"), entry.get("segmentation")
    new: dict[str, Any] = {}
    if is_box(box) and are_fractions([box], whole_boxes):
        new["bbox"] = _times(box, size)
    if is_polygons(mask) and are_fractions(mask, whole_masks):
        new["segmentation"] = [_times(polygon, size) for polygon in mask]
    return {key: value for key, value in entry.items() if key != "area"} | new if new else None


def _times(numbers: list[float], size: tuple[int, int]) -> list[float]:
    """Multiply numbers ``x, y, ...`` by width and height; 8.000000000000002 becomes 8."""
    products = (round(float(number) * size[place % 2], 6) for place, number in enumerate(numbers))
    return [int(product) if product.is_integer() else product for product in products]
