"""Annotations of other formats are recognised, and the message says how to bring them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gn_detect.data.formats.recognise import describe_foreign, describe_foreign_content

SHAPE = {"name": "polygon", "all_points_x": [1, 2, 3], "all_points_y": [1, 2, 1]}
VIA_IMAGE = {"filename": "a.jpg", "size": 9, "regions": [{"shape_attributes": SHAPE}], "file_attributes": {}}
TASK = {
    "id": 1,
    "data": {"image": "/data/upload/1/a.jpg"},
    "annotations": [{"id": 1, "result": [{"type": "rectanglelabels", "value": {"x": 1}}]}],
}
JSON_MIN = {
    "image": "/data/a.jpg",
    "id": 1,
    "label": [],
    "annotator": 1,
    "annotation_id": 1,
    "lead_time": 2.5,
}
BOX = {"label": "cat", "coordinates": {"x": 1, "y": 2, "width": 3, "height": 4}}
RESULT = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
IMAGES = [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 5}]
JSONS: dict[str, tuple[Any, str]] = {
    "labelme": ({"version": "5.0", "flags": {}, "shapes": [], "imagePath": "a.jpg"}, "gn-detect import"),
    "via project": ({"_via_settings": {}, "_via_img_metadata": {"a.jpg9": VIA_IMAGE}}, "VIA"),
    "via": ({"a.jpg9": VIA_IMAGE, "b.jpg7": {**VIA_IMAGE, "filename": "b.jpg"}}, "VIA"),
    "via 3": (
        {"project": {}, "config": {}, "attribute": {}, "file": {}, "metadata": {}, "view": {}},
        "VIA 3",
    ),
    "label studio": ([TASK], "Label Studio"),
    "label studio, one task": (TASK, "Label Studio"),
    "label studio, nothing annotated": ([{**TASK, "annotations": []}], "Label Studio"),
    "label studio, old": ([{"id": 1, "completions": [{"result": []}], "data": {}}], "Label Studio"),
    "label studio min": ([JSON_MIN], "JSON-MIN"),
    "results": ([RESULT], "results"),
    "list": ([{"id": 1, **{k: v for k, v in RESULT.items() if k != "score"}}], "annotations alone"),
    "captions": (
        {"images": IMAGES, "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}], "categories": []},
        "captions",
    ),
    "panoptic": (
        {"images": IMAGES, "annotations": [{"image_id": 1, "segments_info": []}], "categories": []},
        "panoptic",
    ),
    "createml": ([{"image": "a.jpg", "annotations": [BOX]}], "CreateML"),
    "geojson": ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
    "supervisely": ({"size": {"height": 4, "width": 5}, "objects": [{"classTitle": "cat"}]}, "Supervisely"),
    "supervisely meta": ({"classes": [{"title": "cat", "shape": "polygon"}], "tags": []}, "Supervisely"),
    "labelbox": ([{"data_row": {"id": "x"}, "projects": {}}], "Labelbox"),
    "darwin": ({"version": "2.0", "item": {"name": "a.jpg"}, "annotations": []}, "V7"),
    "datumaro": ({"categories": {"label": {}}, "items": []}, "Datumaro"),
    "detectron2": ([{"file_name": "a.jpg", "height": 4, "width": 5, "annotations": []}], "detectron2"),
}


@pytest.mark.parametrize("name", JSONS)
def test_json_of_other_formats(name: str) -> None:
    content, word = JSONS[name]
    text = describe_foreign_content(content)
    assert text.startswith("it is ")
    assert word in text
    assert "; " in text
    assert "\n" not in text


@pytest.mark.parametrize("content", [{}, [], 1, None, "x", {"images": IMAGES}, [[1]], {"a": {"b": 1}}])
def test_what_is_not_known(content: Any) -> None:
    assert describe_foreign_content(content) == ""


def test_coco_is_not_foreign(small_coco: dict) -> None:
    assert describe_foreign_content(small_coco) == ""
    assert describe_foreign_content({**small_coco, "annotations": []}) == ""


FILES = {
    "data.yaml": ("train: images/train\nnc: 1\nnames: [cat]\n", "YOLO"),
    "a.txt": ("0 0.5 0.5 0.25 0.125\n1 0.25 0.5 0.1 0.1\n", "YOLO"),
    "b.txt": ("0 0.5 0.5 0.25 0.5 0.3 0.1 0.2 0.7\n", "YOLO"),
    "c.txt": ("0 .5 .5 .25 1.\n1 2.5e-01 1e+0 .1 .1\n", "YOLO"),
    "a.xml": ("<annotation>\n<folder>x</folder><object><name>cat</name></object></annotation>", "VOC"),
    "b.xml": ('<?xml version="1.0"?>\n<annotations><version>1.1</version></annotations>', "CVAT"),
    "lines.json": ('{"data_row": {"id": 1}}\n{"data_row": {"id": 2}}\n', "Labelbox"),
    "via.csv": ("filename,file_size,file_attributes,region_count\na.jpg,9,{},1\n", "CSV"),
    "a.zip": ("PK\x03\x04...", "archive"),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files(tmp_path: Path, name: str) -> None:
    text, word = FILES[name]
    (tmp_path / name).write_text(text)
    assert word in describe_foreign(tmp_path / name)


@pytest.mark.parametrize("text", ["", "hello", "<html>", "\0\1\2", "1 2 3", "names"])
def test_unknown_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert describe_foreign(tmp_path / "a.txt") == "" == describe_foreign(tmp_path / "gone")


@pytest.mark.parametrize("name", [n for n in FILES if n not in ("a.zip", "lines.json")])
def test_folders(tmp_path: Path, name: str) -> None:
    text, word = FILES[name]
    folder = tmp_path / "labels" / "train"
    folder.mkdir(parents=True)
    (folder / name).write_text(text)
    for number in range(50):
        (folder / f"{number}.jpg").touch()
    assert word in describe_foreign(tmp_path)
    assert "folder" in describe_foreign(tmp_path)


def test_a_folder_that_holds_coco_names_the_file(tmp_path: Path, small_coco: dict) -> None:
    (tmp_path / "train").mkdir()
    file = tmp_path / "train" / "_annotations.coco.json"
    file.write_text(json.dumps(small_coco))
    assert f"give the COCO file in it, {file}" in describe_foreign(tmp_path)
    file.write_text("{}")
    assert describe_foreign(tmp_path) == "it is a folder; give the COCO annotation file"
