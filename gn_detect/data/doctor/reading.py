"""Read a COCO file as it is meant: correct the forms, units and image names that have one obvious meaning.

The doctor reports what was corrected, and the repaired copy keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..coco.canonical import has_masks
from ..coco.faults import DataError
from ..coco.file_names import missing_names
from ..coco.fractions import are_all_fractions, has_fraction_box, has_fraction_mask, in_pixels
from ..coco.reader import read_canonical
from ..coco.rules import Rules, id_of
from ..datasets import DatasetSource


@dataclass
class Reading:
    """A COCO file as it is meant.

    Attributes:
        rules: for its entries.
        content: the lists, with all corrections.
        masks: objects must have one.
        findings: kind, detail and ids of a :class:`.Finding`.
        changes: one line for each correction.
        num_changes: corrected entries.
    """

    rules: Rules
    content: dict[str, Any]
    masks: bool
    findings: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    num_changes: int = 0

    def change(self, line: str, count: int = 1) -> None:
        """Note a correction of some entries."""
        self.changes.append(line)
        self.num_changes += count


def read_as_meant(source: DatasetSource, *, names: bool, masks: bool) -> Reading:
    """Read an annotation file and correct what has one obvious meaning.

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
        reading.findings.append(("other-form", str(note), {}))
        reading.change(str(note), note.count)
    annotations = file.content["annotations"]
    if masks and not reading.masks and annotations:
        detail = f"none of {len(annotations)} annotations has a mask that can be learned"
        reading.findings.append(("boxes-alone", detail, {}))
    if names:
        _rename(reading)
    try:
        rules.whole(reading.content)
        _find_some_fractions(reading)
    except DataError as error:
        if error.code == "fractions":  # other errors are reported by the checks
            reading.findings.append((error.code, error.detail, {}))
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
            detail = f"image {entry.get('id')}: there is no {name}, but {other}"
            about = {"image_id": id_of(entry), "file_name": name}
            reading.findings.append(("misnamed-image", detail, about))
            reading.change(f"image {entry.get('id')}: 'file_name' {name!r} becomes {other!r}")
            entry = {**entry, "file_name": other}
        renamed.append(entry)
    reading.content["images"] = renamed


def _find_some_fractions(reading: Reading) -> None:
    """Report boxes that look like fractions in a file of pixels; only a person can decide."""
    for entry in reading.content["annotations"]:
        if isinstance(entry, dict) and has_fraction_box(entry):
            detail = (
                f"annotation {entry.get('id')} of image {entry.get('image_id')} has 'bbox' {entry['bbox']}"
            )
            reading.findings.append(("some-fractions", detail, {"annotation_id": id_of(entry)}))


def _multiply_fractions(reading: Reading) -> None:
    entries = [entry for entry in reading.content["annotations"] if isinstance(entry, dict)]
    whole_boxes = are_all_fractions(map(has_fraction_box, entries))
    whole_masks = are_all_fractions(map(has_fraction_mask, entries))
    images = reading.rules.images(reading.content["images"], lambda error, about: None)
    scaled = []
    for entry in reading.content["annotations"]:
        image_id = id_of(entry, "image_id")
        image = None if image_id is None else images.get(image_id)
        size = (image.width, image.height) if image is not None else (0, 0)
        multiplied = in_pixels(entry, size, whole_boxes, whole_masks) if image is not None else None
        if multiplied is not None:
            what = f"annotation {entry.get('id')} of image {image_id}"
            reading.change(f"{what}: fractions multiplied by {size}, width and height")
        scaled.append(multiplied or entry)
    reading.content["annotations"] = scaled
