"""Annotation files: what is read from good ones, and what is said about bad ones."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch

from gn_detect.data import (
    CocoDataset,
    DatasetSource,
    check_classes,
    check_same_classes,
    join_datasets,
    match_classes,
    read_image,
)
from gn_detect.data.coco.faults import ERROR, DataError
from gn_detect.data.doctor.report import examine
from gn_detect.errors import Code, UserError
from gn_detect.evaluation.coco_data import prepare_ground_truth
from tests.refusal import refusal

Write = Callable[[Any], DatasetSource]


def test_records_classes_and_objects(write_dataset: Write, small_coco: dict) -> None:
    dataset = CocoDataset(write_dataset(small_coco))
    assert [record.id for record in dataset.images] == [2, 5, 7, 11]
    assert dataset.category_ids == [3, 9, 40]
    assert dataset.class_names == ["ant", "cat", "dog"]
    assert dataset.num_crowds == 1
    assert dataset.objects.counts().tolist() == [1, 1, 2, 0]
    assert [dataset.labels(i).tolist() for i in range(4)] == [[2], [0], [1, 0], []]
    assert repr(dataset) == "CocoDataset(small: 4 images, 4 objects of 3 categories, 1 crowds)"


def test_targets_mix_polygons_and_rle(write_dataset: Write, small_coco: dict) -> None:
    bitmap = np.zeros((90, 60), dtype=np.uint8, order="F")
    bitmap[20:50, 10:30] = 1
    compressed = coco_mask.encode(bitmap)
    compressed["counts"] = compressed["counts"].decode()
    small_coco["annotations"].append({**small_coco["annotations"][2], "id": 6, "segmentation": compressed})
    dataset = CocoDataset(write_dataset(small_coco))
    target = dataset.target(0)
    assert target.boxes.tolist() == [[10, 20, 30, 50]] * 2
    for mask in target.masks:
        torch.testing.assert_close(mask, torch.from_numpy(bitmap).bool())
    target = dataset.target(2)
    assert target.boxes.dtype == torch.float32
    assert target.labels.dtype == torch.int64
    assert target.boxes.tolist() == [[10, 10, 40, 30], [50, 30, 70, 50]]
    assert [[len(polygon) for polygon in mask] for mask in target.masks] == [[8], [6, 6]]
    assert len(dataset.target(3)) == 0


def test_reading_without_masks_needs_no_segmentation(write_dataset: Write, small_coco: dict) -> None:
    for annotation in small_coco["annotations"]:
        del annotation["segmentation"]
    assert CocoDataset(write_dataset(small_coco), masks=False).target(2).masks is None
    with refusal("no-mask", "annotation 1 of image 7", "MODEL.MASK_ON False"):
        CocoDataset(write_dataset(small_coco))


def test_degenerate_boxes_are_dropped_with_one_warning(
    write_dataset: Write, small_coco: dict, caplog: pytest.LogCaptureFixture
) -> None:
    small_coco["annotations"][0]["bbox"] = [10, 10, 0, 5]
    small_coco["annotations"][4]["bbox"] = [64, 10, 5, 0]
    del small_coco["annotations"][3]  # a crowd, of which another warning speaks
    with caplog.at_level(logging.WARNING):
        dataset = CocoDataset(write_dataset(small_coco))
    assert len(dataset.objects.labels) == 2
    assert [r.getMessage().split("json: ")[1] for r in caplog.records] == [
        "dropped 2 annotation(s) whose box has no width or no height"
    ]


def test_short_and_odd_polygons_are_dropped(
    write_dataset: Write, small_coco: dict, caplog: pytest.LogCaptureFixture
) -> None:
    small_coco["annotations"][0]["segmentation"] = [[1, 1, 5, 5], [1, 2, 3, 4, 5, 6, 7]]
    small_coco["annotations"][1]["segmentation"].append([1, 1, 5, 5])
    with caplog.at_level(logging.WARNING):
        dataset = CocoDataset(write_dataset(small_coco))
    assert [len(mask) for mask in dataset.target(2).masks] == [2]
    assert "dropped 1 annotation(s) without a polygon of at least 3 points" in caplog.text


def test_box_partly_outside_is_kept_and_cut(write_dataset: Write, small_coco: dict) -> None:
    small_coco["annotations"][0]["bbox"] = [-5, 50, 200, 30]
    assert CocoDataset(write_dataset(small_coco)).target(2).boxes[0].tolist() == [0, 50, 90, 60]


def change(**fields: Any) -> Callable[[dict], None]:
    """Sets fields of the first annotation (id 1, image 7)."""
    return lambda content: content["annotations"][0].update(fields)


RLE = {"size": [60, 90], "counts": [0, 5400]}
BAD: dict[str, tuple[Callable[[dict], Any], str]] = {
    "unlisted category": (change(category_id=5), "annotation 1 of image 7 has category id 5, which"),
    "unlisted image": (change(image_id=8), "annotation 1 belongs to image 8, which is not listed; add the"),
    "repeated annotation": (change(id=2), "annotation id 2 occurs twice"),
    "box outside": (change(bbox=[90, 0, 5, 5]), "annotation 1 of image 7 has its box .* outside .* 90x60"),
    "box above": (change(bbox=[0, -9, 5, 9]), "annotation 1 of image 7 has its box .* outside the image"),
    "negative box": (change(bbox=[50, 9, -5, 5]), r"annotation 1 of image 7 .*\[50, 9, -5, 5\] of negative"),
    "nan box": (change(bbox=[float("nan"), 9, 5, 5]), "annotation 1 of image 7 .* 4 finite numbers"),
    "short box": (change(bbox=[1, 2, 3]), "annotation 1 of image 7 .* 4 finite numbers"),
    "word box": (change(bbox=["a", 2, 3, 4]), "annotation 1 of image 7 .* 4 finite numbers"),
    "no box": (
        lambda c: [c["annotations"][0].pop(key) for key in ("bbox", "segmentation")],
        "annotation 1 of image 7 has no 'bbox'; add it",
    ),
    "no id": (lambda c: c["annotations"][0].pop("id"), r"annotation 0 \(counted from 0\) has no 'id'"),
    "list id": (change(id=[1]), r"annotation 0 .* has 'id' \[1\]; it must be an integer"),
    "broken id": (change(id=1.5), r"annotation 0 .* has 'id' 1.5; it must be an integer"),
    "text image id": (change(image_id="x"), "annotation 1 belongs to image 'x', which is not listed"),
    "text category id": (change(category_id="x"), "annotation 1 of image 7 has category id 'x', which"),
    "crowd 2": (change(iscrowd=2), "annotation 1 of image 7 has 'iscrowd' 2; it must be 0 or 1"),
    "ignore": (change(ignore=1), "annotation 1 of image 7 has 'ignore' 1, .*use 'iscrowd' 1"),
    "no masks": (change(segmentation=[]), "annotation 1 of image 7 has no segmentation"),
    "flat short polygon": (
        change(segmentation=[1, 2, 3, 4]),
        "annotation 1 .* no list of polygons and no RLE",
    ),
    "nan polygon": (change(segmentation=[[1, 2, 3, 4, 5, float("inf")]]), "annotation 1 .* finite numbers"),
    "RLE size": (change(segmentation=RLE | {"size": [90, 60]}), r"annotation 1 .* \[90, 60\], .* \[60, 90\]"),
    "RLE sum": (change(segmentation=RLE | {"counts": [0, 5399]}), "annotation 1 .* of 5399 pixels, .* 5400"),
    "RLE negative": (
        change(segmentation=RLE | {"counts": [-1, 5401]}),
        "annotation 1 .* without valid 'counts'",
    ),
    "RLE text": (change(segmentation=RLE | {"counts": "é"}), "annotation 1 .* without valid 'counts'"),
    "RLE none": (
        change(segmentation={"size": [60, 90]}),
        "annotation 1 of image 7 .* without valid 'counts'",
    ),
    "annotation list": (lambda c: c["annotations"].append([1]), "annotation 5 .* is a list, not an object"),
    "repeated image": (lambda c: c["images"].append(c["images"][0]), "image id 7 occurs twice"),
    "no width": (lambda c: c["images"][0].pop("width"), "image 7 has no 'width'; add it"),
    "no size": (lambda c: c["images"][0].update(width=0), "image 7 is 0x60 pixels"),
    "no file name": (lambda c: c["images"][0].pop("file_name"), "image 7 has no 'file_name'"),
    "no images": (lambda c: c["images"].clear(), "lists no images"),
    "repeated category": (
        lambda c: c["categories"].append({"id": 3, "name": "x"}),
        "category id 3 occurs twice",
    ),
    "nameless category": (lambda c: c["categories"].append({"id": 4}), "category 4 has no 'name'"),
    "no categories": (lambda c: c["categories"].clear(), "lists no categories"),
    "key missing": (lambda c: c.pop("annotations"), "is not COCO: it has no 'annotations'"),
    "key of wrong type": (lambda c: c.update(images={}), "is not COCO: 'images' is an object"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_bad_content_is_named(
    write_dataset: Write, small_coco: dict, spoil: Callable[[dict], Any], message: str
) -> None:
    content = copy.deepcopy(small_coco)
    spoil(content)
    source = write_dataset(content)
    with pytest.raises(UserError, match=message) as caught:
        CocoDataset(source)
    assert str(source.annotations) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("", "not-json", "line 1, column 1"),
        ('{"images": [1,', "not-json", "line 1"),
        ("[]", "not-coco", "a list"),
        ("3", "not-coco", "an integer"),
        ("{}", "not-coco", "'images'"),
    ],
)
def test_files_that_are_not_coco(write_dataset: Write, text: str, code: Code, named: str) -> None:
    with refusal(code, named):
        CocoDataset(write_dataset(text))


def test_binary_and_missing_annotation_files(write_dataset: Write, small_coco: dict) -> None:
    source = write_dataset(small_coco)
    source.annotations.write_bytes(b"\x81\x82\x83\x84")
    with refusal("not-json", "annotations.json"):
        CocoDataset(source)
    source.annotations.write_bytes(b"\xff\xd8\xff\xe0")
    with refusal("foreign-format", "annotations.json", "an image"):
        CocoDataset(source)
    with refusal("missing-annotations"):
        CocoDataset(replace(source, annotations=source.annotations.with_name("no.json")))


def test_damaged_compressed_rle_is_named(write_dataset: Write, small_coco: dict) -> None:
    change(segmentation={"size": [60, 90], "counts": "PPPPPPPP"})(small_coco)
    with refusal("bad-rle", "annotation 1 of image 7", "'counts'"):
        CocoDataset(write_dataset(small_coco))


def test_areas_are_read_by_the_evaluation_alone(write_dataset: Write, small_coco: dict) -> None:
    small_coco["annotations"][0]["area"] = -1
    source = write_dataset(small_coco)
    CocoDataset(source)
    with refusal("bad-area", "annotation 1 of image 7", "'area' -1"):
        CocoDataset(source, evaluation=True)


SHORT = [[1, 1, 5, 5]]
NEVER_LEARNED: dict[str, tuple[dict[str, Any], str]] = {
    "crowd, empty mask": ({"iscrowd": 1, "segmentation": []}, "has no segmentation; add one"),
    "crowd, null": ({"iscrowd": 1, "segmentation": None}, "has no segmentation; add one"),
    "crowd, other size": ({"iscrowd": 1, "segmentation": RLE | {"size": [90, 60]}}, "has an RLE of 'size'"),
    "crowd, damaged": ({"iscrowd": 1, "segmentation": RLE | {"counts": [1, 2]}}, "has an RLE of 3 pixels"),
    "crowd, far away": ({"iscrowd": 1, "segmentation": [[0, 0, 1e9, 0, 0, 9]]}, "has a polygon that is not"),
    "flat box, no mask": ({"bbox": [10, 10, 0, 9], "segmentation": []}, "has no segmentation; add one"),
    "flat box, other size": (
        {"bbox": [10, 10, 0, 9], "segmentation": RLE | {"size": [60, 91]}},
        "has an RLE of 'size'",
    ),
    "crowd, polygons": ({"iscrowd": 1}, ""),
    "crowd, short polygon": ({"iscrowd": 1, "segmentation": SHORT}, ""),
    "crowd, odd polygon": ({"iscrowd": 1, "segmentation": [[1, 1, 5, 1, 5, 5, 1]]}, ""),
    "crowd, uncompressed": ({"iscrowd": 1, "segmentation": RLE}, ""),
    "flat box, polygons": ({"bbox": [10, 10, 0, 9]}, ""),
    "flat box, short polygon": ({"bbox": [10, 10, 0, 9], "segmentation": SHORT}, ""),
    "short polygon": ({"segmentation": SHORT}, ""),
}
"""What is done to the first annotation, which then is no object to learn from, and how it is refused."""


@pytest.mark.parametrize(("fields", "message"), NEVER_LEARNED.values(), ids=NEVER_LEARNED.keys())
def test_masks_that_only_the_evaluation_reads_are_checked_as_it_does(
    write_dataset: Write, small_coco: dict, fields: dict[str, Any], message: str
) -> None:
    """Refused when the dataset is read if and only if the evaluation would, after all of the training."""
    change(**fields)(small_coco)
    source = write_dataset(small_coco)
    assert len(CocoDataset(source).objects.labels) == 3
    assert len(CocoDataset(source, masks=False, evaluation=True)) == 4
    found = examine([source], open_images=False).findings
    errors = [(finding.annotation_id, finding.kind) for finding in found if finding.severity == ERROR]
    if not message:
        assert len(CocoDataset(source, evaluation=True)) == 4
        assert errors == []
        prepare_ground_truth(source.annotations, "segm")
        return
    with pytest.raises(DataError, match=f"annotation 1 of image 7 {message}") as caught:
        CocoDataset(source, evaluation=True)
    assert errors == [(1, caught.value.code)]
    with pytest.raises(DataError, match=f"annotation 1 of image 7 {message}") as refused:
        prepare_ground_truth(source.annotations, "segm")
    assert refused.value.code == caught.value.code


def test_missing_images_are_found_without_opening_any(write_dataset: Write, small_coco: dict) -> None:
    source = write_dataset(small_coco)
    dataset = CocoDataset(source)
    dataset.check_files()
    (source.images / "5.png").unlink()
    with refusal("missing-image", "small", "5.png"):
        dataset.check_files()
    (source.images / "7.png").unlink()
    with refusal("missing-image", "and 1 more"):
        dataset.check_files()
    with refusal("missing-image", "and 3 more"):
        CocoDataset(replace(source, images=source.images / "elsewhere")).check_files()


def test_a_missing_image_that_is_there_under_another_name(write_dataset: Write, small_coco: dict) -> None:
    source = write_dataset({})
    (source.images / "5.png").rename(source.images / "a 5.png")
    small_coco["images"][2]["file_name"] = "C:\\photos\\a%205.png"
    source.annotations.write_text(json.dumps(small_coco))
    dataset = CocoDataset(source)
    with refusal("misnamed-image", "a%205.png", "a 5.png", "doctor --fix"):
        dataset.check_files()
    with refusal("missing-image", "7.png"):
        read_image(source.images / "7.PNG")


def test_number_of_classes_is_checked(write_dataset: Write, small_coco: dict) -> None:
    dataset = CocoDataset(write_dataset(small_coco))
    check_classes(dataset, 3)
    message = r"dataset small has 3 categories \(ant, cat, dog\) but .*NUM_CLASSES is 80: set it to 3"
    with pytest.raises(UserError, match=message):
        check_classes(dataset, 80)


def test_joined_datasets(write_dataset: Write, small_coco: dict) -> None:
    first = CocoDataset(write_dataset(small_coco))
    second = CocoDataset(write_dataset(small_coco))
    joined = join_datasets([first, second])
    assert joined.name == "small+small"
    assert len(joined) == 8
    assert joined.num_crowds == 2
    for i in range(8):
        expected, found = first.target(i % 4), joined.target(i)
        torch.testing.assert_close(found.boxes, expected.boxes)
        for a, b in zip(found.masks, expected.masks, strict=True):
            torch.testing.assert_close(a, b)
    small_coco["categories"][0]["name"] = "cow"
    other = CocoDataset(write_dataset(small_coco))
    with refusal("classes-differ", "(ant, cat, dog)", "small (ant, cow, dog)"):
        join_datasets([first, other])
    with refusal("classes-differ"):
        check_same_classes(first, other)


def test_classes_of_a_model_are_found_by_name(write_dataset: Write, small_coco: dict) -> None:
    """Also where the file lists fewer, in another order; objects keep their names."""
    dataset = CocoDataset(write_dataset(small_coco))
    ids, labels = dataset.category_ids, dataset.objects.labels
    match_classes(dataset, ["cow", "dog", "cat", "ant"], "w.pth", "remedy")
    assert dataset.class_names == ["cow", "dog", "cat", "ant"]
    assert dataset.category_ids == [None, ids[2], ids[1], ids[0]]
    assert dataset.objects.labels.tolist() == (3 - labels).tolist()
    other = CocoDataset(write_dataset(small_coco))
    with refusal("classes-differ", "ant, cat, dog", "w.pth", "dog, cat", ": ant; remedy"):
        match_classes(other, ["dog", "cat"], "w.pth", "remedy")
    assert other.class_names == ["ant", "cat", "dog"]


def test_names_that_several_classes_share(write_dataset: Write, small_coco: dict) -> None:
    """By position where both lists are equal; otherwise they are ambiguous."""
    small_coco["categories"][0]["name"] = small_coco["categories"][1]["name"]
    dataset = CocoDataset(write_dataset(small_coco))
    names, ids = list(dataset.class_names), dataset.category_ids
    match_classes(dataset, names, "w.pth", "remedy")
    assert dataset.category_ids == ids
    assert len(set(names)) == 2
    with refusal("classes-differ"):
        match_classes(dataset, names[::-1], "w.pth", "remedy")


def test_fingerprint_is_of_the_content_and_not_of_its_place(
    write_dataset: Write, small_coco: dict, tmp_path: Path
) -> None:
    dataset = CocoDataset(write_dataset(small_coco))
    before = dataset.fingerprint()
    assert before.startswith("4 images, ")
    source = write_dataset(small_coco)
    moved = shutil.move(source.images, tmp_path / "moved")
    assert CocoDataset(replace(source, images=Path(moved))).fingerprint() == before
    assert CocoDataset(write_dataset(small_coco), masks=False).fingerprint() != before
    small_coco["annotations"][0]["bbox"][0] += 1
    assert CocoDataset(write_dataset(small_coco)).fingerprint() != before


def test_an_rle_that_ends_early_is_refused(write_dataset: Write, small_coco: dict) -> None:
    """Pycocotools would take the rest of the mask from memory that nobody wrote."""
    whole = coco_mask.frPyObjects({"size": [60, 90], "counts": [100, 40, 5260]}, 60, 90)["counts"].decode()
    last = coco_mask.frPyObjects({"size": [60, 90], "counts": [100, 40]}, 60, 90)["counts"].decode()
    small_coco["annotations"][0]["segmentation"] = {"size": [60, 90], "counts": whole}
    CocoDataset(write_dataset(small_coco))
    small_coco["annotations"][0]["segmentation"]["counts"] = last
    with refusal("bad-rle", "annotation 1", "140 pixels", "5400"):
        CocoDataset(write_dataset(small_coco))


def test_dataset_can_be_sent_to_another_process(write_dataset: Write, small_coco: dict) -> None:
    dataset = CocoDataset(write_dataset(small_coco))
    copied = pickle.loads(pickle.dumps(dataset))
    assert copied.images == dataset.images
    torch.testing.assert_close(copied.target(0).masks[0], dataset.target(0).masks[0])


def test_repeated_ids_in_coco_minival_files_are_accepted(write_dataset: Write, small_coco: dict) -> None:
    small_coco["annotations"][1]["id"] = 1
    source = write_dataset(small_coco)
    minival = source.annotations.rename(source.annotations.with_name("instances_minival2014.json"))
    assert len(CocoDataset(replace(source, annotations=minival)).objects.labels) == 4


@pytest.mark.parametrize(
    ("part", "images", "annotations", "crowds"), [("train", 92, 829, 9), ("val", 66, 560, 8)]
)
def test_coco80(shared_dir: Path, part: str, images: int, annotations: int, crowds: int) -> None:
    root = shared_dir / "data" / "coco80"
    path = root / "annotations" / f"instances_{part}.json"
    dataset = CocoDataset(DatasetSource(part, path, root / "images"), evaluation=True)
    dataset.check_files()
    assert (len(dataset), dataset.num_crowds) == (images, crowds)
    assert len(dataset.objects.labels) == annotations - crowds
    assert len(dataset.class_names) == 80
    assert dataset.category_ids[-1] == 90
    by_id = {annotation["id"]: annotation for annotation in json.loads(path.read_text())["annotations"]}
    for row, annotation_id in enumerate(dataset.objects.annotation_ids.tolist()):
        annotation = by_id[annotation_id]
        x, y, width, height = annotation["bbox"]
        assert dataset.objects.boxes[row].tolist() == [x, y, x + width, y + height]
        assert dataset.category_ids[dataset.objects.labels[row]] == annotation["category_id"]
        assert np.concatenate(dataset.objects.masks.mask(row, 1, 1)).tolist() == sum(
            annotation["segmentation"], []
        )


def test_dsb2018(shared_dir: Path) -> None:
    root = shared_dir / "data" / "dsb2018"
    path = root / "annotations" / "instances_val.json"
    dataset = CocoDataset(DatasetSource("dsb", path, root / "images"))
    assert len(dataset) == 41
    assert len(dataset.objects.labels) == 1131
    first = min(json.loads(path.read_text())["images"], key=lambda image: image["id"])
    labelled = dataset.read(0)
    assert labelled.size == (first["height"], first["width"])
    for box, mask in zip(labelled.boxes, labelled.masks, strict=True):
        y, x = np.nonzero(mask.decode())
        assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
