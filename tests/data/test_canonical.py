"""The same data in the forms in which tools write them are the same data, for every reader."""

from __future__ import annotations

import codecs
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest

from gn_detect.data import CocoDataset, DatasetSource, read_image_list
from gn_detect.data.coco import rules
from gn_detect.data.coco.canonical import canonical, has_masks
from gn_detect.data.coco.faults import ERROR, DataError
from gn_detect.data.coco.reader import load_coco, read_canonical
from gn_detect.data.coco.values import as_number, read_mask
from gn_detect.data.doctor.report import examine
from gn_detect.engine.autoconfig import survey
from gn_detect.errors import UserError
from gn_detect.evaluation import evaluate_results, prepare_ground_truth, read_truth
from tests.refusal import refusal

Write = Callable[[Any], DatasetSource]
Change = Callable[[dict[str, Any]], Any]


def all_of(part: str, key: str, change: Callable[[Any], Any]) -> Change:
    """The value of a key of every entry, changed."""

    def apply(content: dict[str, Any]) -> None:
        for entry in content[part]:
            entry[key] = change(entry[key])

    return apply


def masks(change: Callable[[Any], Any], kind: type) -> Change:
    """Every segmentation that is polygons (list) or RLE (dict), changed."""

    def apply(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            if isinstance(entry["segmentation"], kind):
                entry["segmentation"] = change(entry["segmentation"])

    return apply


def deep(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A change of every number in lists of lists."""
    return lambda value: [deep(change)(v) for v in value] if isinstance(value, list) else change(value)


def pairs(polygon: list[float]) -> list[list[float]]:
    return [polygon[i : i + 2] for i in range(0, len(polygon), 2)]


def compressed(mask: dict[str, Any]) -> dict[str, Any]:
    rle = coco_mask.frPyObjects(mask, *mask["size"])
    return {"size": mask["size"], "counts": rle["counts"].decode()}


NUMBER_FORMS = {"text": str, "spaced": lambda v: f" {v} ", "float": float, "float text": lambda v: f"{v}.0"}
ID_PLACES = [
    ("images", "id"),
    ("images", "width"),
    ("images", "height"),
    ("annotations", "id"),
    ("annotations", "image_id"),
    ("annotations", "category_id"),
    ("annotations", "iscrowd"),
    ("annotations", "area"),
    ("categories", "id"),
]
FORMS: dict[str, Change] = {
    f"{part} {key} as {name}": all_of(part, key, form)
    for part, key in ID_PLACES
    for name, form in NUMBER_FORMS.items()
}
FORMS |= {
    "bbox as numbers in text": all_of("annotations", "bbox", deep(str)),
    "bbox as text": all_of("annotations", "bbox", json.dumps),
    "bbox as plain text": all_of("annotations", "bbox", lambda box: ",".join(map(str, box))),
    "bbox as a tuple in text": all_of("annotations", "bbox", lambda box: str(tuple(box))),
    "bbox with named numbers": all_of(
        "annotations", "bbox", lambda box: dict(zip(("x", "y", "width", "height"), box, strict=True))
    ),
    "bbox with short names": all_of(
        "annotations", "bbox", lambda box: dict(zip("xywh", map(str, box), strict=True))
    ),
    "points with named coordinates": masks(
        lambda mask: [[{"x": x, "y": y} for x, y in pairs(polygon)] for polygon in mask], list
    ),
    "categories by name": lambda c: [
        a.update(category_id=next(k["name"] for k in c["categories"] if k["id"] == a["category_id"]))
        for a in c["annotations"]
    ],
    "images by file name": lambda c: [
        a.update(image_id=next(i["file_name"] for i in c["images"] if i["id"] == a["image_id"]))
        for a in c["annotations"]
    ],
    "bbox as an empty list in text": all_of("annotations", "bbox", lambda box: "[]"),
    "bbox missing": lambda c: [a.pop("bbox") for a in c["annotations"]],
    "bbox null": all_of("annotations", "bbox", lambda box: None),
    "bbox empty": all_of("annotations", "bbox", lambda box: []),
    "iscrowd bool": all_of("annotations", "iscrowd", bool),
    "iscrowd true": all_of("annotations", "iscrowd", lambda v: "true" if v else "False"),
    "iscrowd missing": lambda c: [a.pop("iscrowd") for a in c["annotations"] if not a["iscrowd"]],
    "iscrowd null": all_of("annotations", "iscrowd", lambda v: v or None),
    "ignore 0": lambda c: [a.update(ignore=0) for a in c["annotations"]],
    "ignore null": lambda c: [a.update(ignore=None) for a in c["annotations"]],
    "ignore text": lambda c: [a.update(ignore="0") for a in c["annotations"]],
    "ignore as iscrowd": lambda c: [a.update(ignore=a["iscrowd"]) for a in c["annotations"]],
    "area missing": lambda c: [a.pop("area") for a in c["annotations"]],
    "area null": all_of("annotations", "area", lambda v: None),
    "blank cells": lambda c: [
        a.update(area=blank, bbox=blank, ignore=blank, iscrowd=a["iscrowd"] or blank)
        for a, blank in zip(c["annotations"], (math.nan, "", " ", math.nan, ""), strict=True)
    ],
    "optional null": lambda c: [
        e.update(license=None, supercategory=None, attributes=None, keypoints=None)
        for e in sum((c[key] for key in c), [])
    ],
    "coordinates as text": masks(deep(str), list),
    "polygons as text": masks(json.dumps, list),
    "each polygon as text": masks(lambda mask: [json.dumps(p) for p in mask], list),
    "each polygon as plain text": masks(lambda mask: [",".join(map(str, p)) for p in mask], list),
    "each polygon as words": masks(lambda mask: [" ".join(map(str, p)) for p in mask], list),
    "flat polygon": masks(lambda mask: mask[0] if len(mask) == 1 else mask, list),
    "flat polygon of text": masks(lambda mask: deep(str)(mask[0]) if len(mask) == 1 else mask, list),
    "flat polygon as text": masks(lambda mask: json.dumps(mask[0] if len(mask) == 1 else mask), list),
    "pairs": masks(lambda mask: pairs(mask[0]) if len(mask) == 1 else [pairs(p) for p in mask], list),
    "lists of pairs": masks(lambda mask: [pairs(p) for p in mask], list),
    "lists of pairs of text": masks(lambda mask: deep(str)([pairs(p) for p in mask]), list),
    "tuples in text": masks(lambda mask: str([tuple(map(tuple, pairs(p))) for p in mask]), list),
    "one list too many": masks(lambda mask: [mask], list),
    "RLE size as text": masks(lambda mask: mask | {"size": deep(str)(mask["size"])}, dict),
    "RLE size as float": masks(lambda mask: mask | {"size": deep(float)(mask["size"])}, dict),
    "RLE counts as text": masks(lambda mask: mask | {"counts": deep(str)(mask["counts"])}, dict),
    "RLE counts as float": masks(lambda mask: mask | {"counts": deep(float)(mask["counts"])}, dict),
    "RLE counts as one text": masks(lambda mask: mask | {"counts": json.dumps(mask["counts"])}, dict),
    "RLE counts as words": masks(lambda mask: mask | {"counts": " ".join(map(str, mask["counts"]))}, dict),
    "RLE size as one text": masks(lambda mask: mask | {"size": str(tuple(mask["size"]))}, dict),
    "RLE compressed": masks(compressed, dict),
    "RLE as text": masks(json.dumps, dict),
    "RLE in a list": masks(lambda mask: [mask], dict),
    "name is a number": lambda c: [entry.update(name=i) for i, entry in enumerate(c["categories"])],
}


def described(source: DatasetSource) -> list[Any]:
    """All that training and evaluation take from a file but names of classes."""
    dataset = CocoDataset(source, evaluation=True)
    targets = [dataset.target(index) for index in range(len(dataset))]
    found: list[Any] = [dataset.category_ids, dataset.num_crowds, dataset.images.sizes().tolist()]
    found += [[record.id, record.file_name] for record in dataset.images]
    for target in targets:
        found += [target.boxes.tolist(), target.labels.tolist()]
        found += [mask if isinstance(mask, list) else mask.tolist() for mask in target.masks or ()]
    return json.loads(json.dumps(found, default=lambda array: np.asarray(array).tolist()))


def evaluated(source: Any, iou_type: str) -> list[Any]:
    """Annotations as evaluators get them, by the ids of images and categories."""
    truth = prepare_ground_truth(source, iou_type)
    images, categories = ({n: i for i, n in ids.items()} for ids in (truth.images, truth.categories))
    return [truth.sizes[truth.images[7]]] + [
        entry | {"image_id": images[entry["image_id"]], "category_id": categories[entry["category_id"]]}
        for entry in truth.coco["annotations"]
    ]


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_the_same_file(write_dataset: Write, small_coco: dict, name: str) -> None:
    plain = write_dataset(small_coco)
    expected, truths = described(plain), [evaluated(small_coco, t) for t in ("bbox", "segm")]
    surveyed = survey(plain)
    other = copy.deepcopy(small_coco)
    FORMS[name](other)
    before = json.dumps(other)
    source = write_dataset(other)
    assert described(source) == expected
    for iou_type, truth in zip(("bbox", "segm"), truths, strict=True):
        for given in (other, source.annotations):
            assert evaluated(given, iou_type) == truth
    assert json.dumps(other) == before
    again = survey(source)
    assert again.has_masks
    assert again.boxes.tolist() == surveyed.boxes.tolist()
    errors = [f for f in examine([source], open_images=False).findings if f.severity == ERROR]
    assert errors == []
    file = read_canonical(source.annotations)
    silent = ("RLE compressed", "annotations area as float", "optional null", "ignore 0", "ignore null")
    assert bool(file.notes) == (name not in (*silent, "ignore as iscrowd"))
    assert canonical(file.content, file.path).content == file.content  # nothing is left to do


def test_text_ids_are_numbered_in_order(write_dataset: Write, small_coco: dict) -> None:
    expected = described(write_dataset(small_coco))
    for entry in small_coco["images"]:
        entry["id"] = f"img_{entry['id']}.jpg"
    for entry in small_coco["categories"]:
        entry["id"] = entry["name"]
    names = {9: "cat", 3: "ant", 40: "dog"}
    for entry in small_coco["annotations"]:
        entry["id"] = f"a{entry['id']}"
        entry["image_id"] = f"img_{entry['image_id']}.jpg"
        entry["category_id"] = names[entry["category_id"]]
    source = write_dataset(small_coco)
    dataset = CocoDataset(source, evaluation=True)
    assert [record.id for record in dataset.images] == [1, 2, 3, 4]
    assert [Path(record.file_name).name for record in dataset.images] == ["7.png", "2.png", "5.png", "11.png"]
    assert dataset.category_ids == [1, 2, 3]
    assert dataset.class_names == ["cat", "ant", "dog"]
    assert sorted(dataset.objects.annotation_ids.tolist()) == [1, 2, 3, 5]
    assert dataset.target(0).boxes.tolist() == [[10, 10, 40, 30], [50, 30, 70, 50]]
    assert dataset.labels(0).tolist() == [0, 1]
    assert len(expected) == len(described(source))
    assert dataset.spelt_images[2] == "img_2.jpg"
    assert dataset.spelt_categories == {
        1: "cat",
        2: "ant",
        3: "dog",
    }
    (note,) = read_canonical(source.annotations).notes
    assert note.kind == "text-id"
    assert note.count == 12
    assert "(image img_7.jpg and 11 more)" in str(note)
    truth = read_truth(source.annotations)
    assert truth.file_names == {1: "7.png", 2: "2.png", 3: "5.png", 4: "11.png"}


def test_ids_of_both_kinds(write_dataset: Write, small_coco: dict) -> None:
    """Numbers stay, names get the next that are free; the same number in two spellings is one id."""
    small_coco["images"][1]["id"] = "two"
    for entry in small_coco["annotations"]:
        entry["image_id"] = "two" if entry["image_id"] == 2 else entry["image_id"]
    content = load_coco(write_dataset(small_coco).annotations)
    assert [entry["id"] for entry in content["images"]] == [7, 12, 5, 11]
    assert [entry["image_id"] for entry in content["annotations"]] == [7, 7, 12, 12, 5]
    small_coco["images"][2]["id"] = "7"
    with refusal("duplicate-image-id", "image id 7"):
        CocoDataset(write_dataset(small_coco))
    small_coco["images"][2]["id"] = "two"
    with refusal("duplicate-image-id", "image id 12"):
        prepare_ground_truth(write_dataset(small_coco).annotations, "bbox")


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
@pytest.mark.parametrize("form", [str, float, lambda i: f"img {i}", lambda i: i + 2**70])
def test_results_name_ids_as_the_file_or_as_numbers(
    small_coco: dict, form: Callable[[int], Any], backend: str
) -> None:
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5 + i / 10}
        for i, a in enumerate(small_coco["annotations"])
    ]
    results[0]["category_id"] = 3
    expected = evaluate_results(small_coco, results, "bbox", backend)
    other = copy.deepcopy(small_coco)
    for part, kind in (("images", "image_id"), ("categories", "category_id")):
        for entry in other[part]:
            entry["id"] = form(entry["id"])
        for entry in other["annotations"]:
            entry[kind] = form(entry[kind])
    spelt = [
        r | {"image_id": form(r["image_id"]), "category_id": form(r["category_id"]), "score": str(r["score"])}
        for r in results
    ]
    found = evaluate_results(other, spelt, "bbox", backend)
    assert found["AP"] == pytest.approx(expected["AP"])
    assert found["AP-ant"] == pytest.approx(expected["AP-ant"])
    truth = prepare_ground_truth(other, "bbox")
    images = {file_id: i for i, file_id in truth.file.image_ids.items()}
    categories = {file_id: i for i, file_id in truth.file.category_ids.items()}
    numbered = [
        r | {k: ids.get(r[k], r[k]) for k, ids in (("image_id", images), ("category_id", categories))}
        for r in spelt
    ]
    again = evaluate_results(other, numbered, "bbox", backend)
    assert again == pytest.approx(found, nan_ok=True)


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE)],
)
def test_byte_order_marks(write_dataset: Write, small_coco: dict, encoding: str, mark: bytes) -> None:
    small_coco["categories"][0]["name"] = "châtaigne"
    source = write_dataset(small_coco)
    expected = described(source)
    source.annotations.write_bytes(mark + json.dumps(small_coco, ensure_ascii=False).encode(encoding))
    assert described(source) == expected
    assert [note.kind for note in read_canonical(source.annotations).notes] == ["byte-order-mark"]
    assert CocoDataset(source).class_names[1] == "châtaigne"
    assert len(read_image_list(source.annotations, source.images)) == 4
    results = source.annotations.with_name("results.json")
    entry = {"image_id": 7, "category_id": 9, "bbox": [10, 10, 30, 20], "score": 0.5}
    results.write_bytes(mark + json.dumps([entry]).encode(encoding))
    numbers = evaluate_results(source.annotations, results, "bbox")
    assert numbers["AP-châtaigne"] == pytest.approx(100)


@pytest.mark.parametrize("value", [[], None, [[]], [None], {}, "", "[]", "[[]]", math.nan, "missing"])
def test_files_without_masks_are_boxes_alone(write_dataset: Write, small_coco: dict, value: Any) -> None:
    for entry in small_coco["annotations"]:
        entry["segmentation"] = value
        entry["keypoints"], entry["num_keypoints"] = [1, 2, 2], 1
        if value == "missing":
            del entry["segmentation"]
    source = write_dataset(small_coco)
    assert not has_masks(load_coco(source.annotations))
    assert not survey(source).has_masks
    dataset = CocoDataset(source, masks=None, evaluation=True)
    assert dataset.objects.masks is None
    assert len(dataset.objects.labels) == 4
    found = examine([source], open_images=False).findings
    assert [finding for finding in found if finding.severity == ERROR] == []
    prepare_ground_truth(source.annotations, "bbox")
    assert sum(map(len, read_truth(source.annotations).objects.values())) == 5


UNREADABLE = [
    ("images", "id", 1.5),
    ("images", "id", [7]),
    ("images", "id", True),
    ("images", "width", "abc"),
    ("images", "width", 90.5),
    ("images", "height", float("nan")),
    ("images", "height", 10**400),
    ("images", "height", "1e999"),
    ("annotations", "id", None),
    ("annotations", "image_id", 1.5),
    ("annotations", "image_id", "nowhere"),
    ("annotations", "category_id", {}),
    ("annotations", "category_id", "cow"),
    ("annotations", "iscrowd", 2),
    ("annotations", "iscrowd", "maybe"),
    ("annotations", "iscrowd", 0.5),
    ("annotations", "ignore", 1),
    ("annotations", "ignore", "x"),
    ("annotations", "area", "large"),
    ("annotations", "area", float("inf")),
    ("annotations", "area", -1),
    ("annotations", "bbox", ["a", 1, 2, 3]),
    ("annotations", "bbox", "abc"),
    ("annotations", "bbox", [1, 2, 3]),
    ("annotations", "bbox", [1, 2, float("nan"), 3]),
    ("annotations", "bbox", [1, 2, 10**400, 3]),
    ("annotations", "bbox", [1, True, 5, 5]),
    ("annotations", "segmentation", [1, 2, 3, 4]),
    ("annotations", "segmentation", [1, 2, 3, 4, 5, 6, 7]),
    ("annotations", "segmentation", [["a"] * 6]),
    ("annotations", "segmentation", [[1, 2, 3, 4, 5, None]]),
    ("annotations", "segmentation", "polygon"),
    ("annotations", "segmentation", "[1, 2"),
    ("annotations", "segmentation", [[[[[[[1, 2, 3, 4, 5, 6]]]]]]]),
    ("annotations", "segmentation", [[1, 2, 3, 4, 5, "inf"]]),
    ("annotations", "segmentation", {"size": ["a", 90], "counts": [5400]}),
    ("annotations", "segmentation", {"size": [60, 90], "counts": [5400.5]}),
    ("annotations", "segmentation", {"size": [60, 90], "counts": "1M2"}),
    ("categories", "id", 1.5),
    ("categories", "name", None),
    ("categories", "name", []),
]


@pytest.mark.parametrize(
    ("part", "key", "value"), UNREADABLE, ids=[f"{p} {k} {v!s:.20}" for p, k, v in UNREADABLE]
)
def test_all_readers_refuse_what_has_no_obvious_reading(
    write_dataset: Write, small_coco: dict, part: str, key: str, value: Any
) -> None:
    """For the same reason, in one line."""
    small_coco[part][0][key] = value
    source = write_dataset(small_coco)
    with pytest.raises(DataError) as training:
        CocoDataset(source, evaluation=True)
    with pytest.raises(UserError) as evaluation:
        prepare_ground_truth(source.annotations, "segm")
    for caught in (training, evaluation):
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
    assert training.value.code == evaluation.value.code
    assert str(evaluation.value).split(": ", 1)[1].split(" of image")[0] in str(training.value)
    errors = [f for f in examine([source], open_images=False).findings if f.severity == ERROR]
    assert training.value.code in {finding.kind for finding in errors}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1", 1),
        (" 12.5 ", 12.5),
        ("-3", -3),
        ("+.5e1", 5),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        ("1" * 200, None),
        ("0x10", None),
        ("１", None),
        ("nan", None),
        (True, None),
        ("", None),
        (None, None),
    ],
)
def test_numbers(given: Any, expected: float | None) -> None:
    assert as_number(given) == expected


def test_short_polygons_keep_their_form() -> None:
    """A box or two points among polygons are left out later, and said."""
    for mask in ([[1, 2], [3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6]], [[]], [[1, 2, 3, 4, 5]]):
        kinds: set[str] = set()
        assert read_mask(mask, kinds) == mask
        assert not kinds


class TestFractions:
    """Boxes and polygons as parts of the image."""

    @staticmethod
    def fractions(content: dict, number: int) -> None:
        for entry in content["annotations"][:number]:
            entry["bbox"] = [0.25, 0.125, 0.5, 0.5]

    @pytest.mark.parametrize(
        ("number", "refused"), [(40, True), (20, True), (3, True), (2, False), (1, False)]
    )
    def test_part_of_a_file(self, write_dataset: Write, small_coco: dict, number: int, refused: bool) -> None:
        """A few in a hundred may be objects in the corner of an image."""
        some = small_coco["annotations"]
        some[:] = [entry | {"id": 1 + i, "iscrowd": 0} for i, entry in enumerate(some * 8)]
        self.fractions(small_coco, number)
        source = write_dataset(small_coco)
        kinds = {finding.kind for finding in examine([source], open_images=False).findings}
        assert ("fractions" in kinds) == refused
        if not refused:
            assert len(CocoDataset(source, masks=False).objects.labels) == 40
            return
        with refusal("fractions", f"{number} of 40 boxes"):
            CocoDataset(source, masks=False)

    def test_polygons(self, write_dataset: Write, small_coco: dict) -> None:
        for entry in small_coco["annotations"]:
            entry["segmentation"] = [[0.1, 0.1, 0.5, 0.1, 0.5, 1]]
        source = write_dataset(small_coco)
        for read in (CocoDataset, survey, lambda s: prepare_ground_truth(s.annotations, "segm")):
            with refusal("fractions", "5 of 5 segmentations"):
                read(source)

    def test_whole_numbers_are_pixels(self, write_dataset: Write, small_coco: dict) -> None:
        for entry in small_coco["annotations"]:
            entry["bbox"] = [0, 0, 1, 1]
        assert len(CocoDataset(write_dataset(small_coco), masks=False).objects.labels) == 4

    def test_images_as_small_as_that(self, write_dataset: Write, small_coco: dict) -> None:
        self.fractions(small_coco, 5)
        for entry in small_coco["images"]:
            entry["height"] = entry["width"] = 2
        assert len(CocoDataset(write_dataset(small_coco), masks=False).objects.labels) == 4


@pytest.mark.parametrize(
    ("polygon", "refused"),
    [
        ([0, 0, 80, 50] * 4, False),
        ([0, 0, 80, 50] * 2000, True),  # a small file, and much memory
        ([0, 0, 1900, 0, 0, 1900], False),
        ([0, 0, 1e6, 0, 0, 1e6], True),
        ([v for i in range(20_000) for v in (i % 90, i % 60)], False),  # short edges
    ],
)
def test_outlines_are_bounded(
    write_dataset: Write, small_coco: dict, polygon: list[float], refused: bool
) -> None:
    """By what an image of that size can need; the entry is named."""
    small_coco["annotations"][0]["segmentation"] = [polygon]
    source = write_dataset(small_coco)
    if not refused:
        assert len(CocoDataset(source, evaluation=True).objects.labels) == 4
        return
    for read in (CocoDataset, survey, lambda s: prepare_ground_truth(s.annotations, "segm")):
        with pytest.raises(DataError, match="annotation 1 of image 7 has") as caught:
            read(source)
        assert caught.value.code == "bad-polygon"


def test_long_outlines_are_bounded_all_together(
    write_dataset: Write, small_coco: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone may be; thousands of them in a small file would be drawn for minutes."""
    monkeypatch.setattr(rules, "_LONG_IN_ALL", rules._LONG_IN_ALL / 10)
    small_coco["images"][0] |= {"height": 13_000, "width": 13_000}
    stroke = [v for i in range(60) for v in (13_000 * (i % 2), 200 * i)]
    first = small_coco["annotations"][0] | {"bbox": [0, 0, 12_999, 12_000], "segmentation": [stroke]}
    small_coco["annotations"] = [{**first, "id": number} for number in range(7)]
    source = write_dataset(small_coco)
    for read in (CocoDataset, lambda s: prepare_ground_truth(s.annotations, "segm")):
        with pytest.raises(DataError, match="annotation 5 of image 7 has .* too much to draw in all"):
            read(source)
    small_coco["annotations"] = small_coco["annotations"][:4]
    assert len(CocoDataset(write_dataset(small_coco)).objects.labels) == 4
