"""Datasets in COCO's format."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..structures import Target
from .coco_json import read_coco_json
from .datasets import DatasetSource
from .faults import DataError
from .file_names import missing_names
from .image_table import join_images
from .images import read_image
from .object_table import join_tables
from .transforms import LabelledImage, Mask, to_target

logger = logging.getLogger(__name__)


class CocoDataset:
    """Images and objects of one COCO file, or of several joined.

    Annotations are checked when they are read. Crowds are left out of the objects; the evaluation takes them
    from the file.

    Attributes:
        name: of the dataset; joined ones have their names joined by ``+``.
        annotations_path, images_folder: the JSON and the folder of its images (of the first, if joined).
        class_names: by contiguous label.
        category_ids: ids in the JSON by contiguous label, ascending.
        images: records ordered by image id, packed.
        objects: flat table of all objects.
        num_crowds: crowd annotations in the file.
        spelt_images, spelt_categories: ids as the file spells them by id, where those are text.

    Args:
        source: where the files are.
        masks: read segmentations; each object must have one. None: if some object has one.
        evaluation: check also what only COCO's evaluation reads.

    Raises:
        UserError: the JSON is not valid COCO.
    """

    def __init__(self, source: DatasetSource, *, masks: bool | None = True, evaluation: bool = False) -> None:
        outside, files = source.allow_outside, (source.annotations, source.images)
        content = read_coco_json(*files, masks=masks, evaluation=evaluation, outside=outside)
        self.name = source.name
        self.annotations_path, self.images_folder = source.annotations, source.images
        self.class_names, self.category_ids = content.class_names, content.category_ids
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
    """One message for all missing images: those that are there under another name first."""
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
    joined.class_names, joined.category_ids = first.class_names, first.category_ids
    joined.images = join_images([d.images for d in datasets])
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
            f"datasets {first.name} ({_listed(first.class_names)}) and {second.name} "
            f"({_listed(second.class_names)}) differ in their categories; give both the same list"
        )


def check_order(dataset: CocoDataset, told: Any, path: str | Path) -> None:
    """Refuse a dataset whose labels mean other classes than a checkpoint's.

    Args:
        told: what the checkpoint says that its classes are; those of other names are taken for renamed.
        path: of the checkpoint.

    Raises:
        UserError: they are the same in another order.
    """
    names = dataset.class_names
    if isinstance(told, list) and told != names and sorted(map(str, told)) == sorted(names):
        raise UserError(
            f"{path} was trained with categories in the order {_listed(told)}, and those of {dataset.name} "
            f"have the order {_listed(names)}; give them ids in the order of training"
        )


def check_classes(dataset: CocoDataset, num_classes: int) -> None:
    """Refuse a model of another number of classes.

    Raises:
        UserError: ``num_classes`` is not the number of categories.
    """
    found = len(dataset.class_names)
    if found != num_classes:
        noun = "category" if found == 1 else "categories"
        raise UserError(
            f"dataset {dataset.name} has {found} {noun} ({_listed(dataset.class_names)}) but "
            f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}: set it to {found}"
        )


def _listed(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names) if len(names) <= limit else ", ".join([*names[:limit], "..."])
