"""The same data in other spellings give the same numbers; wrong data are refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest

from gn_detect.errors import UserError
from gn_detect.evaluation import coco, evaluate_results, prepare_detections, prepare_ground_truth
from gn_detect.evaluation import detections as detections_module
from tests.evaluation.synthetic import HEIGHT, WIDTH, random_data


def spelled_otherwise(change: Callable[[dict], None]) -> tuple[dict, list[dict]]:
    truth, detections = random_data(3)
    for annotation in truth["annotations"]:
        change(annotation)
    return truth, detections


def uncompressed(annotation: dict) -> None:
    if annotation["iscrowd"]:
        mask = coco_mask.decode(annotation["segmentation"]).flatten(order="F")
        edges = np.flatnonzero(np.diff(mask)) + 1
        runs = np.diff(np.concatenate([[0], edges, [len(mask)]])).tolist()
        annotation["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [0, *runs] if mask[0] else runs}


def as_bytes(annotation: dict) -> None:
    if annotation["iscrowd"]:
        annotation["segmentation"]["counts"] = annotation["segmentation"]["counts"].encode()


@pytest.mark.parametrize(
    "change",
    [
        uncompressed,
        as_bytes,
        lambda a: a.update(id=a["id"] - 1),  # pycocotools itself mistakes the id 0 for "not matched"
        lambda a: a.update(ignore=a["iscrowd"]),
        lambda a: a.pop("area"),  # rectangles: the mask's area is the box's
        lambda a: a.pop("iscrowd") if not a["iscrowd"] else None,
        lambda a: a.update(iscrowd=bool(a["iscrowd"])),
        lambda a: a.pop("bbox"),
        lambda a: None if a["iscrowd"] else a["segmentation"].append([1, 1, 9, 9]),  # a line covers nothing
        lambda a: a.update(extra={"anything": None}),
    ],
)
def test_other_spellings_of_the_same_ground_truth(change: Callable[[dict], None], backend: str) -> None:
    plain, detections = random_data(3)
    other, _ = spelled_otherwise(change)
    for iou_type in ("bbox", "segm"):
        expected = evaluate_results(plain, detections, iou_type, "pycocotools")
        assert evaluate_results(other, detections, iou_type, backend) == pytest.approx(
            expected, abs=1e-9, nan_ok=True
        )


@pytest.mark.parametrize("change", [float, lambda i: i - 5000, lambda i: f"{i:04}", lambda i: i + 2**70])
def test_other_ids(change: Callable[[int], Any], backend: str) -> None:
    """Fast evaluators refuse negative, textual and huge ids, which pycocotools takes."""
    plain, detections = random_data(3)
    other = json.loads(json.dumps(plain))
    for kind in ("image", "category"):
        for entry in other["images" if kind == "image" else "categories"]:
            entry["id"] = change(entry["id"])
        for entry in other["annotations"]:
            entry[f"{kind}_id"] = change(entry[f"{kind}_id"])
    moved = [
        {**d, "image_id": change(d["image_id"]), "category_id": change(d["category_id"])} for d in detections
    ]
    expected = evaluate_results(plain, detections, "segm", "pycocotools")
    assert evaluate_results(other, moved, "segm", backend) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("other", [True, False])
def test_other_spellings_of_the_same_detections(other: bool, backend: str) -> None:
    """Bytes or plain runs, masks without boxes; what belongs to ground truth has no effect."""
    truth, detections = random_data(3)
    expected = evaluate_results(truth, detections, "segm", "pycocotools")
    for detection in detections:
        detection |= {"ignore": 1, "iscrowd": 1, "area": 7, "id": 1}
        del detection["bbox"]
        rle = {"iscrowd": 1, "segmentation": detection["segmentation"]}
        (uncompressed if other else as_bytes)(rle)
        detection["segmentation"] = rle["segmentation"]
    numbers = evaluate_results(truth, detections, "segm", backend)
    assert numbers == pytest.approx(expected, abs=1e-9, nan_ok=True)
    with_boxes = evaluate_results(truth, detections, "bbox", backend)
    assert with_boxes == pytest.approx(
        evaluate_results(truth, detections, "bbox", "pycocotools"), abs=1e-9, nan_ok=True
    )


@pytest.mark.parametrize("number", [0, 4, 5])
@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda d: d.update(score=str(d["score"])), True),
        (lambda d: d.update(image_id=float(d["image_id"])), True),
        (lambda d: d.update(bbox=" ".join(map(str, d["bbox"]))), True),
        (lambda d: d["segmentation"].update(counts=d["segmentation"]["counts"].encode()), True),
        (lambda d: d["segmentation"].update(size=[float(n) for n in d["segmentation"]["size"]]), True),
        (lambda d: d["segmentation"].update(counts="1M2"), False),
        (lambda d: d["segmentation"].update(size=[1, 1]), False),
        (lambda d: d.pop("score"), False),
    ],
)
def test_one_detection_in_another_form_among_others(
    change: Callable[[dict], Any], same: bool, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It alone is read one by one, at any place of a batch; what is wrong is named by its number."""
    truth, detections = random_data(3)
    truth_before = prepare_ground_truth(truth, "segm")
    before = prepare_detections(detections, truth_before, ["bbox", "segm"])
    singles = []
    single = detections_module._Reader.single
    monkeypatch.setattr(
        detections_module._Reader,
        "single",
        lambda self, given, place: singles.append(place) or single(self, given, place),
    )
    monkeypatch.setattr(detections_module, "_AT_ONCE", 5)
    change(detections[number])
    if not same:
        with pytest.raises(UserError, match=f"detection {number + 1} "):
            prepare_detections(detections, truth_before, ["bbox", "segm"])
        return
    found = prepare_detections(detections, truth_before, ["bbox", "segm"])
    assert singles == [number + 1]
    for kind in ("bbox", "segm"):
        rows = range(len(detections))
        assert [found.entry(row, kind) for row in rows] == [before.entry(row, kind) for row in rows]


def test_images_without_a_size(backend: str) -> None:
    truth, detections = random_data(3)
    expected = evaluate_results(truth, detections, "bbox", "pycocotools")
    for image in truth["images"]:
        del image["height"], image["width"]
    assert evaluate_results(truth, detections, "bbox", backend) == pytest.approx(
        expected, abs=1e-9, nan_ok=True
    )
    with pytest.raises(UserError, match="its image has no 'height' or 'width', which polygons need"):
        evaluate_results(truth, detections, "segm", backend)


def test_objects_without_a_polygon_are_left_out_of_the_mask_ap(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Training leaves them out, too; pycocotools fails on them."""
    truth, detections = random_data(1)
    fewer = {**truth, "annotations": truth["annotations"][1:]}
    truth["annotations"][0]["segmentation"] = [[1, 1, 9, 9]]
    numbers = evaluate_results(truth, detections, "segm", backend)
    assert numbers == pytest.approx(evaluate_results(fewer, detections, "segm", backend), nan_ok=True)
    assert "1 annotation(s) without a polygon of at least 3 points" in caplog.text


def test_inputs_are_left_alone(backend: str) -> None:
    truth, detections = random_data(1)
    before = json.dumps([truth, detections])
    evaluate_results(truth, detections, "segm", backend)
    assert json.dumps([truth, detections]) == before


BAD_MASKS = [
    ([], "has no segmentation"),
    ({"size": [60, 80], "counts": [4800]}, "has an RLE of 'size' [60, 80], but the image's is [120, 160]"),
    ({"size": [HEIGHT, WIDTH], "counts": [50, 50]}, "has an RLE of 100 pixels, but the image has 19200"),
    ({"size": [HEIGHT, WIDTH], "counts": "\x01z"}, "has an RLE without valid 'counts' (wrong characters)"),
    (
        {"size": [HEIGHT, WIDTH], "counts": "1M2"},
        "has an RLE without valid 'counts' (a run below 0)",
    ),  # hangs
    ({"size": [HEIGHT, WIDTH], "counts": "0" * 9}, "has an RLE of 0 pixels, but the image has 19200"),
    ({"size": [HEIGHT, WIDTH], "counts": "000T"}, "has an RLE without valid 'counts' (cut off"),
    ({"size": [HEIGHT, WIDTH], "counts": [19200, 10**400, -(10**400)]}, "has an RLE without valid 'counts'"),
    ({"size": [HEIGHT, WIDTH]}, "has an RLE without valid 'counts'"),
    ([[1, 2, float("nan"), 4, 5, 6]], "not all finite numbers near the image"),
    ([[1, 2, 1e300, 4, 5, 6]], "not all finite numbers near the image"),  # would take all memory
    ([[1, 2, 10**400, 4, 5, 6]], "not all finite numbers near the image"),
    ([[0, 0, 2000, 2000] * 400], "an outline of 1600000 pixels, which no object in an image of 160x120"),
]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"image_id": 12345}, "is of image 12345, which the ground truth does not list"),
        ({"category_id": 2}, "is of category 2, which the ground truth does not list"),
        ({"score": float("nan")}, "is nan, which is not finite"),
        ({"score": None}, "its score None is not a number"),
        ({"score": 10**400}, "which is not finite"),
        ({"image_id": 10**400}, "which the ground truth does not list"),
        ({"image_id": [1]}, "which the ground truth does not list"),
        ({"bbox": [1, 2, 3, 10**400]}, "is not x, y, width, height in finite numbers"),
        ({"bbox": [1, 2, 3]}, "is not x, y, width, height"),
        ({"bbox": [1, 2, float("inf"), 3]}, "is not x, y, width, height in finite numbers"),
    ],
)
def test_bad_detections(change: dict, part: str) -> None:
    truth, detections = random_data(1)
    detections[4] |= change
    with pytest.raises(UserError, match="results: detection 5") as caught:
        evaluate_results(truth, detections, "bbox")
    assert part in str(caught.value)


@pytest.mark.parametrize(("mask", "part"), BAD_MASKS)
def test_bad_masks(mask: Any, part: str) -> None:
    truth, detections = random_data(1)
    bad = [*detections[:4], {**detections[4], "segmentation": mask}]
    with pytest.raises(UserError, match="results: detection 5 has") as caught:
        evaluate_results(truth, bad, "segm")
    assert part in str(caught.value)
    truth["annotations"][2] |= {"id": 77, "segmentation": mask}
    with pytest.raises(UserError, match="ground truth: annotation 77 of image .* has") as caught:
        evaluate_results(truth, detections, "segm")
    assert part in str(caught.value)
    evaluate_results(truth, detections, "bbox")


def test_bad_files(tmp_path: Path) -> None:
    truth, detections = random_data(1)
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match="annotation file .*x.json is missing"):
        evaluate_results(path, detections, "bbox")
    path.write_text("{")
    with pytest.raises(UserError, match="x.json is not JSON"):
        evaluate_results(path, detections, "bbox")
    path.write_text("[]")
    with pytest.raises(UserError, match="x.json is not COCO: it holds a list"):
        evaluate_results(path, detections, "bbox")
    path.write_text("{}")
    with pytest.raises(UserError, match="not COCO results"):
        evaluate_results(truth, path, "bbox")
    del truth["annotations"][0]["bbox"], truth["annotations"][0]["segmentation"]
    with pytest.raises(UserError, match="annotation 1 .*has no 'bbox'; add it"):
        evaluate_results(truth, detections, "bbox")


def test_any_name_of_a_category(backend: str) -> None:
    """Half a surrogate pair is valid JSON, and no valid text."""
    truth, detections = random_data(1)
    expected = evaluate_results(truth, detections, "segm", "pycocotools")
    for category, name in zip(truth["categories"], ["\ud800", "", "é\n", "kind"], strict=True):
        category["name"] = name
    numbers = evaluate_results(truth, detections, "segm", backend)
    assert numbers["AP"] == pytest.approx(expected["AP"])
    assert "AP-\ud800" in numbers


def test_very_many_categories(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Those without objects cost nothing, the others are evaluated some at a time; there may be too many."""
    truth, detections = random_data(3)
    expected = {kind: evaluate_results(truth, detections, kind, backend) for kind in ("bbox", "segm")}
    truth["categories"] += [{"id": i, "name": f"other {i}"} for i in range(100, 20_100)]
    monkeypatch.setattr(coco, "_CATEGORIES", 3)
    for kind, numbers in expected.items():
        found = evaluate_results(truth, detections, kind, backend)
        assert {name: found[name] for name in numbers} == pytest.approx(numbers, abs=1e-9, nan_ok=True)
        assert np.isnan(found["AP-other 100"])
    truth["categories"] += [{"id": i, "name": "more"} for i in range(30_000, 40_000)]
    with pytest.raises(UserError, match="it lists 30004 categories, more than the 25000"):
        evaluate_results(truth, detections, "bbox", backend)
