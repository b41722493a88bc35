"""Read a COCO file as it is meant: correct the forms, units and image names that have one obvious meaning.

The doctor reports what was corrected, and the repaired copy keeps it. Image files are read as training reads
them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ...errors import Code, UserError
from ...files import open_file
from ...progress import progress_bar
from ..coco.canonical import has_masks
from ..coco.faults import DataError
from ..coco.file_names import missing_names
from ..coco.reader import read_canonical
from ..coco.rules import Rules, id_of
from ..coco.values import are_all_fractions, has_fraction_box, has_fraction_mask, in_pixels
from ..datasets import DatasetSource
from ..images import is_deep, open_image, read_image


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
            what = f"annotation {entry.get('id')} of image {entry.get('image_id')}"
            detail = f"{what} has 'bbox' {entry['bbox']}"
            reading.findings.append(("some-fractions", detail, {"annotation_id": id_of(entry)}))


def _multiply_fractions(reading: Reading) -> None:
    entries = [entry for entry in reading.content["annotations"] if isinstance(entry, dict)]
    whole_boxes = are_all_fractions(map(has_fraction_box, entries))
    whole_masks = are_all_fractions(map(has_fraction_mask, entries))
    images = reading.rules.images(reading.content["images"], lambda error, about: None)
    scaled = []
    for entry in reading.content["annotations"]:
        image_id = id_of(entry, "image_id")
        if image_id is not None and (image := images.get(image_id)) is not None:
            size = image.width, image.height
            if (multiplied := in_pixels(entry, size, whole_boxes, whole_masks)) is not None:
                what = f"annotation {entry.get('id')} of image {image_id}"
                reading.change(f"{what}: fractions multiplied by {size}, width and height")
                entry = multiplied
        scaled.append(entry)
    reading.content["annotations"] = scaled


@dataclass(frozen=True, slots=True)
class Probe:
    """The facts about an image file.

    Attributes:
        sizes: (height, width) in pixels, upright and as stored; empty for a file that cannot be read.
        digest: of its bytes; empty for a missing file.
        error: the reason for a file that cannot be read.
        brightest: value from 0 to 255, as read, of greyscale with more than 8 bits; None for other images.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    digest: str = ""
    error: DataError | None = None
    brightest: int | None = None


Probes = Mapping[str, Probe]  # by path


def probe_images(paths: Iterable[str]) -> Probes:
    """Read every file once, on all processors (decoders work outside Python's lock)."""
    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(probe_image, unique)
        bar = progress_bar(found, desc="reading images", total=len(unique))
        return dict(zip(unique, bar, strict=True))


def probe_image(path: str) -> Probe:
    """Read one file."""
    digest = ""
    try:
        with open_file(path) as file:
            digest = hashlib.blake2b(file.read(), digest_size=16).hexdigest()
        pixels = read_image(path, "RGB")
        with open_image(path) as stored:
            sizes = (pixels.shape[:2], (stored.height, stored.width))
            return Probe(sizes, digest, brightest=int(pixels.max()) if is_deep(stored) else None)
    except DataError as error:
        return Probe(digest=digest, error=error)
    except (OSError, ValueError, UserError) as error:
        missing = isinstance(error, FileNotFoundError)
        code: Code = "missing-image" if missing else "unreadable-image"
        reason = getattr(error, "strerror", None) or str(error)
        return Probe(digest=digest, error=DataError(code, f"image {path} cannot be read: {reason}"))
