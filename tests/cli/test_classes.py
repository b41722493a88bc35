"""Class names decide what a label means: in evaluation, prediction, resumed training and test sets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gn_detect.cli import main
from tests.engine.tiny import TINY

Refused = Callable[..., str]
RESULTS = "coco_instances_results.json"


@pytest.fixture(scope="module")
def cases(shared_dir: Path) -> Path:
    """Annotation files of one set of images, which differ in their categories."""
    return shared_dir / "cases" / "resume_changed"


@pytest.fixture(scope="module")
def trained(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on ``train.json``, of cats and dogs; tests must not change it."""
    folder = tmp_path_factory.mktemp("classes")
    run(folder, cases, "train.json", "val.json", 2)
    return folder / "run"


def run(folder: Path, cases: Path, train: str, val: str, iterations: int) -> int:
    """Train for a moment."""
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(TINY) | {"OUTPUT_DIR": str(folder / "run")}))
    words = ["train", "--config-file", str(config), "--train-json", str(cases / train)]
    words += ["--train-images", str(cases / "images"), "--val-json", str(cases / val)]
    words += ["--val-images", str(cases / "images"), "SOLVER.MAX_ITER", str(iterations)]
    return main(words)


def evaluation(trained: Path, cases: Path, val: str, output: Path) -> list[str]:
    """The command."""
    words = ["eval", "--config-file", str(trained / "config.yaml"), "--val-json", str(cases / val)]
    words += ["--val-images", str(cases / "images"), "--weights", str(trained / "model_final.pth")]
    return [*words, "OUTPUT_DIR", str(output)]


def read(output: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """AP and detections."""
    results = json.loads((output / "results.json").read_text())
    return results, json.loads((output / "inference" / "val" / RESULTS).read_text())


@pytest.fixture(scope="module")
def as_trained(trained: Path, cases: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Evaluated on the val set of the run."""
    output = tmp_path_factory.mktemp("as_trained") / "out"
    assert main(evaluation(trained, cases, "val.json", output)) == 0
    results, found = read(output)
    assert {entry["category_id"] for entry in found} == {1, 2}
    return results, found


@pytest.mark.parametrize(
    ("val", "ids"),
    [
        ("reordered.json", {1: 2, 2: 1}),
        ("val_onlycat.json", {1: 1}),
        pytest.param("val_from0.json", {1: 0, 2: 1}, marks=pytest.mark.slow),
        pytest.param("val_empty.json", {1: 1, 2: 2}, marks=pytest.mark.slow),
    ],
)
def test_evaluation_covers_the_categories_of_the_file_under_its_ids(
    trained: Path, cases: Path, tmp_path: Path, as_trained: tuple[Any, Any], val: str, ids: dict[int, int]
) -> None:
    assert main(evaluation(trained, cases, val, tmp_path / "out")) == 0
    results, found = read(tmp_path / "out")
    before, expected = as_trained
    expected = [
        {**entry, "category_id": ids[entry["category_id"]]}
        for entry in expected
        if entry["category_id"] in ids
    ]
    assert found == expected
    for kind in ("bbox", "segm"):
        names = [name for name in results[kind] if name.startswith("AP-")]
        assert sorted(names) == (["AP-cat"] if val == "val_onlycat.json" else ["AP-cat", "AP-dog"])
        for name in names:
            known = None if val == "val_empty.json" else before[kind][name]
            assert results[kind][name] == pytest.approx(known)


@pytest.mark.parametrize(
    ("val", "names", "new"), [("renamed.json", "cat, horse", "horse"), ("three.json", "cat, dog, cow", "cow")]
)
def test_evaluation_on_classes_that_the_checkpoint_does_not_know(
    trained: Path, cases: Path, tmp_path: Path, refused: Refused, val: str, names: str, new: str
) -> None:
    words = evaluation(trained, cases, val, tmp_path / "out")
    message = refused(*words)
    assert f"{val}) has the categories {names}, and" in message
    assert "model_final.pth has cat, dog" in message
    assert f"not among them: {new};" in message
    assert "--other-classes" in message
    assert not (tmp_path / "out").exists()


def test_evaluation_by_position(
    trained: Path, cases: Path, tmp_path: Path, refused: Refused, as_trained: tuple[Any, Any]
) -> None:
    assert main([*evaluation(trained, cases, "renamed.json", tmp_path / "out"), "--other-classes"]) == 0
    results, found = read(tmp_path / "out")
    assert found == as_trained[1]
    assert "AP-horse" in results["bbox"]
    words = evaluation(trained, cases, "three.json", tmp_path / "three")
    assert "[num-classes-differ]" in refused(*words, "--other-classes")


def test_several_test_sets_each_by_itself(trained: Path, cases: Path, tmp_path: Path) -> None:
    sets = {"one": "val_onlycat.json", "two": "reordered.json"}
    register = {
        name: {"ANNOTATIONS": str(cases / file), "IMAGES": str(cases / "images")}
        for name, file in sets.items()
    }
    words = [
        "eval",
        "--config-file",
        str(trained / "config.yaml"),
        "--weights",
        str(trained / "model_final.pth"),
    ]
    keys = ["DATASETS.REGISTER", str(register), "DATASETS.TEST", str(list(sets)), "OUTPUT_DIR", str(tmp_path)]
    assert main([*words, *keys]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name for name in results["one"]["bbox"] if name.startswith("AP-")} == {"AP-cat"}
    assert {name for name in results["two"]["bbox"] if name.startswith("AP-")} == {"AP-cat", "AP-dog"}


def test_a_checkpoint_that_knows_no_names_is_evaluated_by_position(
    trained: Path, cases: Path, tmp_path: Path, as_trained: tuple[Any, Any]
) -> None:
    content = torch.load(trained / "model_final.pth", weights_only=True)
    torch.save({"model": content["model"]}, tmp_path / "plain.pth")
    words = evaluation(trained, cases, "renamed.json", tmp_path / "out")
    words[words.index("--weights") + 1] = str(tmp_path / "plain.pth")
    assert main(words) == 0
    assert read(tmp_path / "out")[1] == as_trained[1]


def prediction(trained: Path, cases: Path, truth: str, output: Path) -> list[str]:
    """The command, without pictures."""
    words = ["predict", "--config-file", str(trained / "config.yaml"), "--weights"]
    words += [str(trained / "model_final.pth"), "--annotations", str(cases / truth), "--output", str(output)]
    return [*words, "--threshold", "0.05", "--no-pictures", str(cases / "images")]


@pytest.mark.parametrize(
    "truth",
    [
        "reordered.json",
        "val_onlycat.json",
        pytest.param("val.json", marks=pytest.mark.slow),
        pytest.param("val_from0.json", marks=pytest.mark.slow),
    ],
)
def test_prediction_has_the_ids_of_its_ground_truth(
    trained: Path, cases: Path, tmp_path: Path, truth: str, as_trained: tuple[Any, Any]
) -> None:
    assert main(prediction(trained, cases, truth, tmp_path / "out")) == 0
    ids = {
        category["name"]: category["id"] for category in json.loads((cases / truth).read_text())["categories"]
    }
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    names = {1: "cat", 2: "dog"}
    expected = [ids[name] for e in as_trained[1] if (name := names[e["category_id"]]) in ids]
    assert [entry["category_id"] for entry in found] == expected
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["categories"]
    assert {category["name"]: category["id"] for category in listed} == ids


def test_prediction_next_to_ground_truth_of_other_classes(
    trained: Path, cases: Path, tmp_path: Path, refused: Refused
) -> None:
    words = prediction(trained, cases, "renamed.json", tmp_path / "out")
    message = refused(*words)
    assert "has the categories cat, horse, and the model was trained on cat, dog" in message
    assert "--other-classes" in message
    assert not (tmp_path / "out").exists()
    assert main([*words, "--other-classes"]) == 0
    assert "cow" in refused(*prediction(trained, cases, "three.json", tmp_path / "three"))
    assert "--annotations" in refused(
        "predict", "--config-file", trained / "config.yaml", "--other-classes", "x"
    )


@pytest.mark.parametrize(
    ("train", "names"),
    [("renamed.json", "cat, horse"), ("reordered.json", "dog, cat"), ("three.json", "cat, dog, cow")],
)
def test_a_run_is_not_resumed_on_other_classes(
    trained: Path, cases: Path, refused: Refused, train: str, names: str
) -> None:
    words = ["train", "--config-file", trained / "config.yaml", "--resume", "--train-json", cases / train]
    message = refused(*words, "--train-images", cases / "images")
    assert f"trained on the classes cat, dog, and dataset train ({cases / train}) has {names}" in message
    assert "--other-classes" in message


def test_a_run_is_resumed_by_position_and_on_other_objects_only_on_request(
    trained: Path, cases: Path, tmp_path: Path, refused: Refused
) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    images = ["--train-images", str(cases / "images"), "--val-images", str(cases / "images")]
    words = ["train", "--config-file", str(trained / "config.yaml"), "--resume", *images]
    words += ["OUTPUT_DIR", str(tmp_path / "copy"), "SOLVER.MAX_ITER", "3"]
    half = ["--train-json", str(cases / "half.json"), "--val-json", str(cases / "val.json")]
    message = refused(*words, *half)
    assert "content of DATASETS.TRAIN was 6 images, 12 objects" in message
    assert "is 3 images, 6" in message
    other = ["--train-json", str(cases / "renamed.json"), "--val-json", str(cases / "renamed.json")]
    assert main([*words, *other, "--other-classes"]) == 0
    log = (tmp_path / "copy" / "log.txt").read_text()
    assert "SOLVER.MAX_ITER was 2 and is 3" in log
    assert "renamed.json" in log


@pytest.mark.parametrize(
    "val",
    [
        "val_onlycat.json",
        "val_empty.json",
        pytest.param("reordered.json", marks=pytest.mark.slow),
        pytest.param("val_from0.json", marks=pytest.mark.slow),
    ],
)
def test_a_test_set_may_list_fewer_categories_in_another_order(cases: Path, tmp_path: Path, val: str) -> None:
    assert run(tmp_path, cases, "train.json", val, 1) == 0
    results, found = read(tmp_path / "run")
    listed = {category["id"] for category in json.loads((cases / val).read_text())["categories"]}
    assert {entry["category_id"] for entry in found} == listed
    assert len([name for name in results["segm"] if name.startswith("AP-")]) == len(listed)
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(("val", "new"), [("renamed.json", "horse"), ("three.json", "cow")])
def test_a_test_set_of_classes_that_are_not_trained(
    cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], val: str, new: str
) -> None:
    assert run(tmp_path, cases, "train.json", val, 1) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"not among them: {new}" in message
    assert val in message
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_is_chosen_by_a_category_of_the_test_set(
    trained: Path, cases: Path, tmp_path: Path, refused: Refused
) -> None:
    words = ["train", "--config-file", trained / "config.yaml", "--val-json", cases / "val_onlycat.json"]
    words += ["--val-images", cases / "images", "OUTPUT_DIR", tmp_path / "run"]
    assert "segm/AP-dog" in refused(*words, "SOLVER.BEST_CHECKPOINT_METRIC", "segm/AP-dog")


def test_weights_of_other_classes_still_start_their_layers_afresh(
    trained: Path, cases: Path, tmp_path: Path, refused: Refused
) -> None:
    words = [
        "train",
        "--config-file",
        str(trained / "config.yaml"),
        "--train-json",
        str(cases / "renamed.json"),
    ]
    words += ["--train-images", str(cases / "images"), "--weights", str(trained / "model_final.pth")]
    words += ["OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", "1"]
    assert main(words) == 0
    assert "start afresh, made for other classes" in (tmp_path / "run" / "log.txt").read_text()
    assert "[conflicting-flags]" in refused(*words, "--other-classes")
    assert "[lone-flag]" in refused(*words, "--allow-changes")
