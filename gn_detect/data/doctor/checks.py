"""Check one annotation file: all that the rules refuse, and what only the doctor looks at."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..coco.canonical import has_mask
from ..coco.crowds import count_crowds
from ..coco.faults import DataError, Finding
from ..coco.rules import Annotation, Rules, is_polygon
from ..coco.tables import ImageRecord
from ..coco.values import is_area
from ..images import DARK
from .reading import Probes, Reading

# COCO's borders between small, medium and large objects: side of a square in pixels.
SMALL, LARGE = 32, 96

_Objects = dict[tuple[Any, ...], dict[str, Any]]


@dataclass
class Part:
    """One annotation file and its faults.

    Attributes:
        name: of the part, in reports.
        rules: for its entries.
        categories: names by id.
        images: readable entries by id.
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
        """Add a finding; the image's file name is filled in."""
        record = self.images.get(about.get("image_id", -1))
        if record is not None:
            about.setdefault("file_name", Path(record.file_name).name)
        self.findings.append(Finding(kind, self.name, detail, **about))

    def report(self, error: DataError, about: Mapping[str, Any]) -> None:
        """Add what a rule refuses."""
        self.add(error.code, error.detail, **about)


def check_part(name: str, reading: Reading, probes: Probes | None) -> Part:
    """Find all faults of one annotation file and its images.

    Args:
        name: for reports.
        reading: of the file.
        probes: of its image files by path; None leaves the files alone.
    """
    rules, content = reading.rules, reading.content
    part = Part(name, rules, annotations=len(content["annotations"]))
    for kind, detail, about in reading.findings:
        part.add(kind, detail, **about)
    try:
        rules.whole(content)
    except DataError as error:
        part.report(error, {})
    part.categories = rules.categories(content["categories"], part.report)
    images = rules.images(content["images"], part.report)
    part.images = {image_id: record for image_id, record in images.items() if record is not None}
    _check_names(part)
    if probes is not None:
        _check_files(part, probes)
    objects: _Objects = {}
    for annotation in rules.annotations(content["annotations"], images, part.categories, part.report):
        if annotation.image is not None:  # otherwise the image's entry is refused already
            _check_annotation(part, annotation, annotation.image, reading.masks, objects)
    crowds = count_crowds(content)
    if crowds.dubious:
        part.add("crowds", crowds.found, annotation_id=crowds.first_blob)
    _check_use(part)
    return part


def _check_names(part: Part) -> None:
    ids: dict[str, int] = {}
    for category_id, name in part.categories.items():
        if (first := ids.setdefault(name, category_id)) != category_id:
            detail = f"categories {first} and {category_id} are both called {name!r}"
            part.add("duplicate-category-name", detail, category_id=category_id)
    files: dict[str, int] = {}
    for record in part.images.values():
        if (first := files.setdefault(record.file_name, record.id)) != record.id:
            detail = f"images {first} and {record.id} name the same file"
            part.add("duplicate-file", detail, image_id=record.id)


def _check_files(part: Part, probes: Probes) -> None:
    seen: dict[str, ImageRecord] = {}
    for record in part.images.values():
        probe = probes[record.file_name]
        if probe.error is not None:
            part.add(probe.error.code, f"image {record.id}: {probe.error}", image_id=record.id)
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
    # All 16-bit images are judged together: one may well be dark.
    found = [probes[record.file_name].brightest for record in part.images.values()]
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
        part.add("empty-list", "the file has no object to train on")


def _check_annotation(
    part: Part, annotation: Annotation, image: ImageRecord, masks: bool, objects: _Objects
) -> None:
    entry, box, category_id = annotation.entry, annotation.box, annotation.category_id
    about = annotation.about
    if box is not None and (reach := overhang(box, image)) > BORDER:
        detail = f"{annotation.what} has a box that reaches {reach:.0f} pixels out of the image"
        part.add("box-overlaps-border", detail, **about)
    learned = True
    if masks or has_mask(entry):
        try:
            learned = _check_mask(part, annotation, image) or not masks
        except DataError as error:
            part.report(error, about)
    if annotation.crowd:
        part.crowds += 1
    elif box is not None and category_id is not None and learned:
        part.category_counts[category_id] += 1
        part.image_counts[annotation.image_id] += 1
        part.sides[category_id].append(max((box[2] - box[0]) * (box[3] - box[1]), 0) ** 0.5)
        other = repeated(objects, (annotation.image_id, category_id, *box), entry)
        if other is not None:
            part.add("duplicate-annotation", f"{annotation.what} repeats annotation {other['id']}", **about)


def repeated(objects: _Objects, key: tuple[Any, ...], entry: dict[str, Any]) -> dict[str, Any] | None:
    """Return the first annotation of ``key`` (image, category, box) if another has the same mask."""
    first = objects.setdefault(key, entry)
    return first if first is not entry and first.get("segmentation") == entry.get("segmentation") else None


def _check_mask(part: Part, annotation: Annotation, image: ImageRecord) -> bool:
    """Return whether there is a mask; training leaves out an object whose polygons are all too short."""
    what, about, entry, box = annotation.what, annotation.about, annotation.entry, annotation.box
    given = entry.get("segmentation")
    mask = part.rules.segmentation(given, image, what)
    if annotation.crowd and isinstance(given, list):
        part.add("crowd-without-rle", f"{what} is a crowd with polygons", **about)
    if isinstance(given, list) and len(mask.polygons) < len(given):
        count = sum(not is_polygon(polygon) for polygon in given)
        part.add("short-polygon", f"{what} has {count} of {len(given)} polygons", **about)
    if not mask:
        return False
    extents = ([min(p[::2]), min(p[1::2]), max(p[::2]), max(p[1::2])] for p in mask.polygons)
    reach = max((overhang(extent, image) for extent in extents), default=0.0)
    if reach > BORDER:
        detail = f"{what} has a polygon that reaches {reach:.0f} pixels out of the image"
        part.add("polygon-outside", detail, **about)
    if any(map(crosses_itself, mask.polygons)):
        part.add("crossing-polygon", what, **about)
    if mask.area == 0:
        part.add("empty-mask", f"{what} has a mask without a pixel", **about)
        return True
    if box is not None and box_differs(box, mask.box, image):
        rounded = [[round(number, 1) for number in corners] for corners in (box, mask.box)]
        detail = f"{what} has the box {rounded[0]} but its mask {rounded[1]} (x0, y0, x1, y1)"
        part.add("box-mask", detail, **about)
    if not annotation.crowd and area_differs(entry.get("area"), mask.area):  # COCO's own crowds are far off
        detail = f"{what} has 'area' {entry['area']:.6g} but its mask {mask.area:.0f} pixels"
        part.add("area-mask", detail, **about)
    return True


# Pixels by which boxes and polygons may reach out of the image: COCO's tools round up to that.
BORDER = 1.0

# How far a side of a box may be from its mask's: COCO's own are up to 1 pixel off.
_BOX_PIXELS, _BOX_SHARE = 2.0, 0.05

# How much of an area may be missing: COCO's are those of polygons, not of pixels; 1 in 1,000 is 15% off.
_AREA_PIXELS, _AREA_SHARE = 20.0, 0.2

# Pairs of edges of a polygon: compared at once, and in all (some seconds). A traced outline has 20 for each
# point.
_PAIRS, _MOST_PAIRS = 1 << 18, 10_000_000


def overhang(box: Sequence[float], image: ImageRecord) -> float:
    """Return the pixels by which an ``xyxy`` box reaches out of the image on one side; negative inside."""
    return max(-box[0], -box[1], box[2] - image.width, box[3] - image.height)


def boxes_differ(boxes: np.ndarray, others: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return (N,) bool: some side of a box, cut to the image, is elsewhere than the other box's.

    Args:
        boxes, others: (N, 4) ``xyxy``; a nan differs from nothing.
        sizes: (N, 2) width and height of the images.
    """
    limits = np.concatenate([sizes, sizes], axis=1)
    cut, around = boxes.clip(0, limits), others.clip(0, limits)
    sides = np.maximum(cut[:, 2:] - cut[:, :2], around[:, 2:] - around[:, :2])
    allowed = np.maximum(_BOX_PIXELS, _BOX_SHARE * np.concatenate([sides, sides], axis=1))
    differ: np.ndarray = (np.abs(cut - around) > allowed).any(axis=1)
    return differ


def box_differs(box: Sequence[float], mask_box: Sequence[float], image: ImageRecord) -> bool:
    """Return whether an ``xyxy`` box is elsewhere than its mask's, as :func:`boxes_differ`."""
    sizes = np.array([[image.width, image.height]])
    return bool(boxes_differ(np.array([box], float), np.array([mask_box], float), sizes)[0])


def area_differs(area: Any, pixels: float) -> bool:
    """Return whether an annotation's area, where it is a proper one, is not that of its mask."""
    if not is_area(area):
        return False
    return bool(abs(area - pixels) > max(_AREA_PIXELS, _AREA_SHARE * max(area, pixels)))


def crosses_itself(polygon: Sequence[float]) -> bool:
    """Return whether two edges of a closed polygon ``x0, y0, x1, y1, ...`` cross; touching is not crossing.

    Edges are compared with those that they share an x with; where these are too many, the answer is no.
    """
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    count = len(points)
    if count < 4:
        return False
    start, end = points, np.roll(points, -1, axis=0)
    left, right = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
    order = np.argsort(left)
    start, end, right = start[order], end[order], right[order]
    others = np.searchsorted(left[order], right, side="right") - np.arange(count) - 1
    firsts = np.concatenate([[0], np.cumsum(others)])
    if firsts[-1] > _MOST_PAIRS:
        return False
    for pair in range(0, int(firsts[-1]), _PAIRS):
        pairs = np.arange(pair, min(pair + _PAIRS, firsts[-1]))
        one = np.searchsorted(firsts, pairs, side="right") - 1
        other = pairs - firsts[one] + one + 1
        if _cross(start[one], end[one], start[other], end[other]).any():
            return True
    return False


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return whether segments ab and cd share an inner point: each has the other's ends on both sides."""
    return (_side(a, b, c) * _side(a, b, d) < 0) & (_side(c, d, a) * _side(c, d, b) < 0)


def _side(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return 1, 0 or -1 for p left of, on or right of the line ab."""
    (ux, uy), (vx, vy) = np.moveaxis(b - a, -1, 0), np.moveaxis(p - a, -1, 0)
    return np.sign(ux * vy - uy * vx)
