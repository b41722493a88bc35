"""Write a repaired copy of an annotation file. What only a person can decide is left as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import UserError
from ..coco.canonical import has_mask
from ..coco.faults import DataError
from ..coco.rules import MOST_CATEGORIES, Rules, Segmentation, id_of, is_polygon, shown
from ..coco.tables import ImageRecord
from ..coco.values import extent_of, is_area, is_integer
from .checks import BORDER, area_differs, box_differs, overhang, repeated
from .reading import Probes

# A box reaches out of its picture by this part of the longer side only if it was drawn on a larger picture.
_FAR_OUT = 0.1

# The largest part of a file's objects or images that is removed without --drop.
MOST_REMOVED = 0.05

_NOUNS = {"images": "image", "annotations": "annotation", "categories": "category"}
_IDS_SHOWN = 10


@dataclass
class Repair:
    """A repaired copy.

    Attributes:
        before: number of entries of each list in the old file.
        changes, removals: one line for each.
        num_changes: mended entries.
        removed: ids of removed entries, by list; entries without one by their position.
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

    def drop(self, key: str, entry: Any, position: int, kept: Collection[int], reason: str) -> None:
        """Note that an entry of a list was removed; ``kept`` are the ids of those that were not."""
        entry_id = id_of(entry)
        own = entry_id is not None and entry_id not in kept
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
                    "lossy-repair",
                    f"--fix would leave none of the {self.before[key]} {key} of {rules.path}, so it wrote "
                    f"nothing; {folder}correct what is listed",
                )
        rules.whole(self.content)
        shares = [len(self.removed[key]) / max(self.before[key], 1) for key in ("annotations", "images")]
        if not dropping and max(shares) > MOST_REMOVED:
            lost = " and ".join(self._lost(key) for key in _NOUNS if self.removed[key])
            raise UserError(
                "lossy-repair",
                f"--fix would remove {lost} of {rules.path}, so it wrote nothing; correct them, or add "
                "--drop to go on without them",
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
        content: of a COCO file in canonical form; it is not changed.
        rules: for its entries.
        probes: of its images by path; None if they were not opened.
        leaked: paths of images to leave out.
        masks: objects without a usable mask are removed.
        crowds: crowds stay crowds; each becomes an object otherwise.
    """
    mender = _Mender(Repair.of(content), replace(rules), probes, leaked, masks, crowds)
    mender.mend("categories", mender.category, mender.category_ids)
    mender.mend("images", mender.image, mender.records)
    mender.mend("annotations", mender.annotation, mender.annotation_ids)
    return mender.done


@dataclass
class _Mender:
    """Mends categories, images and annotations, in this order."""

    done: Repair
    rules: Rules
    probes: Probes | None
    leaked: Collection[str]
    keep_masks: bool
    keep_crowds: bool
    category_ids: set[int] = field(default_factory=set)
    records: dict[int, ImageRecord] = field(default_factory=dict)
    annotation_ids: set[int] = field(default_factory=set)
    objects: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        entries = self.done.content["annotations"]
        self.used_categories = {id_of(entry, "category_id") for entry in entries}
        self.used_by: dict[int | None, list[dict[str, Any]]] = {}  # annotations by image id
        for entry in entries:
            self.used_by.setdefault(id_of(entry, "image_id"), []).append(entry)
        self.free = max([0, *(i for entry in entries if (i := id_of(entry)) is not None)]) + 1

    def mend(self, key: str, mend: Callable[[Any, int], Any], kept_ids: Collection[int]) -> None:
        """Mend the entries of a list; drop those that ``mend`` refuses."""
        kept, done = [], self.done
        for position, entry in enumerate(done.content[key]):
            before = len(done.changes), done.num_changes, len(done.removals)
            try:
                kept.append(mend(entry, position))
            except DataError as error:
                del done.changes[before[0] :], done.removals[before[2] :]  # of an entry that goes
                done.num_changes = before[1]
                done.drop(key, entry, position, kept_ids, error.detail)
        done.content[key] = kept

    def category(self, entry: Any, position: int) -> Any:
        category_id = id_of(entry)
        if category_id is None or category_id in self.category_ids:
            raise DataError("malformed", f"entry {position} (counted from 0) has no id of its own")
        if self.done.before["categories"] > MOST_CATEGORIES and category_id not in self.used_categories:
            raise DataError(
                "malformed",
                f"category {category_id} has no object, and more than {MOST_CATEGORIES} are too many",
            )
        if not isinstance(entry.get("name"), str):
            entry = {**entry, "name": f"category {category_id}"}
            self.done.mend(f"category {category_id}", f"named {entry['name']!r}")
        self.category_ids.add(category_id)
        return entry

    def image(self, entry: Any, position: int) -> Any:
        entry = self._with_size_of_file(entry)
        record = self.rules.image(entry, position)
        if record.id in self.records:
            raise DataError("duplicate-image-id", f"image {record.id}: the id is another's")
        if record.file_name in self.leaked:
            raise DataError("malformed", f"image {record.id}: it is in another part, too")
        probe = None if self.probes is None else self.probes[record.file_name]
        if probe is not None and probe.error is not None:
            raise probe.error
        self.records[record.id] = record
        return entry

    def _with_size_of_file(self, entry: Any) -> Any:
        if self.probes is None or not isinstance(entry, dict):
            return entry
        probe = self.probes.get(str(self.rules.folder / str(entry.get("file_name"))))
        given: tuple[Any, Any] = (entry.get("height"), entry.get("width"))
        if probe is None or not probe.sizes:
            return entry
        if given in probe.sizes and all(map(is_integer, given)):  # 48.0 equals 48, and is no size
            return entry
        what, image_id = f"image {entry.get('id')}", id_of(entry)
        used = [] if image_id is None else self.used_by.get(image_id, [])
        factors = [factor for size in probe.sizes if (factor := _resize_factor(given, size))]
        if used and factors and _fit(used, *given, border=_FAR_OUT * max(given)):
            raise DataError(
                "size-differs",
                f"{what}: the file is the annotated picture resized by {factors[0]:.2f}; "
                "scale its annotations or restore the file",
            )
        if not _fit(used, *probe.sizes[0]):
            raise DataError(
                "size-differs", f"{what}: its size is wrong, and annotations do not fit into the file's"
            )
        height, width = probe.sizes[0]
        self.done.mend(what, f"size {given} becomes {(height, width)} (height, width)")
        return {**entry, "height": height, "width": width}

    def annotation(self, entry: Any, position: int) -> dict[str, Any]:
        named = ""
        if isinstance(entry, dict):
            given = id_of(entry)
            if given is None or (given in self.annotation_ids and not self.rules.ids_may_repeat):
                named = f"annotation {position} (counted from 0)"
                self.done.mend(named, f"new id {self.free}")
                entry = {**entry, "id": self.free}
                self.free += 1
        annotation_id, image_id = self.rules.ids(entry, position)
        what = f"{named or f'annotation {annotation_id}'} of image {image_id}"
        if image_id not in self.records:
            raise DataError("dangling-image", f"{what}, which is not there")
        image, entry = self.records[image_id], dict(entry)
        category_id = self.rules.category_id(entry, self.category_ids, what)
        self._mend_flags(entry, what)
        mask = self._mend_mask(entry, image, what)
        self._mend_box(entry, mask, image, what)
        self._mend_area(entry, mask, what)
        other = repeated(self.objects, (image_id, category_id, *entry["bbox"]), entry)
        if other is not None:
            raise DataError("malformed", f"{what} repeats annotation {other['id']}")
        self.annotation_ids.add(annotation_id)
        return entry

    def _mend_flags(self, entry: dict[str, Any], what: str) -> None:
        if entry.get("ignore", 0) != 0:
            if _is_set(entry.pop("ignore")):
                self.done.mend(what, "'ignore' becomes 'iscrowd' 1")
                entry["iscrowd"] = 1
            else:
                self.done.mend(what, "'ignore', which says neither, removed")
        if entry.get("iscrowd") not in (0, 1):
            value = int(_is_set(entry.get("iscrowd")))
            self.done.mend(what, f"'iscrowd' {value}")
            entry["iscrowd"] = value
        if entry["iscrowd"] and not self.keep_crowds:
            self.done.mend(what, "'iscrowd' 0: the crowd becomes an object")
            entry["iscrowd"] = 0

    def _mend_mask(self, entry: dict[str, Any], image: ImageRecord, what: str) -> Segmentation | None:
        """Drop bad polygons, encode those of crowds; return None for an object without a mask."""
        given = entry.get("segmentation")
        if not self.keep_masks and not has_mask(entry):
            return None
        if isinstance(given, list):
            good = [p for p in given if isinstance(p, list) and is_polygon(p) and extent_of(p) is not None]
            if good and len(good) < len(given):
                lost = f"{len(given) - len(good)} of {len(given)} polygons removed"
                self.done.removals.append(f"{what}: {lost}, which cannot be drawn")
                entry["segmentation"] = given = good
        try:
            mask = self.rules.segmentation(given, image, what)
            if not mask or mask.area == 0:
                raise DataError("malformed", f"{what} has a mask without a pixel")
        except DataError:
            if self.keep_masks:
                raise
            self.done.removals.append(f"{what}: its unusable mask removed; the box stays")
            del entry["segmentation"]
            return None
        if entry["iscrowd"] and mask.polygons:
            self.done.mend(what, "the crowd's polygons become an RLE")
            entry["segmentation"] = mask.encoded
        return mask

    def _mend_box(
        self, entry: dict[str, Any], mask: Segmentation | None, image: ImageRecord, what: str
    ) -> None:
        box: list[float] = []
        with suppress(DataError):
            box = self.rules.box(entry, image, what)
        if box and overhang(box, image) <= BORDER and not (mask and box_differs(box, mask.box, image)):
            return
        if mask:
            box = mask.box
        if not box:
            raise DataError("bad-box", f"{what} has no usable box and no mask")
        x0, y0 = max(box[0], 0), max(box[1], 0)
        x1, y1 = min(box[2], image.width), min(box[3], image.height)
        self.done.mend(what, f"bbox {entry.get('bbox')} becomes {[x0, y0, x1 - x0, y1 - y0]}")
        entry["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        self.rules.box(entry, image, what)

    def _mend_area(self, entry: dict[str, Any], mask: Segmentation | None, what: str) -> None:
        area = entry.get("area")
        if is_area(area) and (not mask or entry["iscrowd"] or not area_differs(area, mask.area)):
            return
        entry["area"] = mask.area if mask else entry["bbox"][2] * entry["bbox"][3]
        if area is not None:  # a missing one is a note of the reader
            self.done.mend(what, f"area {shown(area)} becomes {entry['area']}")


def _is_set(flag: Any) -> bool:
    return str(flag).strip().lower() in ("1", "1.0", "true", "yes")


def _fit(annotations: Sequence[dict[str, Any]], height: int, width: int, border: float = BORDER) -> bool:
    """Return whether RLE have this size, and no box reaches out of it by more than ``border`` pixels."""
    record = ImageRecord(0, "", height, width)
    for entry in annotations:
        box, mask = entry.get("bbox"), entry.get("segmentation")
        if isinstance(mask, dict) and mask.get("size") != [height, width]:
            return False
        if isinstance(box, list) and len(box) == 4 and extent_of(box) is not None:
            x, y, box_width, box_height = box
            if overhang([x, y, x + box_width, y + box_height], record) > border:
                return False
    return True


def _resize_factor(given: tuple[Any, Any], found: tuple[int, int]) -> float | None:
    """Return the factor by which a picture of (height, width) ``given`` was resized to ``found``.

    Sides may be rounded by a pixel of the smaller picture. None where it is no resize: where a side is only a
    pixel off, the size was written down wrongly, and annotations are where they should be.
    """
    if not all(is_integer(side) and side > 0 for side in given):
        return None
    factor = sum(found) / sum(given)
    rounded = max(1.0, factor)
    pairs = list(zip(given, found, strict=True))
    if any(abs(new - old) <= 1 or abs(new - factor * old) > rounded for old, new in pairs):
        return None
    return factor
