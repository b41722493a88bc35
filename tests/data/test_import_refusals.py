"""Damaged and hostile label files: each is refused in one line with code, file, place and remedy."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_detect.data.formats.importing import READERS, read_dataset
from gn_detect.errors import UserError
from tests.data.format_writers import pack_runs
from tests.data.test_import_formats import (
    NAMES,
    RECT,
    SIZE,
    YAML,
    cvat,
    mask_of,
    result,
    save,
    voc,
    write,
    yolo,
)
from tests.refusal import refusal

LABELS = "0 0.5 0.5 0.25 0.5"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "data" / "a.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("line", "code", "what"),
    [
        ("0 0.5 zz 0.25 0.5", "damaged-labels", "'zz'"),
        ("0 0.5 nan 0.25 0.5", "damaged-labels", "'nan'"),
        ("0 0.5 0.5 0.25", "damaged-labels", "3 numbers"),
        ("0 0.5 0.5 0.25 0.5 0.9", "damaged-labels", "5 numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "damaged-labels", "7 numbers"),
        ("2 0.5 0.5 0.25 0.5", "dangling-category", "class 2"),
        ("-1 0.5 0.5 0.25 0.5", "dangling-category", "class -1"),
        ("0.5 0.5 0.5 0.25 0.5", "dangling-category", "class 0.5"),
        ("1e99 0.5 0.5 0.25 0.5", "dangling-category", "class 1e99"),
        ("0 20 10 8 6", "fractions", "20"),
        ("0 0.1 0.1 0.4 0.1 0.4 8", "fractions", "8"),
        ("0 -0.5 0.5 0.25 0.5", "fractions", "-0.5"),
    ],
)
def test_lines_of_yolo(tmp_path: Path, line: str, code: Any, what: str) -> None:
    path = yolo(tmp_path, YAML + NAMES["list"], f"{LABELS}\n\n{line}\n")
    with refusal(code, "train/p.txt", "line 3", what):
        read_dataset(path)


@pytest.mark.parametrize(
    ("yaml", "code", "what"),
    [
        ("names: [cat]\n", "damaged-labels", "names no folder"),
        ("train: images/train\nnc: 3\nnames: [cat]\n", "damaged-labels", "'nc' is 3"),
        ("train: images/train\nnames: {1: cat, 2: dog}\n", "damaged-labels", "from 0"),
        ("train: images/train\nnames: [cat, cat]\n", "damaged-labels", "'cat' twice"),
        ("train: images/train\nnames: 5\n", "damaged-labels", "'names' is 5"),
        ("train: images/none\nnames: [cat]\n", "damaged-labels", "images/none"),
        ("train: {a: b}\nnames: [cat]\n", "damaged-labels", "'train'"),
        ("train: images/train\nnames: [cat\n", "not-yaml", "data.yaml"),
        ("a: &a [1]\nb: *c\nnames: [cat]\n", "not-yaml", "data.yaml"),
        ("train: images/train\nkpt_shape: [17, 3]\nnames: [cat]\n", "damaged-labels", "keypoints"),
        ("train: ../outside\nnames: [cat]\n", "image-outside", "outside"),
        ("path: ../outside\ntrain: .\nnames: [cat]\n", "image-outside", "outside"),
        ("train: list.txt\nnames: [cat]\n", "image-outside", "line 1"),
    ],
)
def test_data_yaml(tmp_path: Path, yaml: str, code: Any, what: str) -> None:
    save(tmp_path / "outside" / "o.png")
    write(tmp_path / "outside" / "o.txt", LABELS)
    path = yolo(tmp_path / "in", yaml, LABELS)
    write(tmp_path / "in" / "list.txt", f"{tmp_path / 'outside' / 'o.png'}\n")
    with refusal(code, what):
        read_dataset(path)
    if code == "image-outside":
        data = read_dataset(path, allow_outside=True)
        ((_, content),) = data.parts.items()
        (image,) = content["images"]
        assert (data.folder / image["file_name"]).samefile(tmp_path / "outside" / "o.png")


def test_images_without_any_label(tmp_path: Path) -> None:
    """They are no empty images: the labels are somewhere else. A test part may have none."""
    path = yolo(tmp_path, YAML + "test: images/test\nnames: [cat]\n", LABELS)
    save(tmp_path / "images" / "test" / "t.png")
    data = read_dataset(path)
    assert list(data.parts) == ["train", "val"]
    assert any("test part without labels" in note for note in data.notes)
    (tmp_path / "labels" / "val").rename(tmp_path / "other")
    with refusal("missing-annotations", "images/val", "labels/val/p.txt"):
        read_dataset(path)


def test_labels_without_an_image(tmp_path: Path) -> None:
    path = yolo(tmp_path, YAML + "names: [cat]\n", LABELS)
    (tmp_path / "images" / "val" / "p.png").rename(tmp_path / "images" / "val" / "q.png")
    with refusal("missing-image", "labels/val/p.txt"):
        read_dataset(path)


VOC: dict[str, tuple[str, str, str]] = {
    "cut": (voc(("cat", 0, 1, 1, 4, 4, ""))[:-30], "damaged-labels", "not XML"),
    "doctype": ("<!DOCTYPE a [<!ENTITY x 'y'>]>" + voc(), "unsafe-file", "line 1"),
    "external": ("<!DOCTYPE a SYSTEM 'http://127.0.0.1:9/x.dtd'>" + voc(), "unsafe-file", "DOCTYPE"),
    "no box": (
        voc().replace("</annotation>", "<object><name>a</name></object></annotation>"),
        "damaged-labels",
        "<object> 1",
    ),
    "no number": (voc(("cat", 0, 1, "zz", 4, 4, "")), "damaged-labels", "<ymin> 'zz'"),
    "turned round": (voc(("cat", 0, 9, 1, 4, 4, "")), "damaged-labels", "before it begins"),
    "no class": (voc((" ", 0, 1, 1, 4, 4, "")), "malformed", "<object> 1"),
    "outside of the image": (
        voc(("cat", 0, 1, 1, 4, 4, ""), ("cat", 0, 90, 1, 99, 4, "")),
        "box-outside",
        "<object> 2",
    ),
    "other size": (voc(size=SIZE.replace("40", "90")), "size-differs", "90x20"),
    "no image": (voc(name="b.png"), "missing-image", "'b.png'"),
    "rotated": (
        voc().replace(
            "</annotation>", "<object><robndbox><angle>0.5</angle></robndbox></object></annotation>"
        ),
        "rotated-box",
        "<object> 1",
    ),
    "fractions": (voc(("cat", 0, 0.1, 0.2, 0.4, 0.5, "")), "fractions", "pixels"),
}


@pytest.mark.parametrize("name", VOC)
def test_voc(folder: Path, name: str) -> None:
    text, code, what = VOC[name]
    write(folder / "a.xml", text)
    with refusal(code, "a.xml", what):  # type: ignore[arg-type]
        read_dataset(folder, kind="voc")


def test_entities_are_not_hidden_by_an_encoding(folder: Path) -> None:
    text = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "y">]>' + voc()
    write(folder / "a.xml", text.encode("utf-16"))
    with refusal("unsafe-file", "a.xml"):
        read_dataset(folder, kind="voc")
    write(folder / "a.xml", text.replace("?>", ' encoding="utf-7"?>', 1).encode("utf-7"))
    with pytest.raises(UserError):
        read_dataset(folder, kind="voc")


@pytest.mark.parametrize("content", [b"caf\xe9 \x81", b"\xe9\xa0 \xff\xfe\x00", "名前".encode("shift_jis")])
def test_an_unclear_encoding(folder: Path, content: bytes) -> None:
    before, after = voc(("@", 0, 1, 1, 4, 4, "")).encode().split(b"@")
    write(folder / "a.xml", before + content + after)
    with refusal("damaged-labels", "a.xml", "UTF-8"):
        read_dataset(folder, kind="voc")


CVAT: dict[str, tuple[str, str, str]] = {
    "rotated": ('<box label="dog" xtl="1" ytl="2" xbr="9" ybr="9" rotation="30"/>', "rotated-box", "30"),
    "unknown class": ('<box label="cow" xtl="1" ytl="2" xbr="9" ybr="9"/>', "dangling-category", "'cow'"),
    "no number": ('<box label="dog" xtl="nan" ytl="2" xbr="9" ybr="9"/>', "damaged-labels", "<box> 1"),
    "no pairs": ('<polygon label="dog" points="1,1;2"/>', "damaged-labels", "pairs"),
    "too few runs": ('<mask label="dog" rle="0, 4" left="1" top="1" width="9" height="9"/>', "bad-rle", "81"),
    "text runs": ('<mask label="dog" rle="a" left="1" top="1" width="9" height="9"/>', "bad-rle", "<mask> 1"),
    "negative runs": (
        '<mask label="dog" rle="-1,82" left="1" top="1" width="9" height="9"/>',
        "bad-rle",
        "run",
    ),
    "giant": (
        '<mask label="dog" rle="9" left="1" top="1" width="999999" height="999999"/>',
        "bad-rle",
        "<mask>",
    ),
    "long runs": (
        f'<mask label="dog" rle="{"9" * 25}" left="1" top="1" width="9" height="9"/>',
        "bad-rle",
        "<mask>",
    ),
    "unknown shape": ('<sphere label="dog"/>', "damaged-labels", "<sphere> 1"),
}


@pytest.mark.parametrize("name", CVAT)
def test_cvat(folder: Path, name: str) -> None:
    inner, code, what = CVAT[name]
    write(folder / "x.xml", cvat(inner))
    with refusal(code, "x.xml", "<image> 1", what):  # type: ignore[arg-type]
        read_dataset(folder)


def test_cvat_of_a_video_and_a_repeated_image(folder: Path) -> None:
    write(folder / "x.xml", cvat("").replace("</annotations>", "<track/></annotations>"))
    with refusal("damaged-labels", "images 1.1"):
        read_dataset(folder)
    image = '<image name="a.png" width="40" height="20">'
    write(folder / "x.xml", cvat("", image=f"{image}</image>{image}"))
    with refusal("damaged-labels", "<image> 2", "a.png"):
        read_dataset(folder)


def _labelme(shape: Any, **other: Any) -> str:
    return json.dumps({"shapes": [shape], "imagePath": "a.png"} | other)


POLYGON = {"label": "x", "shape_type": "polygon", "points": [[1, 1], [5, 1], [5, 5]]}
GIANT = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 30).decode()
LABELME: dict[str, tuple[str, str, str]] = {
    "cut": (_labelme(POLYGON)[:-20], "not-json", "line 1"),
    "deep": ('{"shapes": ' + "[" * 100_000, "not-json", "JSON"),
    "no label": (_labelme({**POLYGON, "label": None}), "damaged-labels", "shape 0"),
    "no pairs": (_labelme({**POLYGON, "points": [[1], [2]]}), "damaged-labels", "shape 0"),
    "infinite": (
        _labelme({**POLYGON, "points": [[1, 1], [5, 1], [5, float("inf")]]}),
        "damaged-labels",
        "shape 0",
    ),
    "huge": (_labelme({**POLYGON, "points": [[1, 1], [5, 1], [5, 1e15]]}), "bad-polygon", "shape 0"),
    "shape": (_labelme({**POLYGON, "shape_type": "cube"}), "damaged-labels", "'cube'"),
    "circle": (_labelme({**POLYGON, "shape_type": "circle"}), "damaged-labels", "3 points"),
    "mask": (
        _labelme({**POLYGON, "shape_type": "mask", "points": [[0, 0], [1, 1]], "mask": GIANT}),
        "damaged-labels",
        "PNG",
    ),
    "size": (_labelme(POLYGON, imageWidth=0, imageHeight=20), "damaged-labels", "[0, 20]"),
    "path": (_labelme(POLYGON, imagePath=7), "damaged-labels", "'imagePath'"),
    "climbing": (_labelme(POLYGON, imagePath="../outside.png"), "image-outside", "../outside.png"),
    "terminal": (_labelme(POLYGON, imagePath="a\x1b[31m\n.png"), "missing-image", "\\x1b"),
    "nul": (_labelme(POLYGON, imagePath="a\0.png"), "malformed", "imagePath"),
}


@pytest.mark.parametrize("name", LABELME)
def test_labelme(folder: Path, name: str) -> None:
    text, code, what = LABELME[name]
    save(folder.parent / "outside.png")
    write(folder / "a.json", text)
    with refusal(code, "a.json", what) as caught:  # type: ignore[arg-type]
        read_dataset(folder, kind="labelme")
    assert re.fullmatch(r"[^\x00-\x1f]+", str(caught.value))
    assert len(str(caught.value)) < 1000


VIA: dict[str, tuple[Any, dict, str]] = {
    "unclear class": (RECT, {"age": "1", "state": "2"}, "age, state"),
    "no class": (RECT, {"class": ""}, "'class'"),
    "two classes": (RECT, {"class": {"a": True, "b": True}}, "'class'"),
    "no number": ({**RECT, "x": "left"}, {"class": "a"}, "'left'"),
    "unequal": (
        {"name": "polygon", "all_points_x": [1, 2, 3], "all_points_y": [1]},
        {"class": "a"},
        "as many",
    ),
    "shape": ({"name": "cube"}, {"class": "a"}, "'cube'"),
    "no shape": (7, {"class": "a"}, "region 0"),
}


@pytest.mark.parametrize("name", VIA)
def test_via(folder: Path, name: str) -> None:
    shape, other, what = VIA[name]
    region = {"shape_attributes": shape, "region_attributes": other}
    entry = {"filename": "a.png", "size": 1, "regions": [region]}
    write(folder / "via.json", json.dumps({"a.png1": entry}))
    with refusal("damaged-labels", what):
        read_dataset(folder)


BOX = {"x": 25, "y": 50, "width": 50, "height": 25}
BRUSH = pack_runs(np.zeros(4 * 40 * 20, dtype=np.uint8))
STUDIO: dict[str, tuple[dict, str, str]] = {
    "rotated": (
        result("rectanglelabels", **BOX, rotation=5, rectanglelabels=["a"]),
        "rotated-box",
        "5 degrees",
    ),
    "two classes": (
        result("rectanglelabels", **BOX, rectanglelabels=["a", "b"]),
        "damaged-labels",
        "['a', 'b']",
    ),
    "no class": (result("rectanglelabels", **BOX), "damaged-labels", "None"),
    "no number": (
        result("rectanglelabels", **{**BOX, "x": None}, rectanglelabels=["a"]),
        "damaged-labels",
        "percent",
    ),
    "far": (
        result("polygonlabels", points=[[1, 1], [9, 9], [1e9, 2]], polygonlabels=["a"]),
        "damaged-labels",
        "percent",
    ),
    "cut brush": (result("brushlabels", rle=BRUSH[:7], brushlabels=["a"]), "bad-rle", "cut off"),
    "giant brush": (result("brushlabels", rle=[255] * 9, brushlabels=["a"]), "bad-rle", "4294967295"),
    "no bytes": (result("brushlabels", rle=[999] * 9, brushlabels=["a"]), "bad-rle", "bytes"),
    "nested": (result("brushlabels", rle=[[1]], brushlabels=["a"]), "bad-rle", "bytes"),
}


@pytest.mark.parametrize("name", STUDIO)
def test_label_studio(folder: Path, name: str) -> None:
    entry, code, what = STUDIO[name]
    task = {"id": 5, "data": {"image": "a.png"}, "annotations": [{"result": [entry]}]}
    write(folder / "export.json", json.dumps([task]))
    with refusal(code, "export.json", "task 5, result 0", what):  # type: ignore[arg-type]
        read_dataset(folder)


def test_sizes_of_label_studio(folder: Path) -> None:
    box = result("rectanglelabels", **BOX, rectanglelabels=["a"])
    for results, code in (
        ([{**box, "original_width": 80}], "size-differs"),
        ([box, {**box, "original_width": 80}], "damaged-labels"),
        ([{**box, "original_width": "x"}], "damaged-labels"),
    ):
        task = {"id": 5, "data": {"image": "a.png"}, "annotations": [{"result": results}]}
        write(folder / "export.json", json.dumps([task]))
        with refusal(code, "export.json", "task 5"):  # type: ignore[arg-type]
            read_dataset(folder)


@pytest.mark.parametrize(
    "task",
    [
        {"data": {"image": "a.png"}},
        {"data": {"image": "a.png"}, "annotations": [{"result": []}, {"result": []}]},
        {"data": {"x": 1}, "annotations": [{"result": []}]},
        {"data": {"x": "a.png", "y": "b.png"}, "annotations": [{"result": []}]},
        {"data": 5, "annotations": []},
        7,
    ],
)
def test_tasks_of_label_studio(folder: Path, task: Any) -> None:
    write(folder / "export.json", json.dumps([task]))
    with refusal("damaged-labels", "export.json", "task 0"):
        read_dataset(folder, kind="label-studio")


def _rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("make", "code", "what"),
    [
        (lambda path: save(path, _rgb()), "unreadable-image", "colours"),
        (lambda path: save(path, mask_of((1, 1, 1, 4, 4))[:10]), "size-differs", "40x10"),
        (lambda path: write(path, b"\x89PNG\r\n\x1a\nxx"), "unreadable-image", "a.png"),
        (lambda path: Image.new("L", (40, 20)).save(path, "JPEG"), "unreadable-image", "PNG"),
    ],
)
def test_masks(tmp_path: Path, make: Callable[[Path], Any], code: Any, what: str) -> None:
    save(tmp_path / "images" / "a.png")
    (tmp_path / "masks").mkdir()
    make(tmp_path / "masks" / "a.png")
    with refusal(code, "masks", what):
        read_dataset(tmp_path)


def test_hidden_files_are_left_out(folder: Path) -> None:
    """macOS writes one beside each file."""
    write(folder / "a.xml", voc(("cat", 0, 1, 1, 4, 4, "")))
    write(folder / "._a.xml", b"\0\5\x16\7")
    write(folder / "._a.png", b"\0\5\x16\7")
    assert len(read_dataset(folder).parts["all"]["annotations"]) == 1


def test_unknown_and_several_formats(folder: Path) -> None:
    with refusal("unknown-format", str(folder), "yolo", "--format"):
        read_dataset(folder)
    with refusal("missing-annotations", "none"):
        read_dataset(folder / "none")
    with refusal("missing-images-folder", "none"):
        read_dataset(folder, folder / "none")
    write(folder / "a.xml", voc(("cat", 0, 1, 1, 4, 4, "")))
    write(folder / "a.txt", LABELS)
    with refusal("unknown-format", "yolo and voc"):
        read_dataset(folder)
    assert len(read_dataset(folder, kind="voc").parts["all"]["annotations"]) == 1
    write(folder / "x.json", json.dumps({"type": "FeatureCollection", "features": []}))
    with refusal("unknown-format", "GeoJSON"):
        read_dataset(folder / "x.json")


def test_a_name_that_two_files_have(tmp_path: Path) -> None:
    for part in ("x", "y"):
        save(tmp_path / part / "a.png")
    write(tmp_path / "labels" / "a.xml", voc())
    with refusal("ambiguous-image", "'a.png'", "x", "y"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in READERS if not kind.startswith("masks")])
@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "<a/>", "5 5 5", "\0\1", '[{"id": 1}]'])
def test_nothing_useful_in_a_file(folder: Path, kind: str, text: str) -> None:
    """Every reader refuses what it was told to read, whatever that is, and never by another exception."""
    ending = {"voc": ".xml", "cvat": ".xml", "yolo": ".yaml"}.get(kind, ".json")
    path = write(folder / f"x{ending}", text)
    with pytest.raises(UserError):
        read_dataset(path, kind=kind)
