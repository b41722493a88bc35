"""Datasets in COCO's format."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...structures import Target
from ..datasets import DatasetSource
from ..images import read_image
from ..transforms import LabelledImage, Mask, to_target
from .classes import list_names, match_names
from .faults import DataError
from .file_names import missing_names
from .reader import read_coco_json
from .tables import ImageTable, join_tables

logger = logging.getLogger(__name__)


class CocoDataset:
    """Images and objects of one COCO file, or of several joined.

    Annotations are checked when they are read. Crowds are left out of the objects; the evaluation takes them
    from the file.

    Attributes:
        name: of the dataset; joined ones have their names joined by ``+``.
        annotations_path, images_folder: the JSON and the folder of its images (of the first, if joined).
        class_names: by contiguous label.
        category_ids: ids in the JSON by contiguous label, ascending unless :func:`match_classes` gave it the
            labels of a model; None for a class that the JSON does not list.
        images: records ordered by image id, packed.
        objects: flat table of all objects.
        num_crowds: crowd annotations in the file.
        spelt_images, spelt_categories: ids as the file spells them by id, where those are text.

    Args:
        source: where the files are.
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
        content = read_coco_json(source, masks=masks, evaluation=evaluation, quiet=quiet)
        self.name = source.name
        self.annotations_path, self.images_folder = source.annotations, source.images
        self._folders: tuple[str, ...] = (os.path.join(source.images, ""),)
        self.class_names = content.class_names
        self.category_ids: list[int | None] = list(content.category_ids)
        self.images, self.objects, self.num_crowds = content.images, content.objects, content.num_crowds
        self.spelt_images: dict[Any, Any] = content.file.image_ids
        self.spelt_categories: dict[Any, Any] = content.file.category_ids

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return (
            f"CocoDataset({self.name}: {len(self)} images, {len(self.objects.labels)} objects of "
            f"{len(self.class_names)} categories, {self.num_crowds} crowds)"
        )

    def fingerprint(self) -> str:
        """Return counts and a digest of all that training takes from the JSON, wherever the files are.

        That are names (relative to the images folder) and sizes of images, boxes, labels and masks, in order.
        Ids are left out.
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

    def labels(self, index: int) -> np.ndarray:
        """(N,) int64 contiguous labels of the objects in an image."""
        return self.objects.labels[self.objects.rows(index)]

    def read(self, index: int) -> LabelledImage:
        """An image as RGB with its objects, in the pixels of the file.

        Raises:
            UserError: the file is missing, damaged or of another size than in the JSON.
        """
        record = self.images[index]
        pixels = read_image(record.file_name, "RGB", (record.height, record.width))
        return self.label(index, pixels)

    def label(self, index: int, pixels: np.ndarray) -> LabelledImage:
        """Pixels (H, W, 3) of an image with its objects; RLE are decoded by the first transform that must."""
        record, rows, table = self.images[index], self.objects.rows(index), self.objects.masks
        masks: list[Mask] | None = None
        if table is not None:
            masks = [table.mask(row, record.height, record.width) for row in range(rows.start, rows.stop)]
        return LabelledImage(pixels, self.objects.boxes[rows], self.objects.labels[rows], masks)

    def target(self, index: int) -> Target:
        """Ground truth of an image in the pixels of the file, crowds left out; the image is not read."""
        record = self.images[index]
        return to_target(self.label(index, np.empty((record.height, record.width, 0), dtype=np.uint8)))

    def check_files(self) -> None:
        """Look for every image in its folder, by listing folders: no file is opened.

        Raises:
            UserError: one is missing; it is named.
        """
        prefix = str(self.images_folder / "_")[:-1]
        missing = missing_names(self.images_folder, (r.file_name.removeprefix(prefix) for r in self.images))
        if missing:
            raise DataError(f"dataset {self.name}: {_missing(self.images_folder, missing)}", "missing-image")


def _missing(folder: Path, missing: Mapping[str, str | None]) -> str:
    """Return one message for all missing images: those that are there under another name first."""
    renamed = [name for name, other in missing.items() if other]
    first, others = (renamed or [*missing])[0], len(renamed or missing) - 1
    what = f"image {folder / first}" + (f" and {others} more" if others else "")
    if not renamed:
        return f"{what} is missing; restore it, correct the images folder or remove it from the JSON"
    return (
        f"{what} is missing, but {missing[first]} is there; correct 'file_name' "
        "(gn-detect doctor --fix OUT.json does that)"
    )


def join_datasets(datasets: Sequence[CocoDataset]) -> CocoDataset:
    """One dataset with the images of all, in their order.

    Raises:
        UserError: their classes differ.
    """
    first = datasets[0]
    if len(datasets) == 1:
        return first
    for other in datasets[1:]:
        check_same_classes(first, other)
    joined = CocoDataset.__new__(CocoDataset)
    joined.name = "+".join(d.name for d in datasets)
    joined.annotations_path, joined.images_folder = first.annotations_path, first.images_folder
    joined._folders = tuple(folder for dataset in datasets for folder in dataset._folders)
    joined.class_names, joined.category_ids = first.class_names, first.category_ids
    joined.images = ImageTable(chain.from_iterable(d.images for d in datasets))
    joined.objects = join_tables([d.objects for d in datasets])
    joined.spelt_images, joined.spelt_categories = first.spelt_images, first.spelt_categories
    joined.num_crowds = sum(d.num_crowds for d in datasets)
    return joined


def check_same_classes(first: CocoDataset, second: CocoDataset) -> None:
    """Refuse two datasets whose labels do not mean the same.

    Raises:
        UserError: number, names or order of the categories differ.
    """
    if first.class_names != second.class_names:
        raise UserError(
            f"datasets {first.name} ({list_names(first.class_names)}) and {second.name} "
            f"({list_names(second.class_names)}) differ in their categories; give both the same list"
        )


def match_classes(dataset: CocoDataset, names: Sequence[str], owner: str, remedy: str) -> None:
    """Give a dataset the labels of a model, by the names of its classes.

    ``class_names`` are then the model's, and ``category_ids`` has None for those that the file does not list.

    Args:
        dataset: is changed; its file may list fewer classes, in another order.
        names: of the model's classes, by label.
        owner: whose they are, for the message, such as ``"model_best.pth"``.
        remedy: what to do.

    Raises:
        UserError: the dataset has a class that the model does not know.
    """
    try:
        places = match_names(dataset.class_names, names)
    except ValueError as error:
        raise UserError(
            f"dataset {dataset.name} ({dataset.annotations_path}) has the categories "
            f"{list_names(dataset.class_names)}, and {owner} has {list_names(names)}: {error}; {remedy}"
        ) from None
    category_ids: list[int | None] = [None] * len(names)
    for place, category_id in zip(places, dataset.category_ids, strict=True):
        category_ids[place] = category_id
    dataset.class_names, dataset.category_ids = list(names), category_ids
    dataset.objects = replace(dataset.objects, labels=np.array(places)[dataset.objects.labels])


def check_classes(dataset: CocoDataset, num_classes: int) -> None:
    """Refuse a model of another number of classes.

    Raises:
        UserError: ``num_classes`` is not the number of categories.
    """
    found = len(dataset.class_names)
    if found != num_classes:
        noun = "category" if found == 1 else "categories"
        raise UserError(
            f"dataset {dataset.name} has {found} {noun} ({list_names(dataset.class_names)}) but "
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}: set it to {found}"
        )
