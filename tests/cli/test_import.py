"""``gn-detect import``, and ``train --data``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gn_detect import finetune
from gn_detect.cli import main
from gn_detect.cli.train import _image_of
from gn_detect.config import load_config
from gn_detect.engine.autoconfig import with_datasets
from gn_detect.engine.folder_lock import FolderLock
from gn_detect.engine.run_data import prepare_data
from tests.data.format_writers import write_yolo
from tests.engine.tiny import make_dataset
from tests.refusal import refusal
from tests.test_docs import SMALL_MODEL


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Eight pictures as YOLO polygons, one part."""
    made = make_dataset(tmp_path / "made", 8)
    return write_yolo(json.loads(made.read_text()), made.parent / "images", tmp_path / "yolo")


def whole(yolo: Path) -> None:
    """Let the images be no part of anything."""
    (yolo / "data.yaml").unlink()
    (yolo / "classes.txt").write_text("square\nbar\n")


def sizes(*files: Path) -> list[int]:
    return [len(json.loads(file.read_text())["images"]) for file in files]


def test_import_writes_says_and_advises(
    yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(yolo)
    target = tmp_path / "out" / "data.json"
    assert main(["import", str(yolo), str(target)]) == 0
    printed = capsys.readouterr().out
    for text in ("is YOLO", "square", "8 images, 16 annotations", "0 errors", "train --train-json"):
        assert text in printed
    assert main(["import", str(yolo), str(target), "--split", "0.75", "--seed", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    train, val = (Path(result["files"][part]) for part in ("train", "val"))
    assert (train, val) == (tmp_path / "out" / "data_train.json", tmp_path / "out" / "data_val.json")
    assert sizes(train, val) == [6, 2]
    assert result["images"] == str(yolo / "images")
    before = train.read_bytes()
    assert main(["import", str(yolo), str(target), "--split", "0.75", "--seed", "3", "--quiet"]) == 0
    assert train.read_bytes() == before


def test_mistakes_of_an_import(yolo: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    target = tmp_path / "x.json"
    whole(yolo)
    assert "wrong-ending" in refused("import", yolo, tmp_path / "x.txt")
    assert "bad-argument" in refused("import", yolo, target, "--split", "80")
    assert "bad-argument" in refused("import", yolo, target, "--format", "pdf")
    assert "missing-annotations" in refused("import", tmp_path / "none", target)
    assert "replaced-file" in refused("import", tmp_path / "made", tmp_path / "made" / "annotations.json")
    (yolo / "labels" / "008.txt").write_text("0 5 5 5 5\n")
    line = refused("import", yolo, target, "--split", "0.5")
    assert "fractions" in line
    assert "008.txt: line 1" in line
    assert list(tmp_path.glob("x*")) == []


def test_half_a_dataset_is_never_written(
    yolo: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(yolo)
    written: list[Any] = []
    dump = json.dump

    def fail_at_the_second(*arguments: Any, **options: Any) -> None:
        written.append(arguments)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        dump(*arguments, **options)

    monkeypatch.setattr("gn_detect.data.formats.importing.json.dump", fail_at_the_second)
    assert "cannot-write" in refused("import", yolo, tmp_path / "x.json", "--split", "0.5")
    assert list(tmp_path.glob("*x*json*")) == []


def test_data_is_split_trained_on_and_resumed(
    yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["train", "--data", str(yolo), "OUTPUT_DIR", str(run), "SEED", "5", *SMALL_MODEL]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    for text in ("is YOLO: train 6 images", "val 2 images", "split into 6 and 2 images (seed 5)"):
        assert text in printed.err
    assert set(json.loads(printed.out)["results"]) >= {"bbox", "segm"}
    files = [run / "data" / f"{part}.json" for part in ("train", "val")]
    assert sizes(*files) == [6, 2]
    cfg = load_config(run / "config.yaml")
    assert cfg.datasets.registered["val"].annotations == str(files[1])
    before = [file.read_bytes() for file in files]
    (yolo / "labels" / "001.txt").write_text("")  # the run does not notice
    longer = [*words, "--resume", "SOLVER.MAX_ITER", "2"]
    assert main(longer) == 0
    printed = capsys.readouterr()
    assert "goes on with" in printed.out
    assert [file.read_bytes() for file in files] == before
    assert main(["eval", str(run / "model_final.pth"), "--config-file", str(run / "config.yaml")]) == 0


def test_the_next_command_names_an_image_in_a_folder_below(yolo: Path, tmp_path: Path) -> None:
    for name in ("images", "labels"):
        (yolo / name).rename(yolo / "x")
        (yolo / name).mkdir()
        for file in sorted((yolo / "x").iterdir()):
            folder = yolo / name / ("a" if int(file.stem) % 2 else "b")
            folder.mkdir(exist_ok=True)
            file.rename(folder / file.name)
    data = prepare_data(yolo, tmp_path / "run")
    assert Path(data.train[1]) == yolo / "images"
    assert Path(_image_of(with_datasets(load_config(), data.train, data.val))).is_file()


def test_mistakes_of_data(yolo: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = ("OUTPUT_DIR", tmp_path / "run")
    line = refused("train", "--data", yolo, "--train-json", "x.json", *folder)
    assert "conflicting-flags" in line
    assert "conflicting-flags" in refused("eval", "--data", yolo, *folder)
    (yolo / "labels" / "003.txt").write_text("9 0.5 0.5 0.1 0.1\n")
    assert "dangling-category" in refused("train", "--data", yolo, *folder)
    assert not (tmp_path / "run").exists()
    assert "gn-detect import SRC DST.json" in refused(
        "train", "--train-json", yolo / "data.yaml", "--train-images", yolo, *folder
    )


def test_a_run_in_progress_keeps_its_data(yolo: Path, tmp_path: Path) -> None:
    prepare_data(yolo, tmp_path / "run")
    before = (tmp_path / "run" / "data" / "train.json").read_bytes()
    with FolderLock(tmp_path / "run") as lock:
        lock.take()
        with refusal("folder-in-use", "run"):
            prepare_data(yolo, tmp_path / "run", seed=7)
    assert (tmp_path / "run" / "data" / "train.json").read_bytes() == before


def test_finetune_takes_data(yolo: Path, tmp_path: Path) -> None:
    keys = dict(zip(SMALL_MODEL[::2], SMALL_MODEL[1::2], strict=True))
    run = finetune(data=yolo, output_dir=tmp_path / "run", overrides=keys)
    assert set(run.results) >= {"bbox", "segm"}
    assert sizes(tmp_path / "run" / "data" / "train.json") == [6]
    with refusal("conflicting-flags", "train_json"):
        finetune("a.json", "images", data=yolo)
    with refusal("lone-flag", "train_json"):
        finetune("a.json")
