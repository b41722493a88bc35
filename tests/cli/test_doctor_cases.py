"""Files of real tools through ``doctor`` and ``doctor --fix``: what is said, and what the copy holds."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from gn_detect.cli import main
from gn_detect.data import CocoDataset, DatasetSource
from gn_detect.evaluation import evaluate_results
from tests.refusal import refusal

Spoil = Callable[[dict[str, Any]], Any]


class Folder:
    """A case's files, copied; ``said`` is what the last command printed."""

    def __init__(self, case: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = folder / "case", capsys
        shutil.copytree(case, self.root)
        self.json, self.images, self.fixed = (
            self.root / "train.json",
            self.root / "images",
            folder / "fixed.json",
        )
        self.said = ""

    def edit(self, change: Spoil) -> None:
        """Change the annotation file."""
        content = json.loads(self.json.read_text(encoding="utf-8-sig"))
        change(content)
        self.json.write_text(json.dumps(content))

    def doctor(self, *words: object) -> int:
        """Run the doctor."""
        given = ["doctor", self.json, "--images", self.images, *words]
        status = main(list(map(str, given)))
        out, err = self.capsys.readouterr()
        self.said = out + err
        return status

    def fix(self, *words: object) -> dict[str, Any]:
        """The content of the repaired copy, which has no fault and is read by training and evaluation."""
        assert self.doctor("--fix", self.fixed, *words) == 0, self.said
        printed = self.said
        self.json.write_bytes(self.fixed.read_bytes())
        assert self.doctor() == 0
        assert "0 errors, 0 warnings" in self.said and "--fix OUT.json" not in self.said, self.said
        self.said = printed
        CocoDataset(DatasetSource("case", self.json, self.images), masks=None, evaluation=True).check_files()
        evaluate_results(self.json, [], "bbox")
        return json.loads(self.json.read_text())


@pytest.fixture
def opened(shared_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Folder]:
    return lambda name: Folder(shared_dir / "cases" / name, tmp_path, capsys)


def areas(content: dict[str, Any]) -> list[float]:
    return [entry["area"] for entry in content["annotations"]]


SAID = {
    "boxes_only": "none of 8 annotations has a mask",
    "boxes_only_normalised": "8 of 8 boxes are fractions",
    "category_name_number": "category names that are numbers",
    "image_size_float": "integers that are written as 1.0",
    "json_bom": "byte order mark",
    "labelstudio_urlencoded": "4 x images whose file is there under a nearly equal name",
    "no_iscrowd_no_area": "a missing 'area'",
    "via_flat_polygon": "a flat list",
    "via_string_image_id": "numbers that are text",
}


@pytest.mark.parametrize("name", SAID)
def test_each_case_is_said_and_repaired_without_a_loss(opened: Callable[[str], Folder], name: str) -> None:
    case = opened(name)
    assert case.doctor() == 0
    assert SAID[name] in case.said
    errors = {"boxes_only_normalised": "1 error", "labelstudio_urlencoded": "4 errors"}
    assert f"\n{errors.get(name, '0 errors')}, 0 warnings" in case.said
    assert "  thing        8        8 " in case.said or name == "category_name_number"
    assert "objects in an image: min 2, median 2, max 2" in case.said
    content = case.fix()
    assert areas(content) == [480, 750] * 4
    assert "0 removed of" in case.said
    assert content["annotations"][0]["bbox"] == [8, 10, 24, 20]


def test_boxes_alone_stay_boxes_alone(opened: Callable[[str], Folder]) -> None:
    """Also with empty polygons, without the field, and as keypoints; one mask among them is another thing."""
    case = opened("boxes_only")
    before = case.json.read_bytes()
    for change in (
        {"segmentation": [[]]},
        {"segmentation": None},
        {"keypoints": [9, 9, 2], "num_keypoints": 1},
    ):
        case.json.write_bytes(before)
        case.edit(lambda content, change=change: [entry.update(change) for entry in content["annotations"]])
        assert case.doctor("--strict") == 0
        assert "[boxes-alone]" in case.said
        assert len(case.fix()["annotations"]) == 8
    case.json.write_bytes(before)
    case.fixed.unlink()
    mask = [[8, 10, 32, 10, 32, 30, 8, 30]]
    case.edit(lambda content: content["annotations"][0].update(segmentation=mask))
    assert case.doctor("--strict", "--fix", case.fixed) == 2
    assert not case.fixed.exists()
    assert "7 x objects without a segmentation" in case.said
    assert "removes 7" in case.said
    assert "would remove 7 of 8 annotations (id 2, 3, 4, 5, 6, 7, 8)" in case.said
    assert case.doctor("--no-masks", "--strict", "--fix", case.fixed) == 0
    assert len(json.loads(case.fixed.read_text())["annotations"]) == 8


def test_crowds_that_are_objects(opened: Callable[[str], Folder]) -> None:
    case = opened("cvat_brush_half_crowd")
    assert case.doctor("--strict") == 1
    assert "4 of 8 objects are crowds ('iscrowd' 1) and left out of training; 4 of the 4" in case.said
    assert "--fix OUT.json --no-crowds does that" in case.said
    assert "CVAT's brush" in case.said
    content = case.fix("--no-crowds")
    assert areas(content) == [480, 750] * 4
    assert not any(entry["iscrowd"] for entry in content["annotations"])


def rename(make: Callable[[str], str]) -> Spoil:
    return lambda content: [image.update(file_name=make(image["file_name"])) for image in content["images"]]


@pytest.mark.parametrize(
    "make",
    [
        lambda name: f"images\\{name}",
        lambda name: f"C:\\Users\\me\\images\\{name}",
        lambda name: f"/home/other/images/{name}",
        lambda name: f"/data/local-files/?d=images/{name}",
        lambda name: f"http://localhost:8080/data/upload/1/{name}?token=1",
        lambda name: name.upper(),
        lambda name: name.replace(".png", ".PNG"),
        lambda name: f"images/{name}" if "1" in name else name,
    ],
    ids=["backslash", "drive", "foreign", "query", "url", "case", "extension", "mixed"],
)
def test_names_from_elsewhere_are_found_again(opened: Callable[[str], Folder], make: Callable) -> None:
    case = opened("image_size_float")
    case.edit(rename(make))
    assert case.doctor("--strict") == 1
    assert "[misnamed-image]" in case.said
    assert "but im1.png" in case.said
    assert [image["file_name"] for image in case.fix()["images"]] == [f"im{i}.png" for i in range(1, 5)]


def test_absolute_names_of_this_machine_become_relative(opened: Callable[[str], Folder]) -> None:
    case = opened("category_name_number")
    case.edit(rename(lambda name: str(case.images.absolute() / name)))
    assert case.doctor("--strict") == 1
    assert "4 x images whose file is there under" in case.said
    with refusal("image-outside", "im1.png", "gn-detect doctor --fix"):
        CocoDataset(DatasetSource("case", case.json, case.images))
    assert case.doctor("--strict", "--allow-outside") == 0
    assert [image["file_name"] for image in case.fix()["images"]] == [f"im{i}.png" for i in range(1, 5)]


def test_names_in_another_unicode_form(opened: Callable[[str], Folder]) -> None:
    case = opened("labelstudio_urlencoded")
    names = [unicodedata.normalize("NFC", f"Capture décran {i}.png") for i in range(1, 5)]
    case.edit(rename(lambda name: unicodedata.normalize("NFD", unquote(name))))
    assert case.doctor("--strict") == 1
    assert "[misnamed-image]" in case.said
    assert [image["file_name"] for image in case.fix()["images"]] == names


def test_an_image_that_is_gone_is_not_guessed(opened: Callable[[str], Folder]) -> None:
    """One of four is gone, and its two objects: nothing is written without being asked."""
    case = opened("labelstudio_urlencoded")
    (case.images / "Capture décran 4.png").unlink()
    assert case.doctor("--fix", case.fixed) == 2
    assert not case.fixed.exists()
    assert "3 x images whose file is there" in case.said
    assert "1 x images whose file is missing" in case.said
    assert "2 of 8 annotations (id 7, 8)" in case.said
    assert "1 of 4 images (id 4)" in case.said
    assert len(case.fix("--drop")["images"]) == 3
    assert "2 removed" not in case.said
    assert "3 removed" in case.said


def fractions(content: dict[str, Any]) -> None:
    for entry in content["annotations"]:
        entry["bbox"] = [n / size for n, size in zip(entry["bbox"], [96, 64] * 2, strict=True)]
        polygon = entry["segmentation"][0]
        entry["segmentation"] = [[n / (64 if i % 2 else 96) for i, n in enumerate(polygon)]]
        entry["area"] /= 96 * 64


@pytest.mark.parametrize("some", [False, True], ids=["all", "text"])
def test_polygons_that_are_fractions_too(opened: Callable[[str], Folder], some: bool) -> None:
    case = opened("category_name_number")
    case.edit(fractions)
    if some:
        case.edit(lambda c: [a.update(bbox=[str(n) for n in a["bbox"]]) for a in c["annotations"]])
    content = case.fix()
    assert areas(content) == [480, 750] * 4
    assert content["annotations"][0]["segmentation"] == [[8, 10, 32, 10, 32, 30, 8, 30]]


def test_fractions_of_0_and_1_cover_the_image(opened: Callable[[str], Folder]) -> None:
    """In a file without a box in pixels; elsewhere nobody knows."""
    case = opened("category_name_number")
    whole = {"bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]}

    def cover(content: dict[str, Any]) -> None:
        fractions(content)
        content["annotations"][0].update(whole)

    case.edit(cover)
    before = case.json.read_bytes()
    first = case.fix()["annotations"][0]
    assert first["bbox"] == [0, 0, 96, 64]
    assert first["area"] == 96 * 64
    assert first["segmentation"] == [[0, 0, 96, 0, 96, 64, 0, 64]]
    case.json.write_bytes(before)
    pixels = {"bbox": [50, 21, 30, 25], "segmentation": [[50, 21, 80, 21, 80, 46, 50, 46]]}
    case.edit(lambda content: content["annotations"][1].update(pixels))
    first = case.fix()["annotations"][0]
    assert first["bbox"] == [0, 0, 1, 1]
    assert first["segmentation"] == whole["segmentation"]


def test_good_and_bad_entries_together(opened: Callable[[str], Folder]) -> None:
    """Each in its own form; the one that is lost is named by its id."""
    case = opened("via_string_image_id")

    def mix(content: dict[str, Any]) -> None:
        first = content["annotations"]
        first[0] |= {"id": "1", "area": "480", "iscrowd": False, "bbox": ["8", 10.0, "24", 20]}
        first[1].pop("bbox")
        first[2]["segmentation"] = [[[11, 12], [35, 12], [35, 32], [11, 32]]]
        content["images"][1] |= {"width": "96", "file_name": "x\\im2.png"}
        extra = [
            {**first[3], "id": 100 + i, "bbox": [0, 0, 4 + i, 4], "area": 4 * (4 + i)} for i in range(12)
        ]
        for entry in extra:
            w = entry["bbox"][2]
            entry["segmentation"] = [[0, 0, w, 0, w, 4, 0, 4]]
        first += extra
        first.append({**first[4], "id": 77, "image_id": 99})

    case.edit(mix)
    content = case.fix()
    assert areas(content)[:8] == [480, 750] * 4
    assert len(content["annotations"]) == 20
    assert "annotation removed: annotation 77" in case.said
    assert "1 removed of" in case.said


def test_names_are_shown_as_text(opened: Callable[[str], Folder]) -> None:
    case = opened("boxes_only")
    case.edit(lambda content: content["categories"][0].update(name="a\x1b[31m\nb"))
    assert case.doctor() == 0
    assert "\x1b" not in case.said
    assert "a\\x1b[31m\\nb" in case.said


def test_many_classes_are_cut(opened: Callable[[str], Folder], tmp_path: Path) -> None:
    case = opened("boxes_only")
    case.edit(lambda c: c["categories"].extend({"id": i, "name": f"c{i}"} for i in range(2, 40)))
    assert case.doctor("--report", tmp_path / "report.json") == 0
    assert "  and 19 more        0" in case.said
    part = json.loads((tmp_path / "report.json").read_text())["parts"][0]
    assert len(part["classes"]) == 39
    assert part["objects_per_image"] == {"min": 2, "median": 2.0, "max": 2}
    row = {"id": 1, "name": "thing", "objects": 8, "small": 8, "medium": 0, "large": 0, "median_side": 24.6}
    assert part["classes"][0] == row
