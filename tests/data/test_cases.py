"""Files as other tools write them: what training, the survey and the evaluation read from them."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gn_detect.data import CocoDataset, DatasetSource
from gn_detect.engine.autoconfig import survey
from gn_detect.evaluation import evaluate_results, prepare_ground_truth, read_truth
from tests.refusal import refusal

BOXES = [
    [[8 + 3 * i, 10 + 2 * i, 32 + 3 * i, 30 + 2 * i], [50, 21 + i, 80, 46 + i]] for i in range(4)
]  # image by image, xyxy
WITH_MASKS = [
    "via_string_image_id",
    "via_flat_polygon",
    "no_iscrowd_no_area",
    "image_size_float",
    "category_name_number",
    "json_bom",
]


def case(shared_dir: Path, name: str, part: str = "train") -> DatasetSource:
    folder = shared_dir / "cases" / name
    return DatasetSource(name, folder / f"{part}.json", folder / "images")


def perfect_results(truth: Any) -> list[dict[str, Any]]:
    """Every object, found."""
    images = {number: image_id for image_id, number in truth.images.items()}
    categories = {number: category_id for category_id, number in truth.categories.items()}
    return [
        {
            "image_id": images[entry["image_id"]],
            "category_id": categories[entry["category_id"]],
            "bbox": entry["bbox"],
            "score": 0.9,
        }
        | ({"segmentation": entry["segmentation"]} if "segmentation" in entry else {})
        for entry in truth.coco["annotations"]
        if not entry["iscrowd"]
    ]


@pytest.mark.parametrize("name", WITH_MASKS)
def test_masks_are_read(shared_dir: Path, name: str) -> None:
    source = case(shared_dir, name)
    dataset = CocoDataset(source, evaluation=True)
    dataset.check_files()
    assert len(dataset) == 4
    assert dataset.num_crowds == 0
    for index in range(4):
        target = dataset.target(index)
        assert target.boxes.tolist() == BOXES[index]
        polygons = [np.concatenate(mask).reshape(-1, 2) for mask in target.masks]
        assert [np.ptp(points, axis=0).prod() for points in polygons] == [480, 750]
        assert dataset.read(index).size == (64, 96)
    found = survey(source)
    assert found.has_masks
    assert not found.has_bitmaps
    assert len(found.boxes) == 8
    assert found.images.tolist() == [[64, 96]] * 4


@pytest.mark.parametrize("name", WITH_MASKS)
def test_masks_are_evaluated(shared_dir: Path, name: str) -> None:
    source = case(shared_dir, name)
    truth = prepare_ground_truth(source.annotations, "segm")
    assert [entry["area"] for entry in truth.coco["annotations"]] == [480, 750] * 4
    assert [entry["iscrowd"] for entry in truth.coco["annotations"]] == [0] * 8
    results = perfect_results(truth)
    for iou_type in ("bbox", "segm"):
        numbers = evaluate_results(source.annotations, results, iou_type, "pycocotools")
        assert numbers["AP"] == pytest.approx(100)
        assert numbers["APs"] == pytest.approx(100)
        assert math.isnan(numbers["APl"])
        half = evaluate_results(source.annotations, results[:4], iou_type, "pycocotools")
        assert half["AR100"] == pytest.approx(50)


def test_a_name_that_is_a_number(shared_dir: Path) -> None:
    source = case(shared_dir, "category_name_number")
    assert CocoDataset(source).class_names == ["3"] == survey(source).class_names
    assert prepare_ground_truth(source.annotations, "bbox").labels == ["3"]


def test_boxes_alone(shared_dir: Path) -> None:
    source = case(shared_dir, "boxes_only")
    found = survey(source)
    assert not found.has_masks
    assert len(found.boxes) == 8
    dataset = CocoDataset(source, masks=None, evaluation=True)
    assert dataset.objects.masks is None
    assert [dataset.target(i).boxes.tolist() for i in range(4)] == BOXES
    truth = prepare_ground_truth(source.annotations, "bbox")
    numbers = evaluate_results(source.annotations, perfect_results(truth), "bbox")
    assert numbers["AP"] == pytest.approx(100)
    with refusal("no-mask", "annotation 1 of image 1", "MODEL.MASK_ON False"):
        CocoDataset(source)


def test_boxes_that_are_fractions(shared_dir: Path) -> None:
    source = case(shared_dir, "boxes_only_normalised")
    for read in (
        lambda: CocoDataset(source, masks=False),
        lambda: CocoDataset(source, masks=None, evaluation=True),
        lambda: survey(source),
        lambda: prepare_ground_truth(source.annotations, "bbox"),
        lambda: evaluate_results(source.annotations, [], "bbox"),
    ):
        with refusal("fractions", "8 of 8 boxes", "annotation 1", "--fix OUT.json") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_objects_of_a_brush_that_are_crowds(shared_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = case(shared_dir, "cvat_brush_half_crowd")
    with caplog.at_level(logging.INFO):
        dataset = CocoDataset(source)
        survey(source)  # the training that follows reads the file again
    assert dataset.num_crowds == 4
    assert len(dataset.objects.labels) == 4
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "4 of 8 objects are crowds ('iscrowd' 1) and left out of training; 4 of the 4 " in record.message
    truth = prepare_ground_truth(source.annotations, "segm")
    assert sorted(entry["iscrowd"] for entry in truth.coco["annotations"]) == [0] * 4 + [1] * 4
    numbers = evaluate_results(source.annotations, perfect_results(truth), "segm")
    assert numbers["AP"] == pytest.approx(100)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_a_val_file_without_area_and_iscrowd(shared_dir: Path, iou_type: str) -> None:
    """Its numbers are those of a file that has both."""
    plain, bare = (case(shared_dir, name) for name in ("json_bom", "no_iscrowd_no_area"))
    results = perfect_results(prepare_ground_truth(plain.annotations, iou_type))
    for number, entry in enumerate(results):
        entry["score"] = 1 - number / 10
        entry["bbox"] = [entry["bbox"][0] + number % 4, *entry["bbox"][1:]]
    results[3]["image_id"] = 1
    val = bare.annotations.with_name("val.json")
    CocoDataset(DatasetSource("val", val, bare.images), evaluation=True)
    expected = evaluate_results(plain.annotations, results, iou_type, "pycocotools")
    found = evaluate_results(val, results, iou_type)
    assert 0 < expected["AP"] < 100
    assert {k: v for k, v in found.items() if k in ("AP", "AP75", "APs", "AR1")} == pytest.approx(
        {k: v for k, v in expected.items() if k in ("AP", "AP75", "APs", "AR1")}
    )


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("via_string_image_id", "numbers that are text are read as numbers (annotation 1 and 7 more)"),
        ("via_flat_polygon", "are read as polygons (annotation 1 and 7 more)"),
        ("image_size_float", "integers that are written as 1.0 are read as 1 (image 1 and 3 more)"),
        ("category_name_number", "category names that are numbers are read as text (category 1)"),
        ("json_bom", "begins with a byte order mark, which is left out"),
        ("no_iscrowd_no_area", "a missing 'iscrowd' is 0 (annotation 1 and 7 more)"),
    ],
)
def test_each_reading_logs_once_what_has_another_form(
    shared_dir: Path, caplog: pytest.LogCaptureFixture, name: str, note: str
) -> None:
    source = case(shared_dir, name)
    for read in (CocoDataset, lambda source: read_truth(source.annotations)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            read(source)
            prepare_ground_truth(source.annotations, "segm")  # the evaluation, again and again
            survey(source)
        assert sum(note in record.message for record in caplog.records) == 1
        assert all(record.levelno == logging.INFO for record in caplog.records)
