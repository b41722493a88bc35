"""Real data, written in each format by other code than the package's, have the same AP after the import.

What a format cannot hold is removed from the reference first: crowds from all; further parts and holes of
masks where a mask is one polygon; classes where masks have one; all but boxes where there are no masks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest

from gn_detect.data.coco.dataset import CocoDataset
from gn_detect.data.datasets import DatasetSource
from gn_detect.data.formats.importing import read_dataset, write_files
from gn_detect.evaluation import evaluate_kinds
from tests.data.format_writers import WRITERS, bitmap, polygons

ONE_POLYGON = ("yolo", "via")
BOXES = ("yolo boxes", "voc")
IMAGES = {"dsb2018": 4, "coco80": 8}


def _encoded(mask: np.ndarray) -> dict[str, Any]:
    found = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": found["size"], "counts": found["counts"].decode()}


def _some(shared_dir: Path, name: str) -> tuple[dict[str, Any], Path]:
    """Return a few small images with objects; the crowds are removed."""
    folder = shared_dir / "data" / name
    content = json.loads((folder / "annotations" / "instances_val.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if not a["iscrowd"]]
    used = {a["image_id"] for a in content["annotations"]}
    images = [image for image in content["images"] if image["id"] in used]
    images = sorted(images, key=lambda i: i["width"] * i["height"])[: IMAGES[name]]
    ids = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    categories = [{"id": c["id"], "name": c["name"]} for c in content["categories"]]
    places = (folder / "images" / "val", folder / "images")
    place = next(path for path in places if (path / images[0]["file_name"]).is_file())
    return {"images": images, "annotations": annotations, "categories": categories}, place


def _detections(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return three of four objects, moved by some pixels, in random order: AP is neither 0 nor 100."""
    random = np.random.default_rng(0)
    images = {image["id"]: image for image in content["images"]}
    found = []
    for annotation in content["annotations"]:
        if random.random() < 0.25:
            continue
        image = images[annotation["image_id"]]
        side = max(1, int(min(annotation["bbox"][2:]) * 0.25))
        dx, dy = random.integers(-side, side + 1, 2).tolist()
        mask = np.roll(bitmap(annotation, image), (dy, dx), axis=(0, 1))
        x, y, w, h = annotation["bbox"]
        found.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": [x + dx, y + dy, w, h],
                "segmentation": _encoded(mask),
                "score": round(float(random.random()), 4),
            }
        )
    return found


def _reference(content: dict[str, Any], kind: str) -> tuple[dict[str, Any], int]:
    """Return the content without what a format cannot hold, and the number of objects that lost something."""
    images = {image["id"]: image for image in content["images"]}
    kept, changed = [], 0
    for annotation in content["annotations"]:
        image, annotation = images[annotation["image_id"]], dict(annotation)
        mask = bitmap(annotation, image)
        if kind in BOXES:
            annotation["segmentation"] = []
            if kind == "voc":  # whole pixels, and at least one
                x, y, w, h = annotation["bbox"]
                x0, y0 = round(x), round(y)
                annotation["bbox"] = [x0, y0, max(round(x + w) - x0, 1), max(round(y + h) - y0, 1)]
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        elif kind in ONE_POLYGON or (kind == "label-studio" and isinstance(annotation["segmentation"], list)):
            annotation["segmentation"] = polygons(annotation, image)[:1]
            new = bitmap(annotation, image)
            changed += bool((new != mask).any())
            mask = new
        if kind not in BOXES:
            annotation["area"] = int(mask.sum())
            if isinstance(annotation["segmentation"], list):
                points = np.array([n for p in annotation["segmentation"] for n in p]).reshape(-1, 2)
                low, high = points.min(axis=0), points.max(axis=0)
                annotation["bbox"] = [*low.tolist(), *(high - low).tolist()]
        kept.append(annotation)
    return {**content, "annotations": kept}, changed


def _moved(detections: list[dict[str, Any]], before: dict[str, Any], after: dict[str, Any]) -> list[dict]:
    """Return the detections with the ids of the imported file, by the names of images and classes."""
    old_names = {i["id"]: Path(i["file_name"]).name for i in before["images"]}
    old_classes = {c["id"]: c["name"] for c in before["categories"]}
    images = {Path(i["file_name"]).name: i["id"] for i in after["images"]}
    classes = {c["name"]: c["id"] for c in after["categories"]}
    only = len(old_classes) == len(classes) == 1
    return [
        {
            **found,
            "image_id": images[old_names[found["image_id"]]],
            "category_id": next(iter(classes.values()))
            if only
            else classes[old_classes[found["category_id"]]],
        }
        for found in detections
        if only or old_classes[found["category_id"]] in classes
    ]


CASES = [("dsb2018", kind) for kind in WRITERS]
CASES += [("coco80", kind) for kind in WRITERS if not kind.startswith("masks")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_ap_is_the_same(shared_dir: Path, tmp_path: Path, name: str, kind: str) -> None:
    whole, images = _some(shared_dir, name)
    reference, changed = _reference(whole, kind)
    detections = _detections(whole)
    data = read_dataset(WRITERS[kind](reference, images, tmp_path / "in"))
    ((_, content),) = data.parts.items()
    target = tmp_path / "out.json"
    write_files({target: content})
    assert len(content["images"]) == len(reference["images"])
    assert len(content["annotations"]) == len(reference["annotations"])
    dataset = CocoDataset(DatasetSource("x", target, data.folder), masks=kind not in BOXES, evaluation=True)
    dataset.check_files()
    assert len(dataset.objects.labels) == len(reference["annotations"])
    assert changed < 0.2 * len(reference["annotations"])
    kinds = ["bbox"] if kind in BOXES else ["bbox", "segm"]
    expected = evaluate_kinds(reference, detections, kinds)
    found = evaluate_kinds(content, _moved(detections, whole, content), kinds)
    assert 10 < expected["bbox"]["AP"] < 90
    assert found["bbox"]["AP"] == pytest.approx(expected["bbox"]["AP"], abs=1e-3)
    if "segm" in kinds:
        assert found["segm"]["AP"] == pytest.approx(expected["segm"]["AP"], abs=0.1)
    assert np.abs(_boxes(content) - _boxes(whole if kind == "voc" else reference)).max() <= (
        1 if kind == "voc" else 1e-3
    )


def _boxes(content: dict[str, Any]) -> np.ndarray:
    """Return (A, 4) ``xyxy`` by the names of the images; each keeps the order of its objects."""
    images = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
    ordered = sorted(content["annotations"], key=lambda a: images[a["image_id"]])
    boxes = np.array([annotation["bbox"] for annotation in ordered])
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
