"""A run's folder works from every folder, and where it was moved; what is passed on names no folder."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from gn_detect.cli import main
from gn_detect.config import dump_config, load_config, with_absolute_paths, without_paths
from gn_detect.data import resolve_dataset
from gn_detect.engine.run import write_run_config
from gn_detect.errors import UserError
from tests.engine.tiny import make_dataset
from tests.refusal import refusal
from tests.test_docs import SMALL_MODEL

PRIVATE = "private_place"
"""Part of a path, which nothing that is passed on may name."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project: data, and a run of the README's command; tests must not change it."""
    project = tmp_path_factory.mktemp("made") / PRIVATE / "project"
    words = ["train"]
    for part, seed in (("train", 1), ("val", 2)):
        make_dataset(project / "data" / part, 4 - seed, seed=seed)
        words += [
            f"--{part}-json",
            f"data/{part}/annotations.json",
            f"--{part}-images",
            f"data/{part}/images",
        ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        assert main([*words, "OUTPUT_DIR", "runs/one", *SMALL_MODEL, "VIS.NUM_IMAGES", "1"]) == 0
    return project


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, its run made to believe that it was trained here; the current folder is another one."""
    copy = tmp_path / PRIVATE / "project"
    shutil.copytree(made, copy)
    for file in ("config.yaml", "environment.json"):
        path = copy / "runs" / "one" / file
        path.write_text(path.read_text().replace(str(made), str(copy)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return copy


def use(run: Path, images: Path) -> None:
    """Every command that takes a run's folder, from where we are."""
    config, weights = str(run / "config.yaml"), str(run / "model_final.pth")
    results = run / "results.json"
    before = json.loads(results.read_text())
    results.unlink()
    assert main(["eval", "--config-file", config, "--weights", weights]) == 0
    assert json.loads(results.read_text()) == before
    assert main(["predict", "--config-file", config, "--weights", weights, str(images)]) == 0
    assert main(["report", str(run)]) == 0
    assert "No curves, confusion and pictures" not in (run / "report.html").read_text()
    assert main(["plot", str(run), "--output", "curves.svg"]) == 0
    lines = len((run / "metrics.jsonl").read_text().splitlines())
    assert main(["train", "--config-file", config, "--resume", "SOLVER.MAX_ITER", "2"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) > lines
    assert {path.name for path in Path.cwd().iterdir()} == {"predictions", "curves.svg"}


def test_from_another_folder(project: Path) -> None:
    use(project / "runs" / "one", project / "data" / "val" / "images")


@pytest.mark.slow
def test_the_whole_project_was_moved(project: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(project, tmp_path / "moved"))
    use(moved / "runs" / "one", moved / "data" / "val" / "images")
    assert not project.exists()


def test_the_runs_folder_was_moved(project: Path, tmp_path: Path) -> None:
    run = Path(shutil.move(project / "runs" / "one", tmp_path / "alone"))
    use(run, project / "data" / "val" / "images")
    assert not (project / "runs" / "one").exists()


def test_project_moved_and_the_run_put_elsewhere_in_it(project: Path, tmp_path: Path) -> None:
    moved = Path(shutil.move(project, tmp_path / "moved"))
    (moved / "archive" / "old").mkdir(parents=True)
    run = Path(shutil.move(moved / "runs" / "one", moved / "archive" / "old" / "first"))
    cfg = load_config(run / "config.yaml")
    assert resolve_dataset(cfg, "val").annotations == moved / "data" / "val" / "annotations.json"
    assert cfg.output_dir == str(run)


def test_data_that_are_gone_are_named_as_they_were(project: Path, tmp_path: Path) -> None:
    run = Path(shutil.move(project / "runs" / "one", tmp_path / "alone"))
    shutil.rmtree(project)
    cfg = load_config(run / "config.yaml")
    with refusal("missing-annotations", "project/data/val/annotations.json"):
        resolve_dataset(cfg, "val")


def test_a_folder_in_the_file_that_was_put_there_by_hand_is_meant(project: Path) -> None:
    """And so is one on the command line."""
    path = project / "runs" / "one" / "config.yaml"
    assert load_config(path, ["OUTPUT_DIR", "runs/three"]).output_dir == "runs/three"
    text = path.read_text()
    path.write_text(text.replace(str(project / "runs" / "one"), "runs/two"))
    assert load_config(path).output_dir == "runs/two"
    other = project / "config.yaml"
    other.write_text("OUTPUT_DIR: runs/two\n")
    assert load_config(other).output_dir == "runs/two"


@pytest.mark.parametrize(
    "text",
    [
        "{OUTPUT_DIR: [1], DATASETS: 3}",
        "{OUTPUT_DIR: X, DATASETS: {REGISTER: [1]}}",
        "{OUTPUT_DIR: X, DATASETS: {REGISTER: {a: 1}, ROOT: 2}, MODEL: 5}",
        "{OUTPUT_DIR: X, DATASETS: {REGISTER: {a: {ANNOTATIONS: {b: 1}, IMAGES: 3}}}}",
        '{OUTPUT_DIR: X, MODEL: {WEIGHTS: "/a\\0b", DEVICE: none}}',
        "{OUTPUT_DIR: X, MODEL: {WEIGHTS: /" + "a" * 5000 + ", DEVICE: none}}",
    ],
)
@pytest.mark.parametrize("environment", ['{"folder": "X"}', "[]", "1", '"folder"', "{", "[" * 9999])
def test_damaged_files_of_a_run(tmp_path: Path, text: str, environment: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "environment.json").write_text(environment)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def test_a_run_of_an_earlier_version_with_relative_paths(project: Path) -> None:
    run = project / "runs" / "one"
    environment = json.loads((run / "environment.json").read_text())
    del environment["folder"]
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(f"{project}{os.sep}", ""))
    cfg = load_config(run / "config.yaml")
    assert cfg.output_dir == str(run)
    assert resolve_dataset(cfg, "val").images == project / "data" / "val" / "images"


def test_weights_that_the_run_began_with_are_found_again(project: Path, tmp_path: Path) -> None:
    run = project / "runs" / "one"
    shutil.copy(run / "model_final.pth", project / "start.pth")
    cfg = load_config(run / "config.yaml").replace({"MODEL.WEIGHTS": str(project / "start.pth")})
    (run / "config.yaml").write_text(dump_config(with_absolute_paths(cfg)))
    moved = Path(shutil.move(project, tmp_path / "moved"))
    assert load_config(moved / "runs" / "one" / "config.yaml").model.weights == str(moved / "start.pth")
    for url in ("zoo://R-50-GN", "https://example.com/w.pth", ""):
        there = cfg.replace({"MODEL.WEIGHTS": url})
        assert with_absolute_paths(there).model.weights == without_paths(there).model.weights == url


def test_a_pipeline_file_is_found_again(project: Path, tmp_path: Path) -> None:
    run = project / "runs" / "one"
    (project / "pipeline.json").write_text("{}")
    cfg = load_config(run / "config.yaml").replace({"INPUT.ALBUMENTATIONS": str(project / "pipeline.json")})
    (run / "config.yaml").write_text(dump_config(with_absolute_paths(cfg)))
    moved = Path(shutil.move(project, tmp_path / "moved"))
    found = load_config(moved / "runs" / "one" / "config.yaml")
    assert found.input.albumentations == str(moved / "pipeline.json")
    assert without_paths(found).input.albumentations == "pipeline.json"
    assert with_absolute_paths(cfg.replace({"INPUT.ALBUMENTATIONS": ""})).input.albumentations == ""


def test_built_in_data_are_found_again_and_not_generated_elsewhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GN_DETECT_DATASETS", raising=False)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    generated: list[Path] = []
    monkeypatch.setattr("gn_detect.data.datasets.ensure_demo_dataset", generated.append)
    for part in ("train", "val"):
        (project / "datasets" / "demo" / f"images_{part}").mkdir(parents=True)
        (project / "datasets" / "demo" / f"instances_{part}.json").write_text("{}")
    monkeypatch.chdir(project)
    cfg = load_config("runs/one/config.yaml", ["DATASETS.TRAIN", "demo_train", "DATASETS.TEST", "demo_val"])
    cfg = cfg.replace({"OUTPUT_DIR": "runs/one"})
    write_run_config(cfg, torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    cfg = load_config(project / "runs" / "one" / "config.yaml")
    assert resolve_dataset(cfg, "demo_val").images == project / "datasets" / "demo" / "images_val"
    moved = Path(shutil.move(project, tmp_path / "moved"))
    cfg = load_config(moved / "runs" / "one" / "config.yaml")
    assert resolve_dataset(cfg, "demo_val").images == moved / "datasets" / "demo" / "images_val"
    assert generated == [project / "datasets", moved / "datasets"]
    run = Path(shutil.move(moved / "runs" / "one", tmp_path / "run"))
    shutil.rmtree(moved)
    cfg = load_config(run / "config.yaml")
    with refusal("missing-annotations", "demo_val", "DATASETS.ROOT"):
        resolve_dataset(cfg, "demo_val")
    monkeypatch.setenv("GN_DETECT_DATASETS", str(tmp_path / "new"))
    with refusal("missing-annotations", "new/demo/instances_val.json"):
        resolve_dataset(cfg, "demo_val")


def content_of(path: Path) -> bytes:
    """All bytes of a file, unpacked."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist()) + path.read_bytes()


def test_no_local_path_is_passed_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = project / "runs" / "one"
    assert main(["report", str(run)]) == 0
    kept = str(run / "kept.safetensors")
    assert main(["convert", "--keep-norm", str(run / "model_best.pth"), kept]) == 0
    words = ["predict", "--config-file", str(run / "config.yaml"), "--weights", str(run / "model_final.pth")]
    monkeypatch.chdir(project)
    assert main([*words, "--threshold", "0.05", "data/val/images"]) == 0
    passed_on = [
        *run.glob("*.pth"),
        Path(kept),
        run / "report.html",
        run / "results.json",
        *run.rglob("c*s.json"),
    ]
    passed_on += Path("predictions").glob("*.json")
    assert len(passed_on) > 6
    for path in passed_on:
        assert PRIVATE.encode() not in content_of(path), path
    stated = load_config(run / "config.yaml")
    assert PRIVATE in dump_config(stated), "the run's own config has them"
    stated = yaml.safe_load(torch.load(run / "model_final.pth", weights_only=True)["config"])
    assert stated["DATASETS"]["REGISTER"]["val"] == {"ANNOTATIONS": "annotations.json", "IMAGES": "images"}
    assert stated["OUTPUT_DIR"] == "./output"


def test_a_report_without_its_data_names_no_folder(project: Path) -> None:
    shutil.rmtree(project / "data")
    assert main(["report", str(project / "runs" / "one")]) == 0
    page = (project / "runs" / "one" / "report.html").read_text()
    assert "No curves, confusion and pictures" in page
    assert PRIVATE not in page
