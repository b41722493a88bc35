"""Ground truth and detections brought into one exact form, so that every evaluator reads the same thing.

COCO evaluators differ in what they make of ids that are negative, text or 0, of missing areas and crowd
flags, uncompressed RLE and bytes. All of that is decided here once, as pycocotools does it, and whatever
pycocotools fails on, or counts as a miss without a word, is refused with a reason. Two things are on purpose
not pycocotools':

- it takes an annotation whose id is 0 for "not matched", a false alarm; here annotations are numbered from 1;
- an object whose polygons all have less than 3 points is left out of the mask AP with a warning, as it is
  left out of training; pycocotools fails on it.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from ..data.rle import RLE_CHARACTERS, count_pixels
from ..errors import UserError
from .results_file import read_entries

logger = logging.getLogger(__name__)

Json = dict[str, Any]
Size = tuple[int, int] | None
"""(height, width) of an image in pixels, where the ground truth tells."""

_FARTHEST = 1e6
"""Pixels; rasterising takes memory in proportion to the length of a polygon."""

_MASKS_AT_ONCE = 200
"""``pycocotools.mask.area`` fails on more than 255."""


@dataclass(frozen=True)
class GroundTruth:
    """COCO ground truth whose images, categories and annotations are numbered from 1, in order of their ids.

    Attributes:
        coco: ``images``, ``categories`` and ``annotations``, each with all that evaluators read.
        images, categories: number by the id in the annotation file.
        sizes: of images, by number.
    """

    coco: Json
    images: dict[Any, int]
    categories: dict[Any, int]
    sizes: dict[int, Size]

    @property
    def labels(self) -> list[str]:
        """Names of categories in order of their numbers; names that several share get the id behind them."""
        names = [category["name"] for category in self.coco["categories"]]
        count = Counter(names)
        ids = self.categories
        return [name if count[name] == 1 else f"{name} ({i})" for name, i in zip(names, ids, strict=True)]


def read_json(source: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); give a COCO JSON file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({error}); give a COCO JSON file") from None


def prepare_ground_truth(source: str | Path | Mapping[str, Any], iou_type: str) -> GroundTruth:
    """COCO ground truth with boxes, areas, crowd flags and, for masks, compressed RLE.

    ``area`` is the annotation's; where it has none, its mask's or else its box's. A missing ``iscrowd`` is 0.
    ``ignore`` has no effect: pycocotools overwrites it with ``iscrowd``.

    Args:
        source: a file or its content, which is left as it is.
        iou_type: ``"bbox"`` or ``"segm"``.

    Raises:
        UserError: it is not COCO, or an annotation is incomplete.
    """
    name = "ground truth" if isinstance(source, Mapping) else str(source)
    data = source if isinstance(source, Mapping) else read_json(source)
    if not isinstance(data, Mapping) or not all(
        isinstance(data.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UserError(
            f"{name}: not COCO ground truth; it needs the lists images, annotations and categories"
        )
    try:
        sizes = {image["id"]: _size(image) for image in data["images"]}
        names = {category["id"]: str(category.get("name", category["id"])) for category in data["categories"]}
        images = {key: number for number, key in enumerate(sorted(sizes), start=1)}
        categories = {key: number for number, key in enumerate(sorted(names), start=1)}
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise UserError(
            f"{name}: an image or a category has no proper id or size; every entry needs an integer id"
        ) from None
    coco: Json = {
        "images": [_image(number, sizes[key]) for key, number in images.items()],
        "categories": [{"id": number, "name": names[key]} for key, number in categories.items()],
    }
    truth = GroundTruth(coco, images, categories, {images[key]: size for key, size in sizes.items()})
    coco["annotations"] = _annotations(data["annotations"], truth, name, iou_type)
    return truth


def _size(image: Mapping[str, Any]) -> Size:
    height, width = image.get("height"), image.get("width")
    if height is None or width is None:
        return None
    size = int(height), int(width)
    if min(size) < 1:
        raise ValueError("no pixels")
    return size


def _image(number: int, size: Size) -> Json:
    return {"id": number} if size is None else {"id": number, "height": size[0], "width": size[1]}


def _annotations(given: list[Any], truth: GroundTruth, name: str, iou_type: str) -> list[Json]:
    annotations = []
    for number, entry in enumerate(given, start=1):
        try:
            annotations.append(_annotation(entry, number, truth, iou_type))
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            shown = entry.get("id", number) if isinstance(entry, Mapping) else number
            raise _refusal(f"{name}: annotation {shown}", entry, error) from None
    if iou_type == "segm":
        kept = [annotation for annotation in annotations if annotation["segmentation"]]
        if len(kept) < len(annotations):
            logger.warning(
                "%s: %d annotation(s) without a polygon of at least 3 points are left out of the mask AP",
                name,
                len(annotations) - len(kept),
            )
        return kept
    return annotations


def _annotation(given: Mapping[str, Any], number: int, truth: GroundTruth, iou_type: str) -> Json:
    image = _number(truth.images, given["image_id"], "image")
    size = truth.sizes[image]
    crowd = given.get("iscrowd") or 0
    if crowd not in (0, 1):
        raise ValueError(f"'iscrowd' is {crowd!r}, not 0 or 1")
    annotation: Json = {
        "id": number,
        "image_id": image,
        "category_id": _number(truth.categories, given["category_id"], "category"),
        "iscrowd": int(crowd),
    }
    box, area = given.get("bbox"), given.get("area")
    mask = None
    if iou_type == "segm" or box is None or (area is None and given.get("segmentation")):
        mask = to_rle(given["segmentation"], size, whole=True)
    if iou_type == "segm":
        annotation["segmentation"] = mask
    if box is None:
        box = [0.0] * 4 if mask is None else coco_mask.toBbox(mask)
    annotation["bbox"] = _box(box)
    if area is None:
        area = coco_mask.area(mask) if mask else annotation["bbox"][2] * annotation["bbox"][3]
    annotation["area"] = _finite(area, "area")
    return annotation


def to_rle(segmentation: Any, size: Size, whole: bool = False) -> Json | None:
    """Polygons, uncompressed or compressed RLE as compressed RLE with text counts.

    Args:
        segmentation: COCO's ``segmentation``.
        size: of the image, which polygons need and RLE must have.
        whole: count the pixels of a compressed RLE, too, which takes longer than its overlaps do.

    Returns:
        ``{"size": [height, width], "counts": text}``; None where no polygon has 3 points or more. Shorter
        ones beside others cover nothing.

    Raises:
        ValueError: it is none of the three, or does not fit the image.
    """
    if not segmentation:
        raise ValueError("it has no segmentation")
    if isinstance(segmentation, list):
        return _polygons_to_rle(segmentation, size)
    height, width = (int(value) for value in segmentation["size"])
    if size is not None and (height, width) != size:
        raise ValueError(f"its RLE is {height}x{width} and its image {size[0]}x{size[1]} (height x width)")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if any(run < 0 for run in counts) or sum(counts) != height * width:
            raise ValueError(f"its RLE does not have {height * width} pixels")
        counts = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    if not RLE_CHARACTERS.fullmatch(text):
        raise ValueError("its RLE has wrong characters in 'counts'")
    if whole and (found := count_pixels(text)) != height * width:
        raise ValueError(f"its RLE has {found} pixels, not {height * width}")
    return {"size": [height, width], "counts": text}


def _polygons_to_rle(polygons: list[Any], size: Size) -> Json | None:
    if size is None:
        raise ValueError("its image has no 'height' or 'width', which polygons need")
    for polygon in polygons:
        if not all(abs(coordinate) <= _FARTHEST for coordinate in polygon):
            raise ValueError("it has a polygon with a coordinate that is not finite or is far away")
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    if not polygons:
        return None
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
    return {"size": list(size), "counts": rle["counts"].decode("ascii")}


def prepare_detections(
    source: str | Path | Sequence[Mapping[str, Any]], truth: GroundTruth, iou_type: str
) -> Iterator[Json]:
    """Detections with id, area, box and, for masks, compressed RLE; the area is that of what is compared.

    They come one by one, so that a large file never lies in memory as a whole.

    Args:
        source: COCO result file or its content, which is left as it is. A detection without ``bbox`` has its
            mask's box (and area, as in pycocotools).
        truth: the ground truth.
        iou_type: ``"bbox"`` or ``"segm"``.

    Raises:
        UserError: no list of results, one of an unknown image or category, or one without a finite score.
    """
    name = str(source) if isinstance(source, str | Path) else "results"
    data = read_entries(source) if isinstance(source, str | Path) else source
    if not isinstance(data, Iterable) or isinstance(data, str | Mapping):
        raise UserError(f"{name}: not COCO results; it needs a list of detections")
    prepared = _prepare(data, truth, iou_type, name)
    while some := list(islice(prepared, _MASKS_AT_ONCE)):
        if iou_type == "segm":
            _measure_masks(some)
        yield from some


def _prepare(data: Iterable[Any], truth: GroundTruth, iou_type: str, name: str) -> Iterator[Json]:
    for number, given in enumerate(data, start=1):
        try:
            prepared = _detection(given, number, truth, iou_type)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise _refusal(f"{name}: detection {number}", given, error) from None
        yield prepared


def _measure_masks(detections: list[Json]) -> None:
    masks = [detection["segmentation"] for detection in detections]
    boxes, areas = coco_mask.toBbox(masks).tolist(), coco_mask.area(masks).tolist()
    for detection, box, area in zip(detections, boxes, areas, strict=True):
        detection["bbox"], detection["area"] = box, float(area)


def _detection(given: Mapping[str, Any], number: int, truth: GroundTruth, iou_type: str) -> Json:
    image = _number(truth.images, given["image_id"], "image")
    detection: Json = {
        "id": number,
        "image_id": image,
        "category_id": _number(truth.categories, given["category_id"], "category"),
        "iscrowd": 0,
        "score": _finite(given["score"], f"score of image {given['image_id']}"),
    }
    if iou_type == "segm" or ("bbox" not in given and "segmentation" in given):
        size = truth.sizes[image]
        mask = to_rle(given["segmentation"], size)
        if mask is None:
            raise ValueError("it has no polygon of at least 3 points")
        if iou_type == "segm":
            return detection | {"segmentation": mask}
        return detection | {"bbox": coco_mask.toBbox(mask).tolist(), "area": float(coco_mask.area(mask))}
    box = _box(given["bbox"])
    return detection | {"bbox": box, "area": box[2] * box[3]}


def _number(numbers: dict[Any, int], key: Any, kind: str) -> int:
    number = numbers.get(key)
    if number is None:
        raise ValueError(f"it is of {kind} {key!r}, which the ground truth does not list")
    return number


def _box(given: Sequence[float] | np.ndarray) -> list[float]:
    box = [float(value) for value in given]
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"its bbox {box} is not x, y, width, height in finite numbers")
    return box


def _finite(given: Any, what: str) -> float:
    value = float(given)
    if not math.isfinite(value):
        raise ValueError(f"the {what} is {value}, which is not finite")
    return value


def _refusal(label: str, entry: Any, error: Exception) -> UserError:
    if not isinstance(entry, Mapping):
        reason = "it is not an object"
    else:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
    return UserError(f"{label} cannot be evaluated: {reason}; correct or remove it")
