"""``gn-detect doctor`` as a user types it."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from gn_detect.cli import main
from gn_detect.data.coco import rules as coco_rules
from gn_detect.data.doctor import repair as doctor_repair
from tests.cli.conftest import Case

Refused = Callable[..., str]


def doctor(case: Case, *arguments: object) -> int:
    given = [case.train, "--images", case.train.parent / "images", *arguments]
    return main(["doctor", *map(str, given)])


def spoil(content: dict) -> None:
    content["annotations"][0]["bbox"] = [500, 500, 10, 10]
    content["annotations"][1]["id"] = 1


def test_a_good_dataset(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    val = (case.val, "--images", case.val.parent / "images")
    assert doctor(case, *val, "--strict") == 0
    out, err = capsys.readouterr()
    assert out.endswith("0 errors, 0 warnings, 0 notes\n")
    assert err == ""


def test_strict_tells_by_the_exit_status(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case.edit(spoil)
    assert doctor(case) == 0
    assert doctor(case, "--strict") == 1
    out = capsys.readouterr().out
    assert "1 x boxes outside the image [box-outside]\n      001.png: annotation 1 of image 1 has its" in out
    assert "2 errors, 0 warnings, 0 notes; --fix OUT.json repairs 2 in a copy" in out


def test_a_repaired_copy_trains_and_the_input_stays(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.edit(spoil)
    before, fixed = case.train.read_bytes(), case.train.with_name("fixed.json")
    assert doctor(case, "--fix", fixed) == 0
    out = capsys.readouterr().out
    assert f"wrote {fixed}: 2 repaired, 0 removed of" in out
    assert "annotation 1 (counted from 0): new id 9" in out
    assert case.train.read_bytes() == before
    case.train.write_bytes(fixed.read_bytes())
    assert doctor(case, "--strict") == 0
    keys = ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "[]"]
    assert main(["train", "--config-file", str(case.config), *keys]) == 0


def test_shared_pictures_leave_the_first_part(case: Case, tmp_path: Path) -> None:
    images = case.train.parent / "images"
    (case.val.parent / "images" / "001.png").write_bytes((images / "003.png").read_bytes())
    val = (case.val, "--images", case.val.parent / "images")
    fixed = tmp_path / "fixed.json"
    assert doctor(case, *val, "--fix", fixed) == 2
    assert not fixed.exists()
    assert doctor(case, *val, "--strict", "--fix", fixed, "--drop") == 1
    content = json.loads(fixed.read_text())
    assert [image["id"] for image in content["images"]] == [1, 2, 4]
    assert {a["image_id"] for a in content["annotations"]} == {1, 2, 4}


def test_report_and_picture(case: Case, tmp_path: Path) -> None:
    case.edit(spoil)
    assert doctor(case, "--report", tmp_path / "new" / "report.json") == 0
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert set(report["summary"]) == {"box-outside", "duplicate-annotation-id"}
    with Image.open(tmp_path / "new" / "report.png") as picture:
        assert picture.size[0] > 1000
        assert picture.getcolors(1 << 20) is not None


def test_a_dataset_without_any_object_is_drawn_too(case: Case, tmp_path: Path) -> None:
    case.edit(lambda content: content["annotations"].clear())
    assert doctor(case, "--report", tmp_path / "report.json", "--no-images") == 0
    assert (tmp_path / "report.png").is_file()


def test_many_removals_are_listed_in_a_file(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    def repeat(content: dict) -> None:
        content["annotations"] *= 5

    case.edit(repeat)
    fixed = case.train.with_name("fixed.json")
    before = set(fixed.parent.iterdir())
    assert doctor(case, "--fix", fixed) == 2
    assert set(fixed.parent.iterdir()) == before
    out, err = capsys.readouterr()
    assert "and 12 more: --report FILE has the ids" in out
    assert "--fix OUT.json removes 32 in a copy" in out
    assert "\n--fix removes 32:\n" in out
    assert "--fix would remove 32 of 40 annotations (id 8 counted from 0, 9 counted" in err
    assert "--drop" in err
    assert doctor(case, "--fix", fixed, "--drop") == 0
    out = capsys.readouterr().out
    assert len(json.loads(fixed.read_text())["annotations"]) == 8
    assert "0 repaired, 32 removed of" in out
    assert len(case.train.with_name("fixed_removals.txt").read_text().splitlines()) == 32
    assert "and 12 more: see" in out


def test_a_few_objects_may_go_without_being_asked(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """5%; one more, and nothing is written."""

    def spread(bad: int) -> None:
        content = json.loads(case.train.read_text())
        first = content["annotations"][0]
        content["annotations"] = [
            {
                **first,
                "category_id": content["categories"][0]["id"],
                "id": i,
                "bbox": [0, 0, i, 9],
                "area": 9 * i,
                "segmentation": [[0, 0, i, 0, i, 9, 0, 9]],
            }
            for i in range(1, 51)
        ]
        for entry in content["annotations"][:bad]:
            entry["category_id"] = 99
        case.train.write_text(json.dumps(content))

    fixed = case.train.with_name("fixed.json")
    spread(3)
    assert doctor(case, "--fix", fixed) == 2
    assert not fixed.exists()
    assert "remove 3 of 50 annotations (id 1, 2, 3) of" in capsys.readouterr().err
    spread(2)
    assert doctor(case, "--fix", fixed) == 0
    assert len(json.loads(fixed.read_text())["annotations"]) == 48


def test_nothing_is_emptied(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = case.train.with_name("fixed.json")
    case.edit(lambda content: [entry.update(category_id=99) for entry in content["annotations"]])
    assert doctor(case, "--fix", fixed, "--drop") == 2
    assert not fixed.exists()
    assert "--fix would leave none of the 8 annotations" in capsys.readouterr().err


def test_categories_without_an_object_go_where_there_are_too_many(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the doctor's error says; where all of them have objects, nothing is written."""
    for module in (coco_rules, doctor_repair):
        monkeypatch.setattr(module, "MOST_CATEGORIES", 20)
    fixed = case.train.with_name("fixed.json")

    def many(content: dict) -> None:
        content["categories"] += [{"id": i, "name": f"class {i}"} for i in range(100, 130)]

    case.edit(many)
    assert doctor(case, "--fix", fixed) == 0
    assert "categories, more than the 20" in capsys.readouterr().out
    assert len(json.loads(fixed.read_text())["categories"]) < 10

    def all_used(content: dict) -> None:
        first = content["annotations"][0]
        content["annotations"] += [
            {**first, "id": i, "category_id": i, "bbox": [i / 100, 1, 5, 5]} for i in range(100, 130)
        ]

    fixed.unlink()
    case.edit(all_used)
    assert doctor(case, "--no-masks", "--fix", fixed) == 2
    assert not fixed.exists()
    assert "categories, more than the 20" in capsys.readouterr().err


def test_what_is_refused(case: Case, refused: Refused, tmp_path: Path) -> None:
    images = case.train.parent / "images"
    pair = ("doctor", case.train, "--images", images)
    assert "[replaced-file]" in refused(*pair, "--fix", case.train)
    assert "[replaced-file]" in refused(*pair, "--report", case.train)
    assert "[missing-argument]" in refused(*pair, case.val)
    assert "nowhere" in refused("doctor", case.train, "--images", tmp_path / "nowhere")
    assert "nowhere.json" in refused("doctor", tmp_path / "nowhere.json", "--images", images)
    case.train.write_text("[]")
    assert "[not-coco]" in refused(*pair)


def test_outputs_of_one_name_are_refused(case: Case, refused: Refused, tmp_path: Path) -> None:
    pair = ("doctor", case.train, "--images", case.train.parent / "images")
    before = set(tmp_path.rglob("*"))
    for report, fixed in (("a.json", "a.json"), ("a.json", "a.png"), ("a.png", "b.json")):
        words = ("--report", tmp_path / report, "--fix", tmp_path / fixed)
        assert "[replaced-file]" in refused(*pair, *words)
    assert set(tmp_path.rglob("*")) == before


def test_training_speaks_of_the_doctor(case: Case, refused: Refused) -> None:
    case.edit(spoil)
    assert "gn-detect doctor lists all" in refused("train", "--config-file", case.config)
    assert not case.output.exists()


def test_the_tool_in_a_checkout(
    repository: Path, case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case.edit(spoil)
    tool, images = str(repository / "tools" / "doctor.py"), str(case.train.parent / "images")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [tool, str(case.train), "--images", images, "--strict"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(tool, run_name="__main__")
    assert left.value.code == 1
    printed = capsys.readouterr()
    assert "[box-outside]" in printed.out
    assert printed.err == ""
