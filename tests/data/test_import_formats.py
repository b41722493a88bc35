"""Small files of each format, with numbers that were computed by hand."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from PIL import Image

from gn_detect.data.formats.builder import Imported
from gn_detect.data.formats.importing import read_dataset
from gn_detect.data.formats.label_studio import unpack_runs
from gn_detect.data.formats.shapes import connected_pieces
from tests.data.format_writers import pack_runs

WIDTH, HEIGHT = 40, 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a.png of 40 x 20 pixels."""
    save(tmp_path / "a.png")
    return tmp_path


def save(path: Path, pixels: np.ndarray | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = np.zeros((HEIGHT, WIDTH), dtype=np.uint8) if pixels is None else pixels
    Image.fromarray(shown).save(path, **options)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def objects(data: Imported, part: str = "all") -> list[tuple[str, list[float], Any]]:
    """Return class, bbox and polygons or (H, W) bitmap of each object."""
    content = data.parts[part]
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = []
    for entry in content["annotations"]:
        mask = entry["segmentation"]
        mask = coco_mask.decode(mask) if isinstance(mask, dict) else mask
        found.append((names[entry["category_id"]], entry["bbox"], mask))
    return found


def classes(data: Imported) -> list[str]:
    return [category["name"] for category in next(iter(data.parts.values()))["categories"]]


def noted(data: Imported, word: str) -> bool:
    return any(word in note for note in data.notes)


# YOLO

YAML = "train: images/train\nval: images/val\n"
NAMES = {
    "list": "names: [cat, dog]\n",
    "block": "names:\n  - cat\n  - dog\n",
    "numbered": "names:\n  0: cat\n  1: dog\n",
    "flow": "nc: 2\nnames: {0: cat, 1: dog}\n",
    "quoted": "names: {'0': cat, '1': dog}\nnc: 2\n",
}


def yolo(folder: Path, yaml: str, labels: str | bytes, place: str = "images/train", val: bool = True) -> Path:
    for part in ("train", "val") if val else ("train",):
        save(folder / place.replace("train", part) / "p.png")
        write(folder / place.replace("images", "labels").replace("train", part) / "p.txt", labels)
    return write(folder / "data.yaml", yaml)


@pytest.mark.parametrize("names", NAMES)
def test_yolo(tmp_path: Path, names: str) -> None:
    lines = b"\xef\xbb\xbf0 0.5 0.5 0.25 0.5\r\n1 0.1 0.1 0.4 0.1 0.4 0.5\r\n"
    path = yolo(tmp_path, YAML + NAMES[names], lines)
    for source in (path, tmp_path):
        data = read_dataset(source)
        assert list(data.parts) == ["train", "val"]
        assert classes(data) == ["cat", "dog"]
        box, polygon = objects(data, "val")
        assert box == ("cat", [15, 5, 10, 10], [[15, 5, 25, 5, 25, 15, 15, 15]])
        assert polygon == ("dog", [4, 2, 12, 8], [[4, 2, 16, 2, 16, 10]])
        assert data.folder == tmp_path / "images"
        assert data.parts["train"]["images"][0]["file_name"] == "train/p.png"
        assert noted(data, "boxes become rectangular masks")


@pytest.mark.parametrize(
    ("yaml", "place"),
    [
        ("train: ../images/train\nval: ../images/val\n", "images/train"),  # Roboflow's, one folder too high
        ("path: .\ntrain: images/train\nvalid: images/val\n", "images/train"),
        ("path: /home/me/data\ntrain: train/images\nval: val/images\n", "train/images"),
        ("train: [images/train]\nvalidation: images/val/\n", "images/train"),
        ("train: /nowhere/images/train\nval: /nowhere/images/val\n", "images/train"),
        ("train: train.txt\nval: images/val\n", "images/train"),
        ("train: train\nval: val\n", "train"),
    ],
)
def test_places_of_a_data_yaml(tmp_path: Path, yaml: str, place: str) -> None:
    yolo(tmp_path, yaml + "names: [cat]\n", "0 0.5 0.5 0.25 0.5", place)
    write(tmp_path / "train.txt", "./images/train/p.png\n")
    data = read_dataset(tmp_path)
    assert list(data.parts) == ["train", "val"]
    assert objects(data, "val") == [("cat", [15, 5, 10, 10], [])]


def test_absolute_names_within_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yolo(tmp_path / "in", "train: list.txt\nval: images/val\nnames: [cat]\n", "0 0.5 0.5 0.25 0.5")
    write(tmp_path / "in" / "list.txt", f"{tmp_path / 'in' / 'images' / 'train' / 'p.png'}\n")
    monkeypatch.chdir(tmp_path)
    data = read_dataset(Path("in"))
    assert data.folder == Path("in/images")
    assert data.parts["train"]["images"][0]["file_name"] == "train/p.png"
    monkeypatch.chdir(tmp_path / "in")
    assert read_dataset(Path("data.yaml")).parts == data.parts


def test_a_folder_of_yolo_without_a_yaml(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png")
    save(tmp_path / "x" / "b.png")
    save(tmp_path / "x" / "c.png")
    write(tmp_path / "x" / "a.txt", "1 0.5 0.5 1 1")
    write(tmp_path / "x" / "b.txt", "")
    data = read_dataset(tmp_path)
    assert classes(data) == ["0", "1"]
    assert objects(data) == [("1", [0, 0, 40, 20], [])]
    for word in ("have no names", "are empty", "no label file", "images have no object"):
        assert noted(data, word)
    write(tmp_path / "classes.txt", "cat\ndog\n")
    assert classes(read_dataset(tmp_path)) == ["cat", "dog"]


def test_download_is_not_run(tmp_path: Path) -> None:
    text = YAML + f"names: [cat]\ndownload: |\n  open({str(tmp_path / 'ran')!r}, 'w')\n"
    data = read_dataset(yolo(tmp_path, text, "0 0.5 0.5 0.25 0.5"))
    assert noted(data, "never run")
    assert not (tmp_path / "ran").exists()


def test_a_turned_photo_has_its_upright_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a.jpg", exif=exif)
    write(tmp_path / "a.txt", "0 0.5 0.5 0.5 0.5")
    data = read_dataset(tmp_path)
    assert (data.parts["all"]["images"][0]["width"], data.parts["all"]["images"][0]["height"]) == (20, 40)
    assert objects(data)[0][1] == [5, 10, 10, 20]


@pytest.mark.parametrize(
    ("label", "image"), [("{}/a{}.xml", "{}/a{}.png"), ("labels/{}/a{}.xml", "images/{}/a{}.png")]
)
def test_folders_of_parts(tmp_path: Path, label: str, image: str) -> None:
    """Roboflow's folders, and others where each image is in the folder of a part."""
    for number, part in enumerate(("train", "valid", "test")):
        save(tmp_path / image.format(part, number))
        write(tmp_path / label.format(part, number), voc(("x", 0, 1, 1, 4, 4, ""), name=f"a{number}.png"))
    data = read_dataset(tmp_path)
    assert {part: len(content["annotations"]) for part, content in data.parts.items()} == {
        "train": 1,
        "val": 1,
        "test": 1,
    }
    save(tmp_path / "b.png")
    write(tmp_path / "b.xml", voc(name="b.png"))
    assert list(read_dataset(tmp_path).parts) == ["all"]


# Pascal VOC

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox>{}</object>"
)
SIZE = "<size><width>40</width><height>20</height><depth>3</depth></size>"


def voc(*given: tuple, name: str = "a.png", size: str = SIZE) -> str:
    inner = "".join(OBJECT.format(*entry) for entry in given)
    return f"<annotation><filename>{name}</filename>{size}{inner}</annotation>"


def test_voc_counts_from_one(folder: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    text = voc(("dog", 0, 1, 1, 40, 20, ""), ("cat", 1, 11, 6, 20, 15, part), ("cat", 0, 0, 3, 4, 5, ""))
    write(folder / "a.xml", b"\xef\xbb\xbf" + text.encode())
    data = read_dataset(folder)
    assert classes(data) == ["cat", "dog"]
    assert [entry[:2] for entry in objects(data)] == [
        ("dog", [0, 0, 40, 20]),
        ("cat", [10, 5, 10, 10]),
        ("cat", [0, 2, 4, 3]),
    ]
    for word in ("difficult", "parts of objects", "counts from 1"):
        assert noted(data, word)


def test_voc_has_parts_in_its_lists(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "JPEGImages" / f"{name}.png")
        text = voc(("dog", 0, 1, 1, 4, 4, ""), name=f"{name}.png", size="")
        write(tmp_path / "Annotations" / f"{name}.xml", text)
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "a\n")
    write(tmp_path / "ImageSets" / "Main" / "val.txt", "b\n")
    data = read_dataset(tmp_path)
    assert {part: content["images"][0]["file_name"] for part, content in data.parts.items()} == {
        "train": "a.png",
        "val": "b.png",
    }
    assert noted(data, "no list of ImageSets/Main")


@pytest.mark.parametrize(
    "head", ['<?xml version="1.0" encoding="windows-1252"?>', "", "<?xml version='1.0'?>\n"]
)
def test_names_that_are_not_ascii(folder: Path, head: str) -> None:
    """cp1252 is taken where the file says so, or where all that is not ASCII would be letters."""
    write(folder / "a.xml", (head + voc(("bébé", 0, 1, 1, 4, 4, ""))).encode("cp1252"))
    assert classes(read_dataset(folder)) == ["bébé"]


# labelme


def labelme(folder: Path, *shapes: dict, **other: Any) -> Imported:
    content = {"shapes": shapes, "imagePath": "a.png", "imageWidth": WIDTH, "imageHeight": HEIGHT} | other
    write(folder / "a.json", json.dumps(content))
    return read_dataset(folder)


def test_labelme(folder: Path) -> None:
    mask = io.BytesIO()
    Image.fromarray(np.array([[True, False], [True, True], [True, False]])).save(mask, "PNG")
    left, right = [[1, 1], [5, 1], [5, 5]], [[11, 1], [15, 1], [15, 5]]
    data = labelme(
        folder,
        {"label": "cell", "points": left, "shape_type": "polygon", "group_id": 7},
        {"label": "cell", "points": [[30, 2], [20, 12]], "shape_type": "rectangle"},
        {"label": "cell", "points": right, "shape_type": "polygon", "group_id": 7},
        {"label": "blob", "points": [[20, 10], [24, 13]], "shape_type": "circle", "group_id": None},
        {
            "label": "blob",
            "points": [[3, 4], [4, 6]],
            "shape_type": "mask",
            "mask": base64.b64encode(mask.getvalue()).decode(),
        },
        {"label": "cell", "points": [[3, 4]], "shape_type": "point"},
        {"label": "cell", "points": [[3, 4], [5, 6]], "shape_type": "line"},
    )
    assert classes(data) == ["blob", "cell"]
    joined, box, circle, bitmap = objects(data)
    assert joined == ("cell", [1, 1, 14, 4], [[1, 1, 5, 1, 5, 5], [11, 1, 15, 1, 15, 5]])
    assert box == ("cell", [20, 2, 10, 10], [[20, 2, 30, 2, 30, 12, 20, 12]])
    assert circle[1] == pytest.approx([15, 5, 10, 10])
    assert data.parts["all"]["annotations"][2]["area"] == pytest.approx(np.pi * 25, rel=0.05)
    assert (bitmap[0], bitmap[1], bitmap[2].sum()) == ("blob", [3, 4, 2, 3], 4)
    assert bitmap[2][4:7, 3:5].tolist() == [[1, 0], [1, 1], [1, 0]]
    assert any("points and lines are left out" in note and "and 1 more" in note for note in data.notes)


def test_a_group_of_a_mask_and_a_polygon_is_one_mask(folder: Path) -> None:
    mask = io.BytesIO()
    Image.fromarray(np.ones((2, 2), dtype=bool)).save(mask, "PNG")
    coded = base64.b64encode(mask.getvalue()).decode()
    polygon = [[10, 10], [14, 10], [14, 14], [10, 14]]
    data = labelme(
        folder,
        {"label": "x", "points": [[0, 0], [1, 1]], "shape_type": "mask", "mask": coded, "group_id": 1},
        {"label": "x", "points": polygon, "shape_type": "polygon", "group_id": 1},
    )
    ((_, box, bitmap),) = objects(data)
    assert (box, bitmap.sum()) == ([0, 0, 14, 14], 4 + 16)


def test_labelme_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """The path of another computer, and one that climbs within the folder."""
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "images" / "b.png")
    shape = {"label": "x", "points": [[1, 1], [5, 1], [5, 5]], "shape_type": "polygon"}
    for name, path in (("a", "..\\images\\a.png"), ("b", "C:\\Users\\me\\images\\b.png")):
        write(tmp_path / "labels" / f"{name}.json", json.dumps({"shapes": [shape], "imagePath": path}))
    data = read_dataset(tmp_path)
    assert [image["file_name"] for image in data.parts["all"]["images"]] == ["a.png", "b.png"]
    assert noted(data, "taken by their name")
    assert read_dataset(tmp_path / "labels", tmp_path / "images").parts == data.parts


# CVAT


def cvat(inner: str, labels: tuple[str, ...] = ("dog", "cat"), image: str = "") -> str:
    known = "".join(f"<label><name>{label}</name></label>" for label in labels)
    head = f"<meta><task><labels>{known}</labels></task></meta>"
    image = image or '<image id="0" name="a.png" width="40" height="20">'
    return f"<annotations><version>1.1</version>{head}{image}{inner}</image></annotations>"


def test_cvat(folder: Path) -> None:
    inner = """
    <box label="cat" xtl="1.5" ytl="2" xbr="11.5" ybr="12" rotation="0.0" z_order="3"/>
    <polygon label="dog" points="1,1;9,1;9,9"/>
    <mask label="dog" rle="1, 2, 2, 1" left="3" top="4" width="3" height="2"/>
    <ellipse label="dog" cx="20" cy="10" rx="6" ry="3" rotation="90"/>
    <points label="dog" points="1,1"/><polyline label="dog" points="1,1;2,2"/>
    """
    write(folder / "annotations.xml", cvat(inner))
    data = read_dataset(folder)
    assert classes(data) == ["dog", "cat"]
    box, polygon, mask, ellipse = objects(data)
    assert box[:2] == ("cat", [1.5, 2, 10, 10])
    assert polygon == ("dog", [1, 1, 8, 8], [[1, 1, 9, 1, 9, 9]])
    assert mask[1] == [4, 4, 2, 2]
    assert mask[2][4:6, 3:6].tolist() == [[0, 1, 1], [0, 0, 1]]
    assert ellipse[1] == pytest.approx([17, 4, 6, 12])
    assert noted(data, "points, lines, cuboids")


def test_parts_of_a_cvat_project(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    box = '<box label="dog" xtl="1" ytl="1" xbr="9" ybr="9"/>'
    image = '<image name="{}.png" subset="{}" width="40" height="20">' + box
    text = cvat("", image=image.format("a", "Train") + "</image>" + image.format("b", "Validation"))
    write(tmp_path / "annotations.xml", text)
    assert list(read_dataset(tmp_path / "annotations.xml").parts) == ["train", "val"]


# VIA


def via(folder: Path, *regions: tuple[dict, dict], as_dict: bool = False) -> Imported:
    found = [{"shape_attributes": shape, "region_attributes": other} for shape, other in regions]
    given: Any = {str(n): region for n, region in enumerate(found)} if as_dict else found
    entry = {"filename": "a.png", "size": 1, "regions": given, "file_attributes": {}}
    write(folder / "via.json", json.dumps({"a.png1": entry}))
    return read_dataset(folder)


RECT = {"name": "rect", "x": 2, "y": 3, "width": 10, "height": 5}


@pytest.mark.parametrize("as_dict", [False, True])
def test_via(folder: Path, as_dict: bool) -> None:
    data = via(
        folder,
        (RECT, {"kind": "cell"}),
        ({"name": "circle", "cx": 20, "cy": 10, "r": 4}, {"kind": {"blob": True, "cell": False}}),
        ({"name": "ellipse", "cx": 20, "cy": 10, "rx": 6, "ry": 3, "theta": np.pi / 2}, {"kind": "cell"}),
        ({"name": "polygon", "all_points_x": [1, 9, 9], "all_points_y": [1, 1, 9]}, {"kind": "cell"}),
        ({"name": "point", "cx": 1, "cy": 1}, {}),
        as_dict=as_dict,
    )
    rect, circle, ellipse, polygon = objects(data)
    assert rect == ("cell", [2, 3, 10, 5], [[2, 3, 12, 3, 12, 8, 2, 8]])
    assert circle[:2] == ("blob", pytest.approx([16, 6, 8, 8]))
    assert ellipse[1] == pytest.approx([17, 4, 6, 12])
    assert polygon == ("cell", [1, 1, 8, 8], [[1, 1, 9, 1, 9, 9]])
    assert noted(data, "points and lines")


def test_the_class_of_via(folder: Path) -> None:
    assert classes(via(folder, (RECT, {"age": "3", "Label": "cat"}))) == ["cat"]
    data = via(folder, (RECT, {}))
    assert classes(data) == ["object"]
    assert noted(data, "no attribute")


# Label Studio


def result(kind: str, **value: Any) -> dict[str, Any]:
    return {"type": kind, "original_width": WIDTH, "original_height": HEIGHT, "value": value}


def studio(folder: Path, *results: dict, **other: Any) -> Imported:
    task = {"id": 5, "data": {"image": "/data/upload/1/0a1b2c3d-a.png"}, "annotations": [{"result": results}]}
    write(folder / "export.json", json.dumps([task | other]))
    return read_dataset(folder)


def test_label_studio(folder: Path) -> None:
    alpha = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
    alpha[4:6, 3:9, 3] = 255
    data = studio(
        folder,
        result("rectanglelabels", x=25, y=50, width=50, height=25, rotation=0, rectanglelabels=["cat"]),
        result("polygonlabels", points=[[10, 10], [50, 10], [50, 60]], polygonlabels=["dog"]),
        result("brushlabels", format="rle", rle=pack_runs(alpha.ravel()), brushlabels=["dog"]),
        result("ellipselabels", x=50, y=50, radiusX=10, radiusY=10, rotation=0, ellipselabels=["dog"]),
        result("keypointlabels", x=1, y=1, keypointlabels=["dog"]),
        predictions=[{"result": []}],
    )
    box, polygon, brush, ellipse = objects(data)
    assert box[:2] == ("cat", [10, 10, 20, 5])
    assert polygon == ("dog", [4, 2, 16, 10], [[4, 2, 20, 2, 20, 12]])
    assert (brush[1], brush[2].sum()) == ([3, 4, 6, 2], 12)
    assert ellipse[1] == pytest.approx([16, 8, 8, 4])
    assert noted(data, "predictions are left out")
    assert noted(data, "no rectangle")


def test_tasks_and_annotations_of_label_studio(folder: Path) -> None:
    box = result("rectangle", x=25, y=50, width=50, height=25) | {"id": "q"}
    labels = {"id": "q", "type": "labels", "value": {"labels": ["cat"]}}
    done = {"result": [box, labels], "ground_truth": True}
    other = {"result": [], "was_cancelled": False}
    assert objects(studio(folder, annotations=[other, done])) == [("cat", [10, 10, 20, 5], [])]
    tasks = [
        {"id": 1, "data": {"picture": "s3://bucket/x/a.png?key=1"}, "completions": [{"result": []}]},
        {"id": 2, "data": {"image": "b.png"}, "annotations": [{"result": [], "was_cancelled": True}]},
    ]
    write(folder / "export.json", json.dumps(tasks))
    data = read_dataset(folder / "export.json", kind="label-studio")
    assert len(data.parts["all"]["images"]) == 1
    assert noted(data, "without an annotation")


def test_runs_of_a_brush_by_hand() -> None:
    """Two blocks: 3 times the word 5, then the words 1, 2. Sizes of counts are 3, 4, 8 and 16 bits."""
    bits = f"{5:032b}" + "00111" + "0010" + "0011" + "0111" + "1111"
    bits += "1" + "00" + "010" + f"{5:08b}" + "0" + "01" + "0001" + f"{1:08b}{2:08b}"
    bits += "0" * (-len(bits) % 8)
    codes = np.array([int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)], dtype=np.uint8)
    assert unpack_runs(codes, 5).tolist() == [5, 5, 5, 1, 2]


# Masks


def mask_of(*boxes: tuple[int, int, int, int, int]) -> np.ndarray:
    """Return zeros with a value in each box ``value, x0, y0, x1, y1``."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for value, x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = value
    return mask


ONE, TWO = (1, 1, 1, 6, 5), (2, 10, 3, 15, 9)
MASKS: dict[str, tuple[list[np.ndarray], str, list[tuple[str, list[float]]]]] = {
    "binary": (
        [mask_of((255, 1, 1, 6, 5), (255, 10, 3, 15, 9), (255, 15, 9, 17, 12))],
        "binary",
        [("object", [1, 1, 5, 4]), ("object", [10, 3, 7, 9])],  # two touch at a corner
    ),
    "instances": (
        [mask_of(ONE, TWO), mask_of(ONE)],
        "instances",
        [("object", [1, 1, 5, 4]), ("object", [10, 3, 5, 6]), ("object", [1, 1, 5, 4])],
    ),
    "classes": (
        [mask_of(ONE, (3, 10, 3, 15, 9)), mask_of(TWO, (2, 20, 3, 25, 9))],
        "classes",
        [("1", [1, 1, 5, 4]), ("3", [10, 3, 5, 6]), ("2", [10, 3, 5, 6]), ("2", [20, 3, 5, 6])],
    ),
    "classes with a border": (
        [mask_of(ONE, (255, 6, 1, 7, 5), (3, 10, 3, 15, 9))],
        "classes",
        [("1", [1, 1, 5, 4]), ("3", [10, 3, 5, 6])],
    ),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("place", ["masks/{}.png", "masks/{}_mask.png", "images/{}_mask.png"])
def test_the_content_of_masks_decides(tmp_path: Path, name: str, place: str) -> None:
    masks, reading, expected = MASKS[name]
    for number, mask in enumerate(masks):
        save(tmp_path / "images" / f"{number}.jpg")
        save(tmp_path / place.format(number), mask)
    data = read_dataset(tmp_path)
    assert data.notes[0].startswith(f"the masks are read as {reading}:")
    assert [entry[:2] for entry in objects(data)] == expected


def test_a_named_reading_wins(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / "images" / f"{number}.png")
        save(tmp_path / "masks" / f"{number}.png", mask_of(ONE, TWO))
    assert {len(objects(read_dataset(tmp_path, kind=f"masks-{k}"))) for k in ("instances", "classes")} == {4}
    assert classes(read_dataset(tmp_path, kind="masks-classes")) == ["1", "2"]
    assert classes(read_dataset(tmp_path, kind="masks-instances")) == ["object"]


def test_a_mask_of_a_turned_photo(tmp_path: Path) -> None:
    """The mask has the size of the picture as it is stored, or upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "images" / "a.jpg", exif=exif)
    for mask, size in ((mask_of(ONE), (40, 20)), (mask_of(ONE).T.copy(), (20, 40))):
        save(tmp_path / "masks" / "a.png", mask)
        (image,) = read_dataset(tmp_path).parts["all"]["images"]
        assert (image["width"], image["height"]) == size


def test_a_mask_for_each_object(tmp_path: Path) -> None:
    save(tmp_path / "q1" / "images" / "q1.png")
    save(tmp_path / "q1" / "masks" / "0.png", mask_of((255, 1, 1, 6, 5), (255, 10, 3, 15, 9)))
    save(tmp_path / "q1" / "masks" / "1.png", mask_of((255, 20, 3, 25, 9)))
    data = read_dataset(tmp_path)
    assert [box for _, box, _ in objects(data)] == [[1, 1, 14, 8], [20, 3, 5, 6]]


def test_pieces_of_random_bitmaps() -> None:
    """Against a flood fill with SciPy's eight neighbours."""
    label = pytest.importorskip("scipy.ndimage").label
    for seed in range(20):
        bitmap = np.random.default_rng(seed).random((13, 17)) < 0.4
        numbers, count = label(bitmap, np.ones((3, 3)))
        whole = np.zeros(bitmap.shape, dtype=int)
        pieces = connected_pieces(bitmap)
        assert len(pieces) == count
        for number, (_, left, top, piece) in enumerate(pieces, 1):
            whole[top : top + piece.shape[0], left : left + piece.shape[1]] += number * piece
        assert len(set(zip(whole.ravel().tolist(), numbers.ravel().tolist(), strict=True))) == count + 1


# COCO in folders


@pytest.mark.parametrize("layout", ["roboflow", "coco"])
def test_a_folder_of_coco(tmp_path: Path, small_coco: dict, layout: str) -> None:
    places = {
        "roboflow": ("train/_annotations.coco.json", "valid/_annotations.coco.json", "{}/{}"),
        "coco": (
            "annotations/instances_train2017.json",
            "annotations/instances_val2017.json",
            "images/{}/{}",
        ),
    }[layout]
    for part, file in zip(("train", "valid"), places, strict=False):
        content = json.loads(json.dumps(small_coco))
        for image in content["images"]:
            image["file_name"] = f"{part}{image['file_name']}"
            pixels = np.zeros((image["height"], image["width"]), dtype=np.uint8)
            save(tmp_path / places[2].format(part, image["file_name"]), pixels)
        write(tmp_path / file, json.dumps(content))
    data = read_dataset(tmp_path)
    assert list(data.parts) == ["train", "val"]
    assert data.parts["val"]["annotations"] == small_coco["annotations"]
    assert (data.folder / data.parts["val"]["images"][0]["file_name"]).is_file()
