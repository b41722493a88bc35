"""Build COCO content from what the reader of a format finds; every object passes COCO's rules at once."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from ...errors import UserError
from ..coco.canonical import Notes
from ..coco.faults import DataError
from ..coco.rules import MOST_CATEGORIES, Rules, is_polygon
from ..coco.tables import ImageRecord
from ..coco.values import has_fraction_box, is_larger_than_fractions
from .image_index import ImageIndex, image_size
from .shapes import box_polygon, encode_bitmap

PARTS = ("train", "val", "test")
WHOLE = "all"  # the part of data that have none
PART_WORDS = {  # names of folders and keys
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}

# The largest share of boxes within the first pixel of the image in a format of pixels.
_FEW = 0.05


@dataclass(frozen=True)
class Shape:
    """A drawn shape in pixels of the image.

    Attributes:
        label: name of the class.
        what: names it in messages, such as ``shape 3 (counted from 0)``.
        box: ``xyxy``.
        polygons: ``x0, y0, x1, y1, ...`` each.
        bitmap: (h, w) and the column and row of its corner.
        rle: COCO's compressed RLE of the image's size.
        group: shapes of one image with the same label and group are parts of one object.
    """

    label: str
    what: str
    box: tuple[float, float, float, float] | None = None
    polygons: Sequence[list[float]] = ()
    bitmap: tuple[np.ndarray, int, int] | None = None
    rle: dict[str, Any] | None = None
    group: Hashable = None


@dataclass(frozen=True)
class SourceImage:
    """An image with the rules that name its label file."""

    record: ImageRecord
    part: str
    rules: Rules


@dataclass
class Imported:
    """Data of another format as COCO content.

    Attributes:
        name: of the format.
        folder: to which the file names are relative.
        parts: COCO content by ``train``, ``val`` and ``test``, or by ``all``.
        notes: what was changed or left out.
        sources: the files that were read.
    """

    name: str
    folder: Path
    parts: dict[str, dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    sources: set[Path] = field(default_factory=set)


class Builder:
    """Collects images, objects and notes of one dataset.

    Args:
        name: of the format, for messages.
        index: of the images.
        classes: names in their order; None if the labels name them, which are sorted then.
    """

    def __init__(self, name: str, index: ImageIndex, classes: Sequence[str] | None = None) -> None:
        self.name, self.index = name, index
        self.classes = None if classes is None else list(classes)
        self._known = frozenset(classes or ())
        self.sources: set[Path] = set()
        self.images: dict[Path, SourceImage] = {}
        self.objects: list[tuple[SourceImage, str, dict[str, Any]]] = []
        self._notes = Notes()
        self.note = self._notes.add

    def find_image(self, name: str, source: Path, what: str) -> Path:
        """Return the file that labels name; see :meth:`ImageIndex.find`."""
        path, moved = self.index.find(name, source.parent, f"{source}: {what}")
        if moved:
            self.note("images whose path is another one here are taken by their name", name)
        return path

    def add_image(
        self,
        path: Path | str,
        source: Path,
        what: str,
        part: str = WHOLE,
        size: tuple[int, int] | None = None,
    ) -> SourceImage:
        """Add an image; its header is read.

        Args:
            path: of the image; its name in the labels, as text, is looked for by :meth:`find_image`.
            source: its label file, or the image itself.
            what: names the entry in messages.
            part: of the data.
            size: (width, height) in the labels; None if they have none.

        Raises:
            UserError: the image is damaged, has another size, or was added before.
        """
        self.sources.add(source)
        path = self.index.place(self.find_image(path, source, what) if isinstance(path, str) else path)
        if path in self.images:
            other = self.images[path].rules.path
            where = "the same file" if other == source else f"{other} has labels for it, too"
            raise UserError(
                "damaged-labels", f"{source}: {what} repeats the image {path}: {where}; keep one of them"
            )
        upright, stored = image_size(path)
        if size is not None and size not in (upright, stored):
            raise DataError(
                "size-differs",
                f"{source}: {what} has the size {size[0]}x{size[1]} (width x height), but {path} has "
                f"{upright[0]}x{upright[1]}; take the image that was labelled, or correct the size",
            )
        width, height = size or upright
        record = ImageRecord(len(self.images) + 1, str(path), height, width)
        self.images[path] = SourceImage(record, part, Rules(source, evaluation=True))
        return self.images[path]

    def add(self, image: SourceImage, shapes: Iterable[Shape]) -> None:
        """Add the objects of an image; a UserError names an unknown class, or a shape that breaks a rule."""
        groups: dict[Hashable, list[Shape]] = {}
        for number, shape in enumerate(shapes):
            if not shape.label.strip():
                raise image.rules.error("malformed", f"{shape.what} has no class; name it")
            if self.classes is not None and shape.label not in self._known:
                known = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
                raise image.rules.error(
                    "dangling-category",
                    f"{shape.what} has the class {shape.label!r}, which is not one of {known}; add it to the "
                    "list of classes, or correct the label",
                )
            key = ("alone", number) if shape.group is None else (shape.label, shape.group)
            groups.setdefault(key, []).append(shape)
        for parts in groups.values():
            if len(parts) > 1:
                self.note(
                    "objects have several shapes, joined by their group",
                    f"{image.rules.path}: {parts[0].what}",
                )
            entry = self._entry(image, parts)
            if entry is not None:
                self.objects.append((image, parts[0].label, entry))

    def _entry(self, image: SourceImage, parts: list[Shape]) -> dict[str, Any] | None:
        """Return bbox, area and segmentation of an object; None for one without a pixel."""
        record, rules, what = image.record, image.rules, parts[0].what
        boxes = [part.box for part in parts if part.box is not None]
        if not any(part.polygons or part.bitmap or part.rle for part in parts):
            try:
                x0, y0, x1, y1 = (
                    f(side) for f, side in zip((min, min, max, max), zip(*boxes, strict=True), strict=True)
                )
                rules.box({"bbox": (box := _trimmed([x0, y0, x1 - x0, y1 - y0]))}, record, what)
            except DataError as error:
                if error.code != "box-empty":
                    raise
                self.note("boxes without width or height are left out", f"{rules.path}: {what}")
                return None
            return {"bbox": box, "area": box[2] * box[3], "segmentation": []}
        polygons = [list(polygon) for part in parts for polygon in part.polygons]
        polygons += [box_polygon(*box) for box in boxes]
        mask: Any = polygons
        size = (record.height, record.width)
        codes: list[Any] = [part.rle for part in parts if part.rle is not None]
        codes += [encode_bitmap(*part.bitmap, *size) for part in parts if part.bitmap is not None]
        if codes:
            if drawn := [polygon for polygon in polygons if is_polygon(polygon)]:
                rules.segmentation(drawn, record, what)
                codes += coco_mask.frPyObjects(drawn, *size)
            mask = codes[0]
            if len(codes) > 1:
                mask = {"size": list(size), "counts": coco_mask.merge(codes)["counts"].decode("ascii")}
        found = rules.segmentation(mask, record, what)
        x0, y0, x1, y1 = found.box if found else (0, 0, 0, 0)
        if x1 <= x0 or y1 <= y0:
            self.note(
                "masks without a pixel in the image are left out: less than 3 points, or outside of it",
                f"{rules.path}: {what}",
            )
            return None
        mask = found.encoded if found.rle else found.polygons
        return {"bbox": _trimmed([x0, y0, x1 - x0, y1 - y0]), "area": found.area, "segmentation": mask}

    def finish(self) -> Imported:
        """Return the dataset.

        Raises:
            UserError: there is no image, there are too many classes, or boxes are fractions of their images.
        """
        if not self.images:
            raise UserError(
                "empty-list", f"{self.index.root}: {self.name} without an image; check the folder"
            )
        names = self.classes
        if names is None:
            names = sorted({label for _, label, _ in self.objects})
        names = names or ["object"]
        if len(names) > MOST_CATEGORIES:
            raise UserError(
                "malformed", f"{self.name} in {self.index.root}: more than {MOST_CATEGORIES} classes"
            )
        self._check_unit()
        if any(entry["segmentation"] for _, _, entry in self.objects):
            for image, _, entry in self.objects:
                if not entry["segmentation"]:
                    x, y, width, height = entry["bbox"]
                    entry["segmentation"] = [box_polygon(x, y, x + width, y + height)]
                    text = "boxes become rectangular masks, because other objects have masks"
                    self.note(text, image.rules.path.name)
        folder = self.index.common_folder(self.images)
        order = {label: number for number, label in enumerate(names, 1)}
        categories = [{"id": number, "name": label} for label, number in order.items()]
        part_of = self._parts()
        parts: dict[str, dict[str, Any]] = {}
        for path, image in self.images.items():
            empty = {"images": [], "annotations": [], "categories": categories}
            content, record = parts.setdefault(part_of[path], empty), image.record
            name = Path(os.path.relpath(record.file_name, folder)).as_posix()
            content["images"].append(
                {"id": record.id, "file_name": name, "height": record.height, "width": record.width}
            )
        for number, (image, label, entry) in enumerate(self.objects, 1):
            head = {"id": number, "image_id": image.record.id, "category_id": order[label], "iscrowd": 0}
            parts[part_of[Path(image.record.file_name)]]["annotations"].append(head | entry)
        labelled = {image.record.id for image, _, _ in self.objects}
        for path, image in self.images.items():
            if image.record.id not in labelled:
                self.note("images have no object", str(path))
        ordered = {part: parts[part] for part in (*PARTS, WHOLE) if part in parts}
        return Imported(self.name, folder, ordered, list(map(str, self._notes.values())), self.sources)

    def _parts(self) -> dict[Path, str]:
        """Return the part of each image: its own, or by folders such as train and val, if all lie in one."""
        own = {path: image.part for path, image in self.images.items()}
        if set(own.values()) != {WHOLE}:
            return own
        files = {path: image.rules.path for path, image in self.images.items()}
        root = os.path.commonpath([os.path.abspath(file.parent) for file in files.values()])
        named = {}
        for path, file in files.items():
            folders = Path(os.path.relpath(file.parent, root)).parts
            named[path] = next(
                (PART_WORDS[name.lower()] for name in folders if name.lower() in PART_WORDS), ""
            )
        return named if all(named.values()) else own

    def _check_unit(self) -> None:
        """Refuse pixels that are fractions: each format has one unit, and none is guessed."""
        small = []
        for image, _, entry in self.objects:
            size = {"height": image.record.height, "width": image.record.width}
            if is_larger_than_fractions(size) and has_fraction_box(entry):
                small.append(image)
        if len(small) > _FEW * len(self.objects):
            raise UserError(
                "fractions",
                f"{small[0].rules.path}: {len(small)} of {len(self.objects)} objects are smaller than a "
                f"pixel, as if they were fractions of the image; {self.name} has pixels: correct the labels",
            )


def _trimmed(numbers: Sequence[float]) -> list[float]:
    """Return numbers without the noise of their last digits: 8.000000000000002 becomes 8."""
    return [round(float(number), 6) for number in numbers]
