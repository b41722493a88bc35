"""Checks of one part of a dataset: all that :mod:`.coco_rules` refuses, and what only a doctor looks at."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..coco.canonical import has_mask
from ..coco.crowds import count_crowds
from ..coco.faults import DataError, Finding
from ..coco.image_table import ImageRecord
from ..coco.reader import ids_may_repeat
from ..coco.rules import Rules, is_area, is_integer, is_polygon
from ..images import DARK
from .images import Probes
from .masks import MaskMeasures, crosses_itself, measure_mask
from .reading import Reading

BORDER = 1.0
"""Pixels by which boxes and polygons may reach out of the image: COCO's tools round up to that."""

_BOX_PIXELS, _BOX_SHARE = 2.0, 0.05
"""How far a side of a box may be from its mask's: COCO's own are up to 1 pixel off."""

_AREA_PIXELS, _AREA_SHARE = 20.0, 0.2
"""How much of an area may be missing: COCO's are those of polygons, not of pixels; 1 in 1,000 is 15% off."""

SMALL, LARGE = 32, 96
"""COCO's borders between small, medium and large objects: side of a square in pixels."""


@dataclass
class Part:
    """What was found in one annotation file.

    Attributes:
        name: of the part, in reports.
        rules: its files.
        categories: names by id.
        images: readable entries by id.
        findings: all faults.
        annotations, crowds: how many there are.
        category_counts, image_counts: objects by category and image id, crowds left out.
        sides: square roots of the boxes' areas in pixels, by category id.
        digests: of image files, by image id.
    """

    name: str
    rules: Rules
    categories: dict[int, str] = field(default_factory=dict)
    images: dict[int, ImageRecord] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    annotations: int = 0
    crowds: int = 0
    category_counts: Counter[int] = field(default_factory=Counter)
    image_counts: Counter[int] = field(default_factory=Counter)
    sides: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    digests: dict[int, str] = field(default_factory=dict)

    @property
    def sizes(self) -> list[float]:
        """Return the ``sides`` of all categories."""
        return [side for sides in self.sides.values() for side in sides]

    def add(self, kind: str, detail: str, **about: Any) -> None:
        """One more fault; the image's file name is filled in."""
        record = self.images.get(about.get("image_id", -1))
        if record is not None:
            about.setdefault("file_name", Path(record.file_name).name)
        self.findings.append(Finding(kind, self.name, detail, **about))

    @contextmanager
    def collecting(self, **about: Any) -> Iterator[None]:
        """What a rule refuses inside becomes a finding."""
        try:
            yield
        except DataError as error:
            self.add(error.kind, str(error).removeprefix(f"{self.rules.path}: "), **about)


def check_part(name: str, reading: Reading, probes: Probes | None) -> Part:
    """All faults of one annotation file and its images.

    Args:
        name: for reports.
        reading: of the file.
        probes: of its image files by path; None leaves the files alone.
    """
    rules, content = reading.rules, reading.content
    part = Part(name, rules)
    for kind, detail, about in reading.told:
        part.add(kind, detail, **about)
    with part.collecting():
        rules.whole(content)
    _check_categories(part, content["categories"])
    listed = _check_images(part, content["images"])
    if probes is not None:
        _check_files(part, probes)
    _AnnotationChecker(part, listed, reading.masks).check(content["annotations"])
    crowds = count_crowds(content)
    if crowds.dubious:
        part.add("crowds", crowds.found, annotation_id=crowds.first_blob)
    _check_use(part)
    return part


def _check_categories(part: Part, entries: list[Any]) -> None:
    for position, entry in enumerate(entries):
        with part.collecting(category_id=_id_of(entry)):
            category_id, name = part.rules.category(entry, position)
            if category_id in part.categories:
                detail = f"category id {category_id} occurs twice ({part.categories[category_id]}, {name})"
                part.add("duplicate-category-id", detail, category_id=category_id)
                continue
            part.categories[category_id] = name
    if not entries:
        part.add("nothing", "the file lists no categories")
    ids: dict[str, int] = {}
    for category_id, name in part.categories.items():
        first = ids.setdefault(name, category_id)
        if first != category_id:
            detail = f"categories {first} and {category_id} are both called {name!r}"
            part.add("duplicate-category-name", detail, category_id=category_id)


def _check_images(part: Part, entries: list[Any]) -> set[int]:
    """Fills ``part.images``; returns all ids, those of broken entries too."""
    listed: set[int] = set()
    files: dict[str, int] = {}
    for position, entry in enumerate(entries):
        image_id = _id_of(entry)
        if image_id in part.images:
            detail = f"image id {image_id} occurs twice: entry {position} (counted from 0) repeats it"
            part.add("duplicate-image-id", detail, image_id=image_id)
            continue
        if image_id is not None:
            listed.add(image_id)
        with part.collecting(image_id=image_id, file_name=_name_of(entry)):
            record = part.rules.image(entry, position)
            part.images[record.id] = record
            first = files.setdefault(record.file_name, record.id)
            if first != record.id:
                detail = f"images {first} and {record.id} name the same file"
                part.add("duplicate-file", detail, image_id=record.id)
    if not entries:
        part.add("nothing", "the file lists no images")
    return listed


def _check_files(part: Part, probes: Probes) -> None:
    seen: dict[str, ImageRecord] = {}
    for record in part.images.values():
        probe = probes[record.file_name]
        if probe.error is not None:
            part.add(probe.error.kind, f"image {record.id}: {probe.error}", image_id=record.id)
            continue
        if (record.height, record.width) not in probe.sizes:
            height, width = probe.sizes[0]
            detail = (
                f"image {record.id} is {width}x{height} (width x height) but the JSON says "
                f"{record.width}x{record.height}"
            )
            part.add("size-differs", detail, image_id=record.id)
        part.digests[record.id] = probe.digest
        first = seen.setdefault(probe.digest, record)
        if first.file_name != record.file_name:
            name = Path(first.file_name).name
            detail = f"image {record.id} has the same content as image {first.id} ({name})"
            part.add("duplicate-picture", detail, image_id=record.id)
    _check_depth(part, [probes[record.file_name].brightest for record in part.images.values()])


def _check_depth(part: Part, found: Sequence[int | None]) -> None:
    """Of all images together: one may well be dark."""
    deep = [value for value in found if value is not None]
    if deep and max(deep) < DARK:
        detail = (
            f"no pixel of {len(deep)} 16-bit greyscale image(s) is {(max(deep) + 1) * 256} or more of 65535: "
            f"they are read as 0 to {max(deep)} of 255"
        )
        part.add("dark-images", detail)


def _check_use(part: Part) -> None:
    for category_id, name in part.categories.items():
        if not part.category_counts[category_id]:
            part.add("unused-category", f"category {category_id} ({name})", category_id=category_id)
    for image_id in part.images:
        if not part.image_counts[image_id]:
            part.add("empty-image", f"image {image_id}", image_id=image_id)
    if not part.category_counts:
        part.add("nothing", "the file has no object to train on")


class _AnnotationChecker:
    def __init__(self, part: Part, listed: set[int], masks: bool) -> None:
        self.part, self.listed, self.masks = part, listed, masks
        self.ids: set[int] = set()
        self.first: dict[tuple[Any, ...], dict[str, Any]] = {}
        """Annotations by image, category and box."""

    def check(self, entries: list[Any]) -> None:
        for position, entry in enumerate(entries):
            with self.part.collecting(annotation_id=_id_of(entry)):
                self._check_one(entry, *self.part.rules.ids(entry, position))
        self.part.annotations = len(entries)

    def _check_one(self, entry: dict[str, Any], annotation_id: int, image_id: int) -> None:
        part, rules = self.part, self.part.rules
        about = {"annotation_id": annotation_id, "image_id": image_id}
        what = f"annotation {annotation_id} of image {image_id}"
        if annotation_id in self.ids and not ids_may_repeat(rules.path):
            part.add("duplicate-annotation-id", f"annotation id {annotation_id} occurs twice", **about)
        self.ids.add(annotation_id)
        if image_id not in self.listed:
            part.add("dangling-image", f"{what}, which is not listed", **about)
            return
        category_id, crowd = None, False
        with part.collecting(**about, category_id=_id_of(entry, "category_id")):
            category_id = rules.category_id(entry, part.categories, what)
        with part.collecting(**about):
            crowd = rules.crowd(entry, what)
        with part.collecting(**about):
            rules.area(entry, what)
        image = part.images.get(image_id)
        if image is None:
            return  # its entry is broken, and said so
        box = None
        with part.collecting(**about):
            box = rules.box(entry, image, what)
            self._check_box(box, image, what, about)
        learned = True
        if self.masks or has_mask(entry):
            with part.collecting(**about):
                learned = self._check_mask(entry, image, box, crowd, what, about) or not self.masks
        self._count(entry, image_id, category_id, crowd, box if learned else None)

    def _count(
        self, entry: dict[str, Any], image_id: int, category_id: int | None, crowd: bool, box: Any
    ) -> None:
        part = self.part
        if crowd:
            part.crowds += 1
            return
        if box is not None and category_id is not None:
            part.category_counts[category_id] += 1
            part.image_counts[image_id] += 1
            part.sides[category_id].append(max((box[2] - box[0]) * (box[3] - box[1]), 0) ** 0.5)
            other = self.first.setdefault((image_id, category_id, *box), entry)
            if other is not entry and other.get("segmentation") == entry.get("segmentation"):
                detail = f"annotation {entry['id']} of image {image_id} repeats annotation {other['id']}"
                part.add("duplicate-annotation", detail, annotation_id=entry["id"], image_id=image_id)

    def _check_box(
        self, box: list[float] | None, image: ImageRecord, what: str, about: dict[str, Any]
    ) -> None:
        if box is None:
            self.part.add("box-empty", f"{what} has a box without width or height", **about)
        elif overhang(box, image) > BORDER:
            detail = f"{what} has a box that reaches {overhang(box, image):.0f} pixels out of the image"
            self.part.add("box-overlaps-border", detail, **about)

    def _check_mask(
        self,
        entry: dict[str, Any],
        image: ImageRecord,
        box: list[float] | None,
        crowd: bool,
        what: str,
        about: dict[str, Any],
    ) -> bool:
        """Check a mask; False for polygons that are all too short: training leaves out their object."""
        part, given = self.part, entry.get("segmentation")
        polygons, rle = part.rules.segmentation(given, image, what)
        if crowd and isinstance(given, list):
            part.add("crowd-without-rle", f"{what} is a crowd with polygons", **about)
        if isinstance(given, list) and len(polygons) < len(given):
            count = sum(not is_polygon(polygon) for polygon in given)
            part.add("short-polygon", f"{what} has {count} of {len(given)} polygons", **about)
        if not polygons and not rle:
            return False
        extents = ([min(p[::2]), min(p[1::2]), max(p[::2]), max(p[1::2])] for p in polygons)
        reach = max((overhang(extent, image) for extent in extents), default=0.0)
        if reach > BORDER:
            detail = f"{what} has a polygon that reaches {reach:.0f} pixels out of the image"
            part.add("polygon-outside", detail, **about)
        if any(map(crosses_itself, polygons)):
            part.add("crossing-polygon", what, **about)
        try:
            measures = measure_mask(polygons, rle, image)
        except ValueError as error:
            raise part.rules.error(f"{what} has a damaged RLE ({error})", "bad-rle") from error
        if measures.area == 0:
            part.add("empty-mask", f"{what} has a mask without a pixel", **about)
            return True
        if box is not None and box_disagrees(box, measures, image):
            given_box, mask_box = ([round(number, 1) for number in b] for b in (box, measures.box))
            detail = f"{what} has the box {given_box} but its mask {mask_box} (x0, y0, x1, y1)"
            part.add("box-mask", detail, **about)
        if not crowd and area_disagrees(entry.get("area"), measures):  # COCO's own crowds are far off
            detail = f"{what} has 'area' {entry['area']:.6g} but its mask {measures.area:.0f} pixels"
            part.add("area-mask", detail, **about)
        return True


def overhang(box: list[float], image: ImageRecord) -> float:
    """Pixels by which an ``xyxy`` box reaches out of the image, at most on one side; negative inside."""
    return max(-box[0], -box[1], box[2] - image.width, box[3] - image.height)


def box_tolerance(side: Any) -> Any:
    """Pixels by which a box may differ from its mask's: a number or an array, as the lengths of sides are."""
    return np.maximum(_BOX_PIXELS, _BOX_SHARE * side)


def box_disagrees(box: list[float], measures: MaskMeasures, image: ImageRecord) -> bool:
    """Whether a side of an ``xyxy`` box, cut to the image, is elsewhere than its mask's."""
    limits = [image.width, image.height] * 2
    cut = [min(max(number, 0), limit) for number, limit in zip(box, limits, strict=True)]
    sides = [max(cut[2] - cut[0], measures.box[2] - measures.box[0])]
    sides.append(max(cut[3] - cut[1], measures.box[3] - measures.box[1]))
    return any(
        abs(a - b) > box_tolerance(side) for a, b, side in zip(cut, measures.box, sides * 2, strict=True)
    )


def area_disagrees(area: Any, measures: MaskMeasures) -> bool:
    """Whether an annotation's area, where it has a proper one, is not its mask's."""
    if not is_area(area):
        return False
    difference, larger = abs(area - measures.area), max(area, measures.area)
    return bool(difference > max(_AREA_PIXELS, _AREA_SHARE * larger))


def _id_of(entry: Any, key: str = "id") -> int | None:
    found = entry.get(key) if isinstance(entry, dict) else None
    return found if is_integer(found) else None


def _name_of(entry: Any) -> str | None:
    found = entry.get("file_name") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else None
