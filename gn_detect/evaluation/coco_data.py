"""Ground truth and detections brought into one exact form, so that every evaluator reads the same thing.

COCO evaluators differ in what they make of missing areas, annotation ids of 0, uncompressed RLE or bytes.
All of that is decided here once, as pycocotools documents it, and whatever makes no sense is refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from ..errors import UserError

Json = dict[str, Any]


def read_json(source: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); give a COCO JSON file") from None
    except ValueError as error:
        raise UserError(f"{source}: not JSON ({error}); give a COCO JSON file") from None


def prepare_ground_truth(source: str | Path | Mapping[str, Any], iou_type: str) -> Json:
    """COCO ground truth with ids from 1, areas, crowd flags and, for masks, compressed RLE.

    Args:
        source: a file or its content.
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
        sizes = {image["id"]: (image.get("height"), image.get("width")) for image in data["images"]}
        categories = [{"id": c["id"], "name": str(c.get("name", c["id"]))} for c in data["categories"]]
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{name}: an image or a category has no id; every entry needs one") from None
    known = {category["id"] for category in categories}
    annotations = []
    for number, given in enumerate(data["annotations"], start=1):
        label = f"{name}: annotation {given.get('id', number) if isinstance(given, Mapping) else number}"
        try:
            image_id, category_id = given["image_id"], given["category_id"]
            if image_id not in sizes or category_id not in known:
                raise UserError(
                    f"{label} belongs to an image or a category that is not listed; add or remove it"
                )
            annotations.append(_annotation(given, number, sizes[image_id], iou_type))
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{label} cannot be evaluated: {error!r}; complete or remove it") from None
    images = [{"id": i, "height": height, "width": width} for i, (height, width) in sizes.items()]
    return {"images": images, "categories": categories, "annotations": annotations}


def _annotation(given: Mapping[str, Any], number: int, size: tuple[Any, Any], iou_type: str) -> Json:
    annotation: Json = {
        "id": number,  # evaluators take an id of 0 for "not matched"
        "image_id": given["image_id"],
        "category_id": given["category_id"],
        "iscrowd": int(bool(given.get("iscrowd", 0))),
    }
    if iou_type == "segm":
        annotation["segmentation"] = to_rle(given["segmentation"], size)
    box = given.get("bbox")
    if box is None:
        box = coco_mask.toBbox(to_rle(given["segmentation"], size)).tolist()
    annotation["bbox"] = [float(value) for value in box]
    area = given.get("area")
    if area is None:
        mask = given.get("segmentation")
        area = coco_mask.area(to_rle(mask, size)) if mask else annotation["bbox"][2] * annotation["bbox"][3]
    annotation["area"] = float(area)
    return annotation


def to_rle(segmentation: Any, size: tuple[Any, Any]) -> Json:
    """Polygons, uncompressed or compressed RLE as compressed RLE with text counts.

    Args:
        segmentation: COCO's ``segmentation``.
        size: (height, width) of the image in pixels, which polygons need.
    """
    if isinstance(segmentation, list):
        height, width = int(size[0]), int(size[1])
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, *segmentation["size"])
    else:
        rle = segmentation
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def prepare_detections(
    source: str | Path | Sequence[Mapping[str, Any]], ground_truth: Json, iou_type: str
) -> list[Json]:
    """Detections with id, area, box and, for masks, compressed RLE; the area is that of what is compared.

    Args:
        source: COCO result file or its content.
        ground_truth: of :func:`prepare_ground_truth`.
        iou_type: ``"bbox"`` or ``"segm"``.

    Raises:
        UserError: no list of results, one of an unknown image or category, or one without a finite score.
    """
    name = str(source) if isinstance(source, str | Path) else "results"
    data = read_json(source) if isinstance(source, str | Path) else source
    if not isinstance(data, Sequence) or isinstance(data, str | Mapping):
        raise UserError(f"{name}: not COCO results; it needs a list of detections")
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    known = {category["id"] for category in ground_truth["categories"]}
    prepared = []
    for number, given in enumerate(data, start=1):
        label = f"{name}: detection {number}"
        try:
            image_id, category_id, score = given["image_id"], given["category_id"], float(given["score"])
            if image_id not in sizes:
                raise UserError(f"{label} is of image {image_id}, which the ground truth does not have")
            if category_id not in known:
                raise UserError(f"{label} is of category {category_id}, which the ground truth does not have")
            if not math.isfinite(score):
                raise UserError(f"{label} in image {image_id} has the score {score}; scores must be finite")
            prepared.append(_detection(given, number, sizes[image_id], iou_type) | {"score": score})
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{label} cannot be evaluated: {error!r}; complete or remove it") from None
    return prepared


def _detection(given: Mapping[str, Any], number: int, size: tuple[Any, Any], iou_type: str) -> Json:
    detection: Json = {
        "id": number,
        "image_id": given["image_id"],
        "category_id": given["category_id"],
        "iscrowd": 0,
    }
    if iou_type == "segm":
        rle = to_rle(given["segmentation"], size)
        box, area = coco_mask.toBbox(rle).tolist(), float(coco_mask.area(rle))
        return detection | {"segmentation": rle, "bbox": box, "area": area}
    box = [float(value) for value in given["bbox"]]
    if len(box) != 4 or not np.isfinite(box).all():
        raise ValueError(f"bbox {box} is not x, y, width, height")
    return detection | {"bbox": box, "area": box[2] * box[3]}


def category_labels(categories: Sequence[Json]) -> dict[int, str]:
    """id -> name; names that several categories share get the id behind them."""
    count = Counter(category["name"] for category in categories)
    return {c["id"]: c["name"] if count[c["name"]] == 1 else f"{c['name']} ({c['id']})" for c in categories}
