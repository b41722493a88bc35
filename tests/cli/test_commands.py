"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import gn_detect
from gn_detect import __version__
from gn_detect.cli import inputs, main, options
from gn_detect.engine import trainer
from tests.cli.conftest import Case


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture
def trained(case: Case) -> Case:
    """A finished run of one iteration; with so little training every score is low but not zero."""
    assert run("train", "--config-file", case.config, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "[]") == 0
    return case


def test_train_then_eval_predict_and_plot(
    trained: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, weights = trained.output / "config.yaml", trained.output / "model_final.pth"
    keys = ["DATASETS.TEST", "['tiny_test']", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    assert (
        run("eval", "--config-file", config, "MODEL.WEIGHTS", weights, *keys, "OUTPUT_DIR", tmp_path / "eval")
        == 0
    )
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert set(results) == {"bbox", "segm", "diagnosis"}

    output = tmp_path / "predictions"
    images = trained.val.parent / "images"
    common = ["predict", "--config-file", config, "--output", output, "--threshold", 0.0]
    assert run(*common, "--weights", weights, images, images / "001.png", *keys) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "001.png",
        "002.png",
        "images.json",
        "predictions.json",
    ]
    found = json.loads((output / "predictions.json").read_text())
    assert {r["image_id"] for r in found} == {1, 2}
    assert {r["category_id"] for r in found} <= {3, 7}
    assert all(Path(r["file_name"]).is_file() and r["segmentation"]["size"] == [64, 80] for r in found)

    assert run("plot", trained.output) == 0
    assert (trained.output / "curves.png").is_file()
    assert capsys.readouterr().err == ""


def test_datasets_by_flags_decide_the_classes(case: Case, tmp_path: Path) -> None:
    """A config for other data and classes; the flags bring both."""
    content = yaml.safe_load(case.config.read_text())
    content["DATASETS"] = {"TRAIN": ["coco_2017_train"], "TEST": ["coco_2017_val"]}
    content["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] = 80
    case.config.write_text(yaml.safe_dump(content))
    flags = ["--train-json", case.train, "--train-images", case.train.parent / "images"]
    flags += ["--val-json", case.val, "--val-images", case.val.parent / "images"]
    assert run("train", "--config-file", case.config, *flags, "SOLVER.MAX_ITER", 1) == 0
    written = yaml.safe_load((case.output / "config.yaml").read_text())
    assert written["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 2
    assert written["DATASETS"]["TRAIN"] == ["train"]
    assert written["DATASETS"]["TEST"] == ["val"]
    assert (case.output / "inference" / "val" / "coco_instances_results.json").is_file()


def test_classes_given_by_key_are_kept(case: Case, refused) -> None:
    flags = ["--train-json", case.train, "--train-images", case.train.parent / "images"]
    assert "NUM_CLASSES" in refused("train", "--config-file", case.config, *flags, options.NUM_CLASSES, 4)


def test_interrupted(case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "train_step", stop)
    assert run("train", "--config-file", case.config) == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert not [p for p in case.output.iterdir() if p.suffix in (".pth", ".tmp")]


def test_public_names_are_there() -> None:
    assert all(getattr(gn_detect, name) is not None for name in gn_detect.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = gn_detect.nonsense


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [["-m", "gn_detect", "train"], ["tools/train_net.py"], ["tools/predict.py"]]
)
def test_programs(command: list[str], repository: Path, tmp_path: Path) -> None:
    """From another folder, without installation: the parser answers."""
    arguments = [str(repository / a) if a.startswith("tools/") else a for a in command]
    result = subprocess.run(
        [sys.executable, *arguments, "--help"],
        cwd=repository if "-m" in command else tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0
    assert "--config-file" in result.stdout


def test_images_and_keys_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("A.PNG").touch()
    split = inputs.split_overrides(["A.PNG", "folder", "MODEL.WEIGHTS", "x.pth", "SEED", "1"])
    assert split == (["A.PNG", "folder"], ["MODEL.WEIGHTS", "x.pth", "SEED", "1"])
    assert inputs.split_overrides(["a.png"]) == (["a.png"], [])
    assert inputs.split_overrides(["a", "SEED", "1"]) == (["a"], ["SEED", "1"])
    assert inputs.split_overrides(["SEEDS"]) == (["SEEDS"], [])


def test_pictures_of_images_with_one_name_do_not_overwrite_each_other() -> None:
    named = inputs.name_outputs([Path("a/x.jpg"), Path("b/x.png"), Path("x_2.jpg"), Path("x.mov")])
    assert named == ["x.png", "x_2.png", "x_2_2.png", "x.mp4"]
