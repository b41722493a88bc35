"""Look for faults in the arrays of a loaded dataset, before every training run.

It takes some seconds for all of COCO. Image files stay closed, but for the first, and for some more where
that is 16-bit greyscale.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np

from ...errors import UserError
from ..coco.dataset import CocoDataset
from ..coco.faults import FAULTS, NOTE
from ..images import DARK, is_deep, open_image, read_image
from .checks import BORDER, boxes_differ

logger = logging.getLogger(__name__)

_LOOKED_AT = 16  # images of a set of 16-bit greyscale, at most


def warn_of_faults(train: CocoDataset, tests: Sequence[CocoDataset] = ()) -> None:
    """Log a line for each kind of fault; images without an object are no fault.

    Args:
        train: the dataset to train on.
        tests: those to evaluate on.
    """
    sets = {id(dataset): dataset for dataset in (train, *tests)}.values()
    found = [(dataset, *fault) for dataset in sets for fault in quick_faults(dataset)]
    found += [(test, "leak", *_shared_files(train, test)) for test in tests]
    warned = False
    for dataset, kind, count, example in found:
        fault = FAULTS[kind]
        if count:
            level = logging.INFO if fault.severity == NOTE else logging.WARNING
            text = "%s: %d x %s, such as %s; %s"
            logger.log(level, text, dataset.name, count, fault.title, example, fault.remedy)
            warned |= level == logging.WARNING
    if warned:
        logger.warning("gn-detect doctor FILE --images FOLDER lists them all")


def quick_faults(dataset: CocoDataset) -> Iterator[tuple[str, int, str]]:
    """Yield kind, count and an example of each check, also where the count is 0.

    Objects of one class with the same box count as repeated here, whatever their masks.
    """
    table = dataset.objects
    counts = table.counts()
    image_of = np.repeat(np.arange(len(counts)), counts)
    sizes = dataset.images.sizes()[image_of][:, ::-1]  # width, height

    def annotations(wrong: np.ndarray) -> tuple[int, str]:
        rows = np.flatnonzero(wrong)
        return len(rows), f"annotation {table.annotation_ids[rows[0]]}" if len(rows) else ""

    overhang = np.maximum(-table.boxes[:, :2], table.boxes[:, 2:] - sizes).max(axis=1, initial=-np.inf)
    yield "box-overlaps-border", *annotations(overhang > BORDER)
    extents = _polygon_extents(dataset)
    if extents is not None:
        inside = ((extents[:, :2] >= -BORDER) & (extents[:, 2:] <= sizes + BORDER)).all(axis=1)
        yield "box-mask", *annotations(inside & boxes_differ(table.boxes, extents, sizes))
    keys = np.column_stack([image_of, table.labels, table.boxes])
    order = np.lexsort(keys.T)
    repeated = np.zeros(len(keys), dtype=bool)
    repeated[order[1:]] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    yield "duplicate-annotation", *annotations(repeated)
    used = np.bincount(table.labels, minlength=len(dataset.class_names))
    classes = zip(dataset.class_names, dataset.category_ids, used, strict=True)
    unused = [name for name, category_id, count in classes if category_id is not None and not count]
    yield "unused-category", len(unused), unused[0] if unused else ""
    dark = _dark_image(dataset)
    yield "dark-images", int(bool(dark)), dark


def _dark_image(dataset: CocoDataset) -> str:
    """Return an image of a set that is 16-bit greyscale and dark, by some of its images; else nothing."""
    count = len(dataset.images)
    names = [dataset.images[row].file_name for row in range(0, count, -(-count // _LOOKED_AT))]
    try:
        with open_image(names[0]) as first:
            deep = is_deep(first)
        return names[0] if deep and all(read_image(name, "RGB").max() < DARK for name in names) else ""
    except (OSError, UserError):  # training names it, if it comes to that file
        return ""


def _polygon_extents(dataset: CocoDataset) -> np.ndarray | None:
    """Return (A, 4) ``xyxy`` around the polygons of each object, nan for RLE; None without polygons."""
    masks = dataset.objects.masks
    if masks is None or not len(masks.numbers):
        return None
    points = masks.numbers.reshape(-1, 2)
    # Polygons have at least one point each, and objects with polygons at least one polygon.
    starts = masks.first_number[:-1] // 2
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    has = np.diff(masks.first_polygon) > 0
    extents = np.full((len(has), 4), np.nan)
    firsts = masks.first_polygon[:-1][has]
    extents[has, :2] = np.minimum.reduceat(low, firsts)
    extents[has, 2:] = np.maximum.reduceat(high, firsts)
    return extents


def _shared_files(train: CocoDataset, test: CocoDataset) -> tuple[int, str]:
    """Return the number of files that both have, and one of them."""
    if train is test:
        return 0, ""
    known = {os.path.normpath(record.file_name) for record in train.images}
    shared = [r.file_name for r in test.images if os.path.normpath(r.file_name) in known]
    return len(shared), shared[0] if shared else ""
