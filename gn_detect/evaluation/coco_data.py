"""Bring ground truth and detections into one exact form, so that every evaluator reads the same data.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pycocotools.mask as coco_mask

from ..data.coco.canonical import CocoFile, canonical
from ..data.coco.faults import DataError
from ..data.coco.numbers import as_integer, as_number
from ..data.coco.reader import LISTS, check_lists, read_canonical
from ..data.coco.rules import MOST_PIXELS, Annotation, Rules, shown
from ..data.coco.tables import ImageRecord
from ..data.coco.values import read_box, read_mask
from ..errors import UserError
from .results_file import read_entries

logger = logging.getLogger(__name__)

Json = dict[str, Any]
Size = tuple[int, int] | None  # (height, width) of an image in pixels; None if the ground truth has none

_NAMELESS = Path("ground truth")
_FARTHEST = 1e9  # the largest number in a detection's box
_HIGHEST = 1e300  # the largest score
_MASKS_AT_ONCE = 200  # pycocotools.mask.area fails on more than 255


@dataclass(frozen=True)
class GroundTruth:
    """COCO ground truth whose images, categories and annotations are numbered from 1.

    Attributes:
        coco: ``images``, ``categories`` and ``annotations``, each with every key that evaluators read.
        images, categories: number by id.
        sizes: sizes of images by number.
        file: the file in canonical form.
    """

    coco: Json
    images: dict[int, int]
    categories: dict[int, int]
    sizes: dict[int, Size]
    file: CocoFile

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
    truth = GroundTruth(coco, images, categories, sizes, file)
    found = rules.annotations(file.content["annotations"], records, categories)
    annotations = [
        _annotation(annotation, number, truth, rules, iou_type)
        for number, annotation in enumerate(found, start=1)
    ]
    coco["annotations"] = [a for a in annotations if iou_type != "segm" or a["segmentation"] is not None]
    left_out = len(annotations) - len(coco["annotations"])
    if left_out:
        logger.warning(
            "%s: %d annotation(s) without a polygon of at least 3 points are left out of the mask AP",
            rules.path,
            left_out,
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
        mask = annotation["segmentation"] = _encode(given.entry.get("segmentation"), size, rules, given.what)
    elif given.area is None:
        # Boxes are evaluated without masks, too.
        with suppress(DataError):
            mask = _encode(given.entry.get("segmentation"), size, rules, given.what)
    area = given.area
    if area is None:
        area = coco_mask.area(mask) if mask else annotation["bbox"][2] * annotation["bbox"][3]
    annotation["area"] = float(area)
    return annotation


def _encode(given: Any, size: Size, rules: Rules, what: str) -> Json | None:
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


def prepare_detections(
    source: str | Path | Sequence[Mapping[str, Any]], truth: GroundTruth, iou_type: str
) -> Iterator[Json]:
    """Yield detections with id, area, box and, for masks, compressed RLE.

    The area is that of the box or of the mask, depending on ``iou_type``. A large file is never in memory as
    a whole.

    Args:
        source: COCO result file or its content, which is not changed. Ids may be those of the annotation file
            or of ``truth``. A detection without ``bbox`` has its mask's box (and area, as in pycocotools).
        truth: the ground truth.
        iou_type: ``"bbox"`` or ``"segm"``.

    Raises:
        UserError: it is no list of results, or one has an unknown image or category or no finite score.
    """
    name = str(source) if isinstance(source, str | Path) else "results"
    data = read_entries(source) if isinstance(source, str | Path) else source
    if not isinstance(data, Iterable) or isinstance(data, str | Mapping):
        raise UserError("not-results", f"{name}: not COCO results; it needs a list of detections")
    reader = _DetectionReader(name, truth, iou_type)
    read = (reader.read(given, number) for number, given in enumerate(data, start=1))
    while detections := list(islice(read, _MASKS_AT_ONCE)):
        if iou_type == "segm":
            masks = [detection["segmentation"] for detection in detections]
            boxes, areas = coco_mask.toBbox(masks).tolist(), coco_mask.area(masks).tolist()
            for detection, box, area in zip(detections, boxes, areas, strict=True):
                detection["bbox"], detection["area"] = box, float(area)
        yield from detections


class _DetectionReader:
    def __init__(self, name: str, truth: GroundTruth, iou_type: str) -> None:
        self.rules, self.truth, self.iou_type = Rules(Path(name)), truth, iou_type
        file = truth.file
        self.spelt = [{spelt: i for i, spelt in ids.items()} for ids in (file.image_ids, file.category_ids)]

    def read(self, given: Any, number: int) -> Json:
        what = f"detection {number}"
        if not isinstance(given, Mapping):
            raise self._refusal(what, "it is not an object")
        image = self._number(given, "image", self.truth.images, self.spelt[0], what)
        detection: Json = {
            "id": number,
            "image_id": image,
            "category_id": self._number(given, "category", self.truth.categories, self.spelt[1], what),
            "iscrowd": 0,
            "score": self._score(given, what),
        }
        if self.iou_type == "segm" or given.get("bbox") is None:
            mask = self._mask(given, self.truth.sizes[image], what)
            if self.iou_type == "segm":
                return detection | {"segmentation": mask}
            return detection | {"bbox": coco_mask.toBbox(mask).tolist(), "area": float(coco_mask.area(mask))}
        box = read_box(given["bbox"], set())
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_near, box)):
            raise self._refusal(what, f"its bbox {shown(box)} is not x, y, width, height in finite numbers")
        box = [float(value) for value in box]
        return detection | {"bbox": box, "area": box[2] * box[3]}

    def _number(
        self, given: Mapping[str, Any], kind: str, numbers: dict[int, int], spelt: dict[Any, int], what: str
    ) -> int:
        key = given.get(f"{kind}_id")
        number = numbers.get(key) if type(key) is int else None
        if number is None and key is not None and not isinstance(key, list | dict):
            number = numbers.get(spelt.get(key, as_integer(key)))  # type: ignore[arg-type]
        if number is None:
            reason = f"it is of {kind} {shown(key)}, which the ground truth does not list"
            raise self._refusal(what, reason if f"{kind}_id" in given else f"it has no '{kind}_id'")
        return number

    def _score(self, given: Mapping[str, Any], what: str) -> float:
        if "score" not in given:
            raise self._refusal(what, "it has no 'score'")
        score = as_number(given["score"])
        if score is None:
            raise self._refusal(what, f"its score {shown(given['score'])} is not a number")
        if not abs(score) <= _HIGHEST:  # nan is not, either
            raise self._refusal(what, f"its score is {shown(score)}, which is not finite")
        return float(score)

    def _mask(self, given: Mapping[str, Any], size: Size, what: str) -> Json:
        encoded = _encode(read_mask(given.get("segmentation"), set()), size, self.rules, what)
        if encoded is None:
            raise self._refusal(what, "it has no polygon of at least 3 points")
        return encoded

    def _refusal(self, what: str, reason: str) -> UserError:
        return self.rules.error("malformed", f"{what} cannot be evaluated: {reason}; correct or remove it")


def _is_near(value: Any) -> bool:
    return as_number(value) is not None and abs(value) <= _FARTHEST
