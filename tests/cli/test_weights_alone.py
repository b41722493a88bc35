"""predict, eval and export with a checkpoint and no config."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gn_detect.cli import main
from gn_detect.config import dump_config, load_config, without_paths
from gn_detect.modeling import build_model
from gn_detect.weights import norm_settings, save_weights
from tests.cli.conftest import Case


@pytest.fixture
def weights(case: Case, tmp_path: Path) -> Path:
    """A checkpoint that holds its config, far from its run's folder."""
    cfg = load_config(case.config)
    torch.manual_seed(3)
    model = build_model(cfg)
    metadata = replace(
        norm_settings(model),
        config=dump_config(without_paths(cfg)),
        class_names=["square", "bar"],
        category_ids=[3, 7],
    )
    path = tmp_path / "elsewhere" / "best.pth"
    path.parent.mkdir()
    save_weights(path, model.state_dict(), metadata)
    return path


def test_predict_takes_a_checkpoint_or_a_run_first(case: Case, weights: Path, tmp_path: Path) -> None:
    images = str(case.val.parent / "images")
    tail = ["--no-pictures", "--threshold", "0.05", "TEST.DETECTIONS_PER_IMAGE", "4"]
    old = ["--config-file", str(case.config), "--weights", str(weights), images]
    shutil.copy(case.config, weights.parent / "config.yaml")
    shutil.copy(weights, weights.parent / "model_best.pth")
    forms = [old, [str(weights), images], ["--weights", str(weights), images], [str(weights.parent), images]]
    found = []
    for number, words in enumerate(forms):
        output = tmp_path / f"out{number}"
        assert (
            main(["predict", *words, "--output", str(output), *tail, "TEST.DETECTIONS_PER_IMAGE", "4"]) == 0
        )
        found.append(json.loads((output / "predictions.json").read_text()))
    assert len(found[0]) == 8
    assert all(entries == found[0] for entries in found)


def test_an_exported_file_may_stand_first(case: Case, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    error = refused("predict", tmp_path / "model.onnx", case.val.parent / "images")
    assert "model.onnx" in error and "[not-exported]" in error


def test_eval_needs_only_weights_and_data(
    case: Case,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--val-json", str(case.val), "--val-images", str(case.val.parent / "images")]
    results = []
    for words in (["--config-file", str(case.config), "--weights", str(weights)], [str(weights)]):
        assert main(["eval", *words, "--json", *data, "OUTPUT_DIR", "output"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0] == results[1]
    assert set(results[0]["results"]) == {"bbox", "segm", "diagnosis"}


def test_eval_of_a_checkpoint_in_its_run_needs_no_flags(
    case: Case, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = case.output.with_name("output")  # also the name that other tools have for OUTPUT_DIR
    folder.mkdir()
    text = case.config.read_text()
    (folder / "config.yaml").write_text(text.replace(str(case.output), str(folder)))
    shutil.copy(weights, folder / "model_best.pth")
    monkeypatch.chdir(folder.parent)
    for words in (["output/model_best.pth"], ["output", "TEST.DETECTIONS_PER_IMAGE", "5"]):
        assert main(["eval", *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["output_dir"] == str(folder)


def test_export_needs_only_weights(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter itself takes a minute: tests/cli/test_export.py runs it."""
    exported: list[Any] = []

    def write(predictor: Any, path: Path) -> None:
        exported.append(predictor.cfg.test.detections_per_image)
        path.write_bytes(b"")

    monkeypatch.setattr("gn_detect.export.write.export_detector", write)
    words = [str(weights), "--output", str(tmp_path / "m.pt2"), "TEST.DETECTIONS_PER_IMAGE", "7"]
    assert main(["export", *words]) == 0
    assert exported == [7]


def test_without_config_and_weights_both_are_named(case: Case, refused: Any) -> None:
    for words in (["predict", case.val.parent / "images"], ["eval"], ["export"]):
        assert "[no-config]" in refused(*words)
    assert "[missing-weights]" in refused("eval", "nothing.pth")
