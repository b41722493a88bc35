"""Read a COCO file into the arrays that training needs."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import Code, UserError
from ...structures import Target
from ..datasets import DatasetSource
from ..images import read_image
from ..transforms import LabelledImage, Mask, to_target
from .canonical import has_masks
from .crowds import Crowds, count_crowds
from .faults import DataError
from .file_names import missing_names
from .reader import log_notes, read_canonical
from .rules import Rules, stop
from .tables import ImageTable, ObjectRow, build_table, join_tables

logger = logging.getLogger(__name__)


class CocoDataset:
    """Images and objects of one COCO file, or of several joined.

    Annotations are checked when they are read. Crowds are left out of the objects; the evaluation takes them
    from the file.

    Attributes:
        name: joined by ``+`` for joined datasets.
        annotations_path, images_folder: the JSON and the folder of its images (of the first, if joined).
        class_names: by contiguous label.
        category_ids: ids in the JSON by contiguous label, ascending unless :func:`match_classes` gave it the
            labels of a model; None for a class that the JSON does not list.
        images: ordered by image id.
        num_crowds: crowd annotations in the file.
        spelt_images, spelt_categories: the file's own id by id, where the two differ.

    Args:
        source: of the files.
        masks: read segmentations; each object must have one. None: if some object has one.
        evaluation: check also what only COCO's evaluation reads.
        quiet: do not log what the file has in another form, and its crowds.

    Raises:
        UserError: the JSON is not valid COCO.
    """

    def __init__(
        self,
        source: DatasetSource,
        *,
        masks: bool | None = True,
        evaluation: bool = False,
        quiet: bool = False,
    ) -> None:
        self.name = source.name
        self.annotations_path, self.images_folder = source.annotations, source.images
        self._folders: tuple[str, ...] = (os.path.join(source.images, ""),)
        file = read_canonical(source.annotations)
        self.spelt_images: dict[Any, Any] = file.image_ids
        self.spelt_categories: dict[Any, Any] = file.category_ids
        if not quiet:
            log_notes(file)
            crowds = Crowds() if evaluation else count_crowds(file.content)
            if crowds.crowds:
                level = logging.WARNING if crowds.dubious else logging.INFO
                logger.log(level, "%s: %s", file.path, crowds)
        rules = Rules(source.annotations, source.images, evaluation, source.allow_outside)
        try:
            self._read(file.content, rules, has_masks(file.content) if masks is None else masks)
        except DataError as error:
            hint = "" if "gn-detect doctor" in str(error) else " (gn-detect doctor lists all that is wrong)"
            raise DataError(error.code, f"{error}{hint}") from error

    def _read(self, content: Mapping[str, Any], rules: Rules, masks: bool) -> None:
        rules.whole(content)
        names = dict(sorted(rules.categories(content["categories"]).items()))
        self.class_names, self.category_ids = list(names.values()), list[int | None](names)
        images = rules.images(content["images"], partial(_stop_with_name, rules.folder))
        labels = {category_id: label for label, category_id in enumerate(names)}
        self.num_crowds, dropped = 0, Counter[str]()
        objects: dict[int, list[ObjectRow]] = {image_id: [] for image_id in sorted(images)}
        for found in rules.annotations(content["annotations"], images, labels):
            mask = None
            # The evaluation reads every mask, also those of crowds and of empty boxes: what it would refuse
            # after all of the training is refused here.
            if masks and found.image and (rules.evaluation or not (found.crowd or found.box is None)):
                mask = rules.segmentation(found.entry.get("segmentation"), found.image, found.what)
            if found.crowd:
                self.num_crowds += 1
            elif found.box is None or found.category_id is None:
                dropped["whose box has no width or no height"] += 1
            elif masks and not mask:
                dropped["without a polygon of at least 3 points"] += 1
            else:
                parts = (mask.polygons, mask.rle) if mask else ()
                row = ObjectRow(found.id, labels[found.category_id], found.box, *parts)
                objects[found.image_id].append(row)
        for reason, count in dropped.items():
            logger.warning("%s: dropped %d annotation(s) %s", rules.path, count, reason)
        self.images = ImageTable(image for image_id in objects if (image := images[image_id]) is not None)
        self.objects = build_table(list(objects.values()), masks)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return (
            f"CocoDataset({self.name}: {len(self)} images, {len(self.objects.labels)} objects of "
            f"{len(self.class_names)} categories, {self.num_crowds} crowds)"
        )

    def fingerprint(self) -> str:
        """Return counts and a digest of all that training takes from the JSON, wherever the files are.

        It covers, in order, names (relative to the images folder) and sizes of images, boxes, labels and
        masks, but no ids.
        """
        digest = hashlib.sha256()
        for record in self.images:
            name = record.file_name
            folder = next((folder for folder in self._folders if name.startswith(folder)), "")
            name = os.path.normpath(name.removeprefix(folder))
            digest.update(f"{name}\0{record.height}\0{record.width}\0".encode("utf-8", "surrogatepass"))
        table = self.objects
        arrays = [table.first, table.boxes, table.labels]
        if table.masks is not None:
            arrays += [getattr(table.masks, field.name) for field in fields(table.masks)]
        for values in arrays:
            digest.update(np.ascontiguousarray(values).tobytes())
        return f"{len(self)} images, {len(table.labels)} objects, {digest.hexdigest()[:16]}"

    def counts(self) -> np.ndarray:
        """Return (I,), the number of objects in each image."""
        return self.objects.counts()

    def labels(self, index: int) -> np.ndarray:
        """Return (N,) int64, the contiguous labels of the objects in an image."""
        return self.objects.labels[self.objects.rows(index)]

    def read(self, index: int) -> LabelledImage:
        """Return an image as RGB with its objects, in the pixels of the file.

        Raises:
            UserError: the file is missing, damaged or of another size than in the JSON.
        """
        record = self.images[index]
        pixels = read_image(record.file_name, "RGB", (record.height, record.width))
        return self.label(index, pixels)

    def label(self, index: int, pixels: np.ndarray) -> LabelledImage:
        """Return pixels (H, W, 3) with the objects of an image, RLE not yet decoded."""
        record, rows, table = self.images[index], self.objects.rows(index), self.objects.masks
        masks: list[Mask] | None = None
        if table is not None:
            masks = [table.mask(row, record.height, record.width) for row in range(rows.start, rows.stop)]
        return LabelledImage(pixels, self.objects.boxes[rows], self.objects.labels[rows], masks)

    def target(self, index: int) -> Target:
        """Return the ground truth of an image in its pixels, crowds left out; the image is not read."""
        record = self.images[index]
        return to_target(self.label(index, np.empty((record.height, record.width, 0), dtype=np.uint8)))

    def check_files(self) -> None:
        """Look for every image in its folder by listing folders; no file is opened.

        Raises:
            UserError: one is missing; it is named.
        """
        prefix = str(self.images_folder / "_")[:-1]
        missing = missing_names(self.images_folder, (r.file_name.removeprefix(prefix) for r in self.images))
        if missing:
            renamed = [name for name, other in missing.items() if other]
            first, others = (renamed or [*missing])[0], len(renamed or missing) - 1
            what = f"image {self.images_folder / first}" + (f" and {others} more" if others else "")
            code: Code = "missing-image"
            remedy = "; restore it, correct the images folder or remove it from the JSON"
            if renamed:
                code = "misnamed-image"
                there = f", but {missing[first]} is there; correct 'file_name'"
                remedy = f"{there} (gn-detect doctor --fix OUT.json does that)"
            raise DataError(code, f"dataset {self.name}: {what} is missing{remedy}")


def _stop_with_name(folder: Path, error: DataError, about: Mapping[str, Any]) -> None:
    """Raise an error; name the file in the images folder that a name outside of it obviously means."""
    name = str(about.get("file_name"))
    if error.code == "image-outside" and (near := missing_names(folder, [name], outside=False)[name]):
        message = f"{error}; {near} is there: gn-detect doctor --fix OUT.json renames it"
        raise DataError(error.code, message) from error
    stop(error, about)


def join_datasets(datasets: Sequence[CocoDataset]) -> CocoDataset:
    """Join datasets of equal classes (else UserError), their images in order."""
    first = datasets[0]
    if len(datasets) == 1:
        return first
    for other in datasets[1:]:
        check_same_classes(first, other)
    joined = copy(first)
    joined.name = "+".join(d.name for d in datasets)
    joined._folders = tuple(folder for dataset in datasets for folder in dataset._folders)
    joined.images = ImageTable(chain.from_iterable(d.images for d in datasets))
    joined.objects = join_tables([d.objects for d in datasets])
    joined.num_crowds = sum(d.num_crowds for d in datasets)
    return joined


def check_same_classes(first: CocoDataset, second: CocoDataset) -> None:
    """Refuse two datasets whose categories differ in number, names or order (UserError)."""
    if first.class_names != second.class_names:
        raise UserError(
            "classes-differ",
            f"datasets {first.name} ({list_names(first.class_names)}) and {second.name} "
            f"({list_names(second.class_names)}) differ in their categories; give both the same list",
        )


def match_classes(dataset: CocoDataset, names: Sequence[str], owner: str, remedy: str) -> None:
    """Give a dataset the labels of a model, by the names of its classes.

    ``class_names`` are then the model's, and ``category_ids`` has None for those that the file does not list.

    Args:
        dataset: is changed; its file may list fewer classes, in another order.
        names: of the model's classes, by label.
        owner: of the names, for the message, such as ``"model_best.pth"``.
        remedy: for the message.

    Raises:
        UserError: the dataset has a class that the model does not know.
    """
    try:
        places = match_names(dataset.class_names, names)
    except ValueError as error:
        raise UserError(
            "classes-differ",
            f"dataset {dataset.name} ({dataset.annotations_path}) has the categories "
            f"{list_names(dataset.class_names)}, and {owner} has {list_names(names)}: {error}; {remedy}",
        ) from None
    category_ids: list[int | None] = [None] * len(names)
    for place, category_id in zip(places, dataset.category_ids, strict=True):
        category_ids[place] = category_id
    dataset.class_names, dataset.category_ids = list(names), category_ids
    dataset.objects = replace(dataset.objects, labels=np.array(places)[dataset.objects.labels])


def check_classes(dataset: CocoDataset, num_classes: int) -> None:
    """Refuse a model whose ``num_classes`` is not the number of categories (UserError)."""
    found = len(dataset.class_names)
    if found != num_classes:
        noun = "category" if found == 1 else "categories"
        raise UserError(
            "num-classes-differ",
            f"dataset {dataset.name} has {found} {noun} ({list_names(dataset.class_names)}) but "
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}: set it to {found}",
        )


LISTED = 20  # names that a message shows of a list


def match_names(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return the position in ``known`` of each of ``names``; equal lists match by position.

    Raises:
        ValueError: a name is not in ``known``, or several classes share one.
    """
    if list(names) == list(known):
        return list(range(len(known)))
    position = {name: label for label, name in enumerate(known)}
    unknown = [name for name in names if name not in position]
    if unknown:
        raise ValueError(f"not among them: {list_names(unknown)}")
    for side in (names, known):
        shared = [name for name, count in Counter(side).items() if count > 1]
        if shared:
            raise ValueError(f"several share the name {shared[0]}")
    return [position[name] for name in names]


def list_names(names: Sequence[str], limit: int = LISTED) -> str:
    """Return the first ``limit`` names for a message."""
    return ", ".join(names) if len(names) <= limit else ", ".join([*names[:limit], "..."])
