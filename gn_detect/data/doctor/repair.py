"""A repaired copy of an annotation file. What cannot be decided without a person is left as it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ...errors import UserError
from ..coco.canonical import has_mask
from ..coco.faults import DataError
from ..coco.image_table import ImageRecord
from ..coco.reader import ids_may_repeat
from ..coco.rules import MOST_CATEGORIES, Rules, is_area, is_coordinate, is_integer, is_polygon, shown
from .checks import BORDER, area_disagrees, box_disagrees, overhang
from .images import Probes
from .masks import MaskMeasures, measure_mask

T = TypeVar("T")

_FAR_OUT = 0.1
"""Part of the longer side by which a box reaches out of its picture only if it was drawn on a larger one."""


MOST_REMOVED = 0.05
"""Part of a file's objects or images that is removed without being asked to."""

_NOUNS = {"images": "image", "annotations": "annotation", "categories": "category"}
_IDS_SHOWN = 10


@dataclass
class Repair:
    """A repaired copy.

    Attributes:
        content: of the new file.
        before: number of entries of each list in the old one.
        changes: one line for each thing that was mended.
        num_changes: entries that were mended.
        removals: one line for each thing that was removed.
        removed: ids of the entries that were removed, by list; entries without one by their position.
    """

    content: dict[str, Any]
    before: dict[str, int]
    changes: list[str] = field(default_factory=list)
    num_changes: int = 0
    removals: list[str] = field(default_factory=list)
    removed: dict[str, list[Any]] = field(default_factory=lambda: {key: [] for key in _NOUNS})

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Repair:
        """Return a copy in which nothing is changed yet."""
        return cls(dict(content), {key: len(content[key]) for key in _NOUNS})

    def mend(self, what: str, change: str) -> None:
        """Note that something was mended."""
        self.changes.append(f"{what}: {change}")
        self.num_changes += 1

    def drop(self, key: str, entry: Any, position: int, kept: Collection[int], reason: Any) -> None:
        """Note that an entry of a list was removed; ``kept`` are the ids of those that were not."""
        entry_id = entry.get("id") if isinstance(entry, dict) else None
        own = is_integer(entry_id) and entry_id not in kept
        self.removed[key].append(entry_id if own else f"{position} counted from 0")
        self.removals.append(f"{_NOUNS[key]} removed: {reason}")

    def check(self, rules: Rules, dropping: bool) -> None:
        """Refuse to write a copy without what a training needs, or one that lost more than a little.

        Args:
            rules: of the file.
            dropping: what cannot be mended may be removed, however much that is.

        Raises:
            UserError: nothing of a list would be left, too much would be removed, or the file as a whole is
                still refused.
        """
        for key in _NOUNS:
            if self.before[key] and self.before[key] == len(self.removed[key]):
                folder = f"check that --images {rules.folder} is their folder; " if key == "images" else ""
                raise UserError(
                    f"--fix would leave none of the {self.before[key]} {key} of {rules.path}, so it wrote "
                    f"nothing; {folder}correct what is listed"
                )
        rules.whole(self.content)
        shares = [len(self.removed[key]) / max(self.before[key], 1) for key in ("annotations", "images")]
        if not dropping and max(shares) > MOST_REMOVED:
            lost = " and ".join(self._lost(key) for key in _NOUNS if self.removed[key])
            raise UserError(
                f"--fix would remove {lost} of {rules.path}, so it wrote nothing; correct them, or add "
                "--drop to go on without them"
            )

    def _lost(self, key: str) -> str:
        ids = list(map(str, self.removed[key]))
        listed = ", ".join(ids[:_IDS_SHOWN]) + (", ..." if len(ids) > _IDS_SHOWN else "")
        return f"{len(ids)} of {self.before[key]} {key} (id {listed})"


def repair(
    content: Mapping[str, Any],
    rules: Rules,
    probes: Probes | None,
    leaked: Collection[str] = (),
    masks: bool = True,
    crowds: bool = True,
) -> Repair:
    """Mend what :data:`.faults.FAULTS` says can be mended.

    Args:
        content: of a COCO file in canonical form; it is left as it is.
        rules: for its entries.
        probes: of its images by path; None if they were not opened.
        leaked: paths of images to leave out.
        masks: objects without a usable mask are removed.
        crowds: crowds stay crowds; each becomes an object otherwise.
    """
    done, rules = Repair.of(content), replace(rules)
    done.content["categories"], names = _categories(content, rules, done)
    images = _Images(rules, probes, leaked, _uses(content["annotations"]), done)
    done.content["images"] = images.mend(content["images"])
    annotations = _Annotations(rules, names, images.records, masks, crowds, done)
    done.content["annotations"] = annotations.mend(content["annotations"])
    return done


def _categories(content: Mapping[str, Any], rules: Rules, done: Repair) -> tuple[list[Any], set[int]]:
    kept: list[Any] = []
    ids: set[int] = set()
    entries = content["categories"]
    used: set[int] | None = None
    if len(entries) > MOST_CATEGORIES:
        objects = [entry.get("category_id") for entry in content["annotations"] if isinstance(entry, dict)]
        used = set(filter(is_integer, objects))
    for position, entry in enumerate(entries):
        category_id = entry.get("id") if isinstance(entry, dict) else None
        if category_id is None or not is_integer(category_id) or category_id in ids:
            done.drop(
                "categories", entry, position, ids, f"entry {position} (counted from 0) has no id of its own"
            )
            continue
        if used is not None and category_id not in used:
            reason = f"category {category_id} has no object, and more than {MOST_CATEGORIES} are too many"
            done.drop("categories", entry, position, ids, reason)
            continue
        if not isinstance(entry.get("name"), str):
            entry = {**entry, "name": f"category {category_id}"}
            done.mend(f"category {category_id}", f"named {entry['name']!r}")
        ids.add(category_id)
        kept.append(entry)
    return kept, ids


def _uses(annotations: list[Any]) -> dict[Any, list[dict[str, Any]]]:
    """Annotations by image id."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for entry in annotations:
        if isinstance(entry, dict) and is_integer(entry.get("image_id")):
            found.setdefault(entry["image_id"], []).append(entry)
    return found


class _Images:
    def __init__(
        self,
        rules: Rules,
        probes: Probes | None,
        leaked: Collection[str],
        used: Mapping[Any, list[dict[str, Any]]],
        done: Repair,
    ) -> None:
        self.rules, self.probes, self.leaked, self.used = rules, probes, leaked, used
        self.done = done
        self.records: dict[int, ImageRecord] = {}

    def mend(self, entries: list[Any]) -> list[Any]:
        kept = []
        for position, entry in enumerate(entries):
            try:
                mended = self._mend_one(entry)
                record = self.rules.image(mended, position)
                if record.id in self.records:
                    raise DataError(f"image {record.id}: the id is another's")
                if record.file_name in self.leaked:
                    raise DataError(f"image {record.id}: it is in another part, too")
                probe = None if self.probes is None else self.probes[record.file_name]
                if probe is not None and probe.error is not None:
                    raise probe.error
            except DataError as error:
                self.done.drop("images", entry, position, self.records, _without_path(error, self.rules))
                continue
            self.records[record.id] = record
            kept.append(mended)
        return kept

    def _mend_one(self, entry: Any) -> Any:
        """With the file's size, if it is known."""
        if self.probes is None or not isinstance(entry, dict):
            return entry
        probe = self.probes.get(str(self.rules.folder / str(entry.get("file_name"))))
        given: tuple[Any, Any] = (entry.get("height"), entry.get("width"))
        if probe is None or not probe.sizes:
            return entry
        if given in probe.sizes and all(map(is_integer, given)):  # 48.0 equals 48, and is no size
            return entry
        what = f"image {entry.get('id')}"
        used = self.used.get(entry.get("id"), ())
        factors = [factor for size in probe.sizes if (factor := _resize_factor(given, size))]
        if used and factors and _fit(used, *given, border=_FAR_OUT * max(given)):
            raise DataError(
                f"{what}: the file is the annotated picture resized by {factors[0]:.2f}; "
                "scale its annotations or restore the file"
            )
        if not _fit(used, *probe.sizes[0]):
            raise DataError(f"{what}: its size is wrong, and annotations do not fit into the file's")
        height, width = probe.sizes[0]
        self.done.mend(what, f"size {given} becomes {(height, width)} (height, width)")
        return {**entry, "height": height, "width": width}


def _is_set(flag: Any) -> bool:
    return str(flag).strip().lower() in ("1", "1.0", "true", "yes")


def _fit(annotations: Sequence[dict[str, Any]], height: int, width: int, border: float = BORDER) -> bool:
    """Whether all RLE have height x width pixels, and no box reaches out of them by more than ``border``."""
    record = ImageRecord(0, "", height, width)
    for entry in annotations:
        box, mask = entry.get("bbox"), entry.get("segmentation")
        if isinstance(mask, dict) and mask.get("size") != [height, width]:
            return False
        if isinstance(box, list) and len(box) == 4 and all(map(is_coordinate, box)):
            x, y, box_width, box_height = box
            if overhang([x, y, x + box_width, y + box_height], record) > border:
                return False
    return True


def _resize_factor(given: tuple[Any, Any], found: tuple[int, int]) -> float | None:
    """By which a picture of (height, width) ``given`` was resized to ``found``; None if that is no resize.

    Sides may be rounded by a pixel of the smaller picture. Where a side is only a pixel off, the size was
    written down wrongly, and annotations are where they should be.
    """
    if not all(is_integer(side) and side > 0 for side in given):
        return None
    factor = sum(found) / sum(given)
    rounded = max(1.0, factor)
    pairs = list(zip(given, found, strict=True))
    if any(abs(new - old) <= 1 or abs(new - factor * old) > rounded for old, new in pairs):
        return None
    return factor


class _Annotations:
    def __init__(
        self,
        rules: Rules,
        categories: Collection[int],
        images: Mapping[int, ImageRecord],
        masks: bool,
        crowds: bool,
        done: Repair,
    ) -> None:
        self.rules, self.categories, self.images, self.masks = rules, categories, images, masks
        self.crowds, self.done = crowds, done
        self.ids: set[int] = set()
        self.first: dict[tuple[Any, ...], dict[str, Any]] = {}

    def mend(self, entries: list[Any]) -> list[Any]:
        ids = [entry["id"] for entry in entries if isinstance(entry, dict) and is_integer(entry.get("id"))]
        self.free = max([0, *ids]) + 1
        kept = []
        done = self.done
        for position, entry in enumerate(entries):
            before = len(done.changes), done.num_changes, len(done.removals)
            try:
                kept.append(self._mend_one(entry, position))
            except (DataError, ValueError) as error:
                del done.changes[before[0] :], done.removals[before[2] :]  # of an entry that goes
                done.num_changes = before[1]
                done.drop("annotations", entry, position, self.ids, _without_path(error, self.rules))
        return kept

    def _mend_one(self, entry: Any, position: int) -> dict[str, Any]:
        named = ""
        if isinstance(entry, dict) and (not is_integer(entry.get("id")) or self._repeats(entry["id"])):
            named = f"annotation {position} (counted from 0)"
            self.done.mend(named, f"new id {self.free}")
            entry = {**entry, "id": self.free}
            self.free += 1
        annotation_id, image_id = self.rules.ids(entry, position)
        what = f"{named or f'annotation {annotation_id}'} of image {image_id}"
        if image_id not in self.images:
            raise DataError(f"{what}, which is not there")
        image, entry = self.images[image_id], dict(entry)
        category_id = self.rules.category_id(entry, self.categories, what)
        self._mend_flags(entry, what)
        measures = self._mend_mask(entry, image, what)
        self._mend_box(entry, measures, image, what)
        self._mend_area(entry, measures, what)
        other = self.first.setdefault((image_id, category_id, *entry["bbox"]), entry)
        if other is not entry and other.get("segmentation") == entry.get("segmentation"):
            raise DataError(f"{what} repeats annotation {other['id']}")
        self.ids.add(annotation_id)
        return entry

    def _repeats(self, annotation_id: int) -> bool:
        return annotation_id in self.ids and not ids_may_repeat(self.rules.path)

    def _mend_flags(self, entry: dict[str, Any], what: str) -> None:
        if entry.get("ignore", 0) != 0:
            if _is_set(entry.pop("ignore")):
                self.done.mend(what, "'ignore' becomes 'iscrowd' 1")
                entry["iscrowd"] = 1
            else:
                self.done.mend(what, "'ignore', which says neither, removed")
        if "iscrowd" not in entry or entry["iscrowd"] not in (0, 1):
            value = int(_is_set(entry.get("iscrowd")))
            self.done.mend(what, f"'iscrowd' {value}")
            entry["iscrowd"] = value
        if entry["iscrowd"] and not self.crowds:
            self.done.mend(what, "'iscrowd' 0: the crowd becomes an object")
            entry["iscrowd"] = 0

    def _mend_mask(self, entry: dict[str, Any], image: ImageRecord, what: str) -> MaskMeasures | None:
        """Drops bad polygons, encodes those of crowds; None for an object without a mask, if that may be."""
        given = entry.get("segmentation")
        if not self.masks and not has_mask(entry):
            return None
        if isinstance(given, list):
            good = [p for p in given if isinstance(p, list) and all(map(is_coordinate, p)) and is_polygon(p)]
            if good and len(good) < len(given):
                lost = f"{len(given) - len(good)} of {len(given)} polygons removed"
                self.done.removals.append(f"{what}: {lost}, which cannot be drawn")
                entry["segmentation"] = given = good
        try:
            polygons, rle = self.rules.segmentation(given, image, what)
            measures = measure_mask(polygons, rle, image) if polygons or rle else None
            if measures is None or measures.area == 0:
                raise DataError(f"{what} has a mask without a pixel")
        except DataError:
            if self.masks:
                raise
            self.done.removals.append(f"{what}: its unusable mask removed; the box stays")
            del entry["segmentation"]
            return None
        if entry["iscrowd"] and polygons:
            self.done.mend(what, "the crowd's polygons become an RLE")
            entry["segmentation"] = measures.rle
        return measures

    def _mend_box(
        self, entry: dict[str, Any], measures: MaskMeasures | None, image: ImageRecord, what: str
    ) -> None:
        box = _unless_refused(lambda: self.rules.box(entry, image, what))
        if box and overhang(box, image) <= BORDER and not (measures and box_disagrees(box, measures, image)):
            return
        if measures is not None:
            box = measures.box
        if not box:
            raise DataError(f"{what} has no usable box and no mask")
        x0, y0 = max(box[0], 0), max(box[1], 0)
        x1, y1 = min(box[2], image.width), min(box[3], image.height)
        self.done.mend(what, f"bbox {entry.get('bbox')} becomes {[x0, y0, x1 - x0, y1 - y0]}")
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        self.rules.box(entry, image, what)

    def _mend_area(self, entry: dict[str, Any], measures: MaskMeasures | None, what: str) -> None:
        area = entry.get("area")
        if is_area(area) and (not measures or entry["iscrowd"] or not area_disagrees(area, measures)):
            return
        entry["area"] = measures.area if measures else entry["bbox"][2] * entry["bbox"][3]
        if area is not None:  # a missing one is a note of the reader
            self.done.mend(what, f"area {shown(area)} becomes {entry['area']}")


def _without_path(error: Exception, rules: Rules) -> str:
    return str(error).replace(f"{rules.path}: ", "")


def _unless_refused(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except DataError:
        return None


def output_is_input(output: Path, inputs: Collection[Path]) -> bool:
    """Whether a repaired copy would overwrite what it was made from."""
    return any(os.path.realpath(output) == os.path.realpath(path) for path in inputs)
