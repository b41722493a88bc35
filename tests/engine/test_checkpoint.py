"""Checkpoints that are damaged, missing or too many."""

from __future__ import annotations

import json
import logging
import os
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch

from gn_detect.config import Config, dump_config
from gn_detect.data import build_train_loader
from gn_detect.engine import train
from gn_detect.engine import trainer as trainer_module
from gn_detect.engine.distributed import scale_config
from gn_detect.engine.run import prepare
from gn_detect.errors import UserError
from tests.engine.chaos import differences


@pytest.fixture
def trained(tiny_config: Config) -> Config:
    """A run of five iterations with a checkpoint after each."""
    keys = {"DATASETS.TEST": [], "SOLVER.MAX_ITER": 5, "SOLVER.CHECKPOINT_PERIOD": 1, "CHECKPOINT.KEEP": 3}
    cfg = tiny_config.replace(keys)
    train(cfg)
    return cfg


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_the_last_ones_are_kept(trained: Config) -> None:
    names = sorted(path.name for path in Path(trained.output_dir).glob("model_*.pth"))
    assert names == ["model_0000002.pth", "model_0000003.pth", "model_final.pth"]


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, os.unlink])
def test_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    trained: Config, damage, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(trained.output_dir)
    expected = torch.load(folder / "model_final.pth", weights_only=True)
    damage(folder / "model_final.pth")
    there = (folder / "model_final.pth").exists()
    with caplog.at_level(logging.INFO, logger="gn_detect"):
        train(trained, resume=True)
    assert "model_final.pth is passed over" in caplog.text
    assert "model_0000003.pth at iteration 4" in caplog.text
    assert (folder / "model_final.pth.damaged").exists() == there
    assert differences(torch.load(folder / "model_final.pth", weights_only=True), expected) == []


def test_no_readable_checkpoint_is_an_error(trained: Config) -> None:
    for path in Path(trained.output_dir).glob("model_*.pth"):
        truncate(path)
    with pytest.raises(UserError, match="no checkpoint in .* can be read .*model_final.pth"):
        train(trained, resume=True)


def test_leftovers_of_a_killed_process_are_removed(trained: Config) -> None:
    folder = Path(trained.output_dir)
    (folder / "inference/val").mkdir(parents=True)
    leftovers = [folder / ".model_0000003.pth.abc.tmp", folder / "inference/val/.results.json.abc.tmp"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    train(trained, resume=True)
    assert not any(leftover.exists() for leftover in leftovers)


def test_what_an_earlier_run_found_best_is_not_taken_for_this_ones(trained: Config) -> None:
    folder = Path(trained.output_dir)
    (folder / "model_best.pth").write_bytes(b"of an earlier run")
    (folder / "pictures" / "val_7.png").write_bytes(b"of an earlier run")
    kept = {
        name: (folder / name).read_bytes() for name in ("metrics.jsonl", "model_final.pth", "config.yaml")
    }
    for name in ("inference", "inference.earlier"):
        (folder / name / "val").mkdir(parents=True)
        (folder / name / "val/results.json").write_text(name)
    train(trained.replace({"SOLVER.MAX_ITER": 3}))
    assert not (folder / "inference").exists()
    assert (folder / "inference.earlier/val/results.json").read_text() == "inference"
    assert not (folder / "model_best.pth").exists(), "this one evaluated nothing"
    assert (folder / "model_best.pth.earlier").read_bytes() == b"of an earlier run"
    assert all((folder / f"{name}.earlier").read_bytes() == content for name, content in kept.items())
    assert "MAX_ITER: 3" in (folder / "config.yaml").read_text()
    assert [path.name for path in folder.glob("pictures*/val_*")] == ["val_7.png"]
    assert (folder / "pictures.earlier" / "val_7.png").is_file()
    assert "holds an earlier run" in (folder / "log.txt").read_text()
    train(trained.replace({"DATASETS.TEST": list(trained.datasets.train)}))
    best = (folder / "model_best.pth").read_bytes()
    train(trained.replace({"DATASETS.TEST": list(trained.datasets.train)}), resume=True)
    assert len(best) == (folder / "model_best.pth").stat().st_size


def test_classes_in_another_order_are_not_resumed(trained: Config, tmp_path: Path) -> None:
    (name,) = trained.datasets.train
    registered = trained.datasets.registered[name]
    content = json.loads(Path(registered.annotations).read_text())
    first, second = content["categories"]
    first["name"], second["name"] = second["name"], first["name"]
    swapped = tmp_path / "swapped.json"
    swapped.write_text(json.dumps(content))
    keys = {"DATASETS.REGISTER": {name: {"ANNOTATIONS": str(swapped), "IMAGES": registered.images}}}
    with pytest.raises(UserError, match="trained on the classes square, bar, and .* has bar, square"):
        train(trained.replace(keys), resume=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_and_saves(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """Between two reports and before an evaluation that is due, and nothing is lost."""
    cfg = tiny_config.replace({"SOLVER.LOG_PERIOD": 3, "TEST.EVAL_PERIOD": 2, "SOLVER.MAX_ITER": 4})
    train(cfg)
    folder = Path(cfg.output_dir)
    expected = torch.load(folder / "model_final.pth", weights_only=True)
    lines = (folder / "metrics.jsonl").read_text().count("\n")
    real, stop_at = trainer_module.train_step, iter([False, True, False, True])

    def step(*args: object) -> object:
        if next(stop_at, False):
            os.kill(os.getpid(), number)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer_module, "train_step", step)
    for resume in (False, True):
        with pytest.raises(SystemExit) as left:
            train(cfg, resume=resume)
        assert left.value.code == status
    train(cfg, resume=True)
    assert differences(torch.load(folder / "model_final.pth", weights_only=True), expected) == []
    assert (folder / "metrics.jsonl").read_text().count("\n") == lines
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_evaluation_that_fails_costs_no_checkpoint(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is repeated by --resume, and what comes out is the run without the failure."""
    cfg = tiny_config.replace({"SOLVER.CHECKPOINT_PERIOD": 3, "TEST.EVAL_PERIOD": 3})
    folder = Path(cfg.output_dir)
    train(cfg)
    expected = torch.load(folder / "model_final.pth", weights_only=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    real, calls = trainer_module.evaluate_test_sets, iter(range(100))

    def fails_at_first(*args: object) -> object:
        if next(calls) == 0:
            raise UserError("image 3 cannot be read")
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer_module, "evaluate_test_sets", fails_at_first)
    with pytest.raises(UserError, match="image 3"):
        train(cfg)
    assert (folder / "last_checkpoint").read_text() == "model_0000002.pth"
    train(cfg, resume=True)
    assert differences(torch.load(folder / "model_final.pth", weights_only=True), expected) == []
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["iteration"], row.get("segm/AP")) for row in again] == [
        (row["iteration"], row.get("segm/AP")) for row in rows
    ]


def test_a_longer_run_replaces_the_best_only_by_a_better_one(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([35.0, 38.0, 36.0])
    monkeypatch.setattr(
        trainer_module,
        "evaluate_test_sets",
        lambda *_: {"bbox": {"AP": 1.0}, "segm": {"AP": next(values)}},
    )
    cfg = tiny_config.replace({"SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 1, "SOLVER.CHECKPOINT_PERIOD": 1})
    train(cfg)
    train(cfg.replace({"SOLVER.MAX_ITER": 3}), resume=True)
    best = torch.load(Path(cfg.output_dir) / "model_best.pth", weights_only=True)
    assert (best["segm/AP"], best["iteration"]) == (38.0, 1)
    assert next(values, None) is None


def test_an_image_that_cannot_be_read_costs_no_iteration(tiny_config: Config, tmp_path: Path) -> None:
    cfg = tiny_config.replace({"DATASETS.TEST": [], "DATALOADER.NUM_WORKERS": 0})
    loader, dataset = build_train_loader(cfg)
    item = next(islice(loader.batches(), 2, None))[0]
    name = Path(loader.samples[item].file_name)
    content = name.read_bytes()
    try:
        name.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=name.name):
            train(cfg)
    finally:
        name.write_bytes(content)
    folder = Path(cfg.output_dir)
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    train(cfg, resume=True)
    found = torch.load(folder / "model_final.pth", weights_only=True)
    whole = cfg.replace({"OUTPUT_DIR": str(tmp_path / "whole")})
    train(whole)
    expected = torch.load(tmp_path / "whole" / "model_final.pth", weights_only=True)
    assert differences(found["model"], expected["model"]) == []


def test_other_processes_go_on_where_as_many_images_were_seen(trained: Config) -> None:
    path = Path(trained.output_dir) / "model_final.pth"
    cfg = trained.replace({"SOLVER.REFERENCE_WORLD_SIZE": 1, "SOLVER.MAX_ITER": 40})
    assert prepare(cfg, resume=True).start == 5  # it was saved without a reference
    content = torch.load(path, weights_only=True)
    content["config"] = dump_config(scale_config(cfg, 2))
    torch.save(content, path)
    assert prepare(cfg, resume=True).start == 10
