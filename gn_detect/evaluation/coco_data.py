"""Bring ground truth into one exact form, so that every evaluator reads the same data.

COCO evaluators treat several things differently: ids that are negative, text or 0, missing areas and crowd
flags, uncompressed RLE and bytes. :mod:`gn_detect.data.coco.canonical` and
:mod:`gn_detect.data.coco.rules` read ground truth here as they do for training. An input on which pycocotools
fails, or which it silently counts as a miss, is refused with a reason. Two differences from pycocotools are
intended:

- pycocotools takes the annotation id 0 for "not matched", a false positive. Here ids begin with 1.
- pycocotools fails on an object whose polygons all have less than 3 points. Here the mask AP leaves it out
  with a warning, as training does.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pycocotools.mask as coco_mask

from ..data.coco.canonical import CocoFile, canonical
from ..data.coco.faults import DataError
from ..data.coco.reader import LISTS, check_lists, read_canonical
from ..data.coco.rules import MOST_PIXELS, Annotation, Rules, shown
from ..data.coco.tables import ImageRecord

logger = logging.getLogger(__name__)

Json = dict[str, Any]
Size = tuple[int, int] | None  # (height, width) of an image in pixels; None if the ground truth has none

_NAMELESS = Path("ground truth")


@dataclass(frozen=True)
class GroundTruth:
    """COCO ground truth whose images, categories and annotations are numbered from 1.

    Attributes:
        coco: ``images``, ``categories`` and ``annotations``, each with every key that evaluators read.
        maskless: the annotations that the mask AP leaves out, if masks were read; ``coco`` has the others.
        images, categories: number by id.
        sizes: sizes of images by number.
        file: the file in canonical form.
    """

    coco: Json
    maskless: list[Json]
    images: dict[int, int]
    categories: dict[int, int]
    sizes: dict[int, Size]
    file: CocoFile

    def annotations(self, iou_type: str) -> list[Json]:
        """Return the annotations of an evaluation, in order of their ids."""
        found: list[Json] = self.coco["annotations"]
        if iou_type != "bbox" or not self.maskless:
            return found
        return sorted([*found, *self.maskless], key=itemgetter("id"))

    @property
    def labels(self) -> list[str]:
        """Names of categories in order of their numbers; the id is appended to a name that several share."""
        names = [category["name"] for category in self.coco["categories"]]
        count = Counter(names)
        ids = self.categories
        return [name if count[name] == 1 else f"{name} ({i})" for name, i in zip(names, ids, strict=True)]


def read_annotations(path: str | Path) -> CocoFile:
    """Read an annotation file for one or several calls of :func:`prepare_ground_truth`.

    Raises:
        UserError: it is not COCO.
    """
    return read_canonical(Path(path))


def prepare_ground_truth(source: str | Path | Mapping[str, Any] | CocoFile, iou_type: str) -> GroundTruth:
    """Return COCO ground truth with boxes, areas, crowd flags and, for masks, compressed RLE.

    ``area`` is the annotation's, or else its mask's, or else its box's. Images need no ``file_name``, and a
    size only for polygons.

    Args:
        source: a file, its content, or what :func:`read_annotations` returned; it is not changed.
        iou_type: ``"bbox"`` or ``"segm"``.

    Raises:
        UserError: it is not COCO, or something in it is wrong.
    """
    if isinstance(source, CocoFile):
        file = source
    elif isinstance(source, str | Path):
        file = read_annotations(source)
    else:
        check_lists(source, LISTS, _NAMELESS)
        file = canonical(source, _NAMELESS)
    rules = Rules(file.path, evaluation=True)
    rules.whole(file.content)
    names = dict(sorted(rules.categories(file.content["categories"]).items()))
    records = rules.images(file.content["images"], files=False)
    order = sorted(records)
    spelt = [file.image_ids.get(image_id, image_id) for image_id in order]
    if len(set(map(type, spelt))) == 1:  # as pycocotools sorts them, which decides about equal scores
        order = [image_id for _, image_id in sorted(zip(spelt, order, strict=True))]
    images = {image_id: number for number, image_id in enumerate(order, start=1)}
    categories = {category_id: number for number, category_id in enumerate(names, start=1)}
    sizes = {number: _size_of(records[image_id]) for image_id, number in images.items()}
    coco: Json = {
        "images": [_image(number, size) for number, size in sizes.items()],
        "categories": [{"id": number, "name": names[key]} for key, number in categories.items()],
    }
    maskless: list[Json] = []
    truth = GroundTruth(coco, maskless, images, categories, sizes, file)
    found = rules.annotations(file.content["annotations"], records, categories)
    coco["annotations"] = annotations = []
    for number, annotation in enumerate(found, start=1):
        entry = _annotation(annotation, number, truth, rules, iou_type)
        if iou_type == "segm" and entry["segmentation"] is None:
            del entry["segmentation"]
            maskless.append(entry)
        else:
            annotations.append(entry)
    if maskless:
        logger.warning(
            "%s: %d annotation(s) without a polygon of at least 3 points are left out of the mask AP",
            rules.path,
            len(maskless),
        )
    return truth


def _size_of(image: ImageRecord | None) -> Size:
    return None if image is None else (image.height, image.width)


def _image(number: int, size: Size) -> Json:
    return {"id": number} if size is None else {"id": number, "height": size[0], "width": size[1]}


def _annotation(given: Annotation, number: int, truth: GroundTruth, rules: Rules, iou_type: str) -> Json:
    assert given.category_id is not None
    annotation: Json = {
        "id": number,
        "image_id": truth.images[given.image_id],
        "category_id": truth.categories[given.category_id],
        "iscrowd": int(given.crowd),
    }
    size = truth.sizes[annotation["image_id"]]
    annotation["bbox"] = [float(value) for value in given.entry["bbox"]]
    mask = None
    if iou_type == "segm":
        mask = annotation["segmentation"] = encode(given.entry.get("segmentation"), size, rules, given.what)
    elif given.area is None:
        # Boxes are evaluated without masks, too.
        with suppress(DataError):
            mask = encode(given.entry.get("segmentation"), size, rules, given.what)
    area = given.area
    if area is None:
        area = coco_mask.area(mask) if mask else annotation["bbox"][2] * annotation["bbox"][3]
    annotation["area"] = float(area)
    return annotation


def encode(given: Any, size: Size, rules: Rules, what: str) -> Json | None:
    """Return a canonical segmentation as ``{"size": [height, width], "counts": text}``.

    Without a ``size``, an RLE gives its own. None if no polygon has 3 points or more.
    """
    if size is None and isinstance(given, dict):
        found = given.get("size")
        if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
            raise rules.error("rle-size", f"{what} has an RLE without a proper 'size'; encode the mask again")
        if found[0] * found[1] > MOST_PIXELS:
            raise rules.error(
                "rle-size", f"{what} has an RLE of 'size' {shown(found)}, larger than images are"
            )
        size = found[0], found[1]
    if size is None:
        if given:
            raise rules.error(
                "image-size", f"{what}: its image has no 'height' or 'width', which polygons need"
            )
        size = (1, 1)  # the rule says what is missing
    mask = rules.segmentation(given, ImageRecord(0, "", *size), what)
    return mask.encoded if mask else None
