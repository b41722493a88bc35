"""Checkpoints that are damaged, missing or too many."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch

from gn_detect.config import Config, dump_config, load_config
from gn_detect.data import build_train_loader
from gn_detect.engine import train
from gn_detect.engine import trainer as trainer_module
from gn_detect.engine.checkpoint import read_last_checkpoint
from gn_detect.engine.metrics import MetricsWriter
from gn_detect.engine.optimizer import scale_config
from gn_detect.engine.run import prepare
from gn_detect.errors import UserError
from gn_detect.visualize import is_average, is_loss, read_metrics
from gn_detect.weights import read_checkpoint
from tests.engine.chaos import differences
from tests.engine.tiny import write_config


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: tuple[Path, Path]) -> Config:
    """A run of five iterations with a checkpoint after each, for :func:`finished`."""
    cfg = load_config(write_config(tmp_path_factory.mktemp("finished"), *tiny_data))
    keys = {"DATASETS.TEST": [], "SOLVER.MAX_ITER": 5, "SOLVER.CHECKPOINT_PERIOD": 1, "CHECKPOINT.KEEP": 3}
    train(cfg := cfg.replace(keys))
    return cfg


@pytest.fixture
def finished(finished_run: Config, tmp_path: Path) -> Config:
    """A copy of a finished run, which a test may spoil; its checkpoints name the folder of the first."""
    shutil.copytree(finished_run.output_dir, tmp_path / "run")
    return finished_run.replace({"OUTPUT_DIR": str(tmp_path / "run")})


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_the_last_ones_are_kept(finished: Config) -> None:
    names = sorted(path.name for path in Path(finished.output_dir).glob("model_*.pth"))
    assert names == ["model_0000002.pth", "model_0000003.pth", "model_final.pth"]


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, os.unlink, *(pytest.param(damage, marks=pytest.mark.slow) for damage in (truncate, empty))],
)
def test_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    finished: Config, damage, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(finished.output_dir)
    expected = torch.load(folder / "model_final.pth", weights_only=True)
    damage(folder / "model_final.pth")
    there = (folder / "model_final.pth").exists()
    with caplog.at_level(logging.INFO, logger="gn_detect"):
        train(finished, resume=True)
    assert "model_final.pth is passed over" in caplog.text
    assert "model_0000003.pth at iteration 4" in caplog.text
    assert (folder / "model_final.pth.damaged").exists() == there
    assert differences(torch.load(folder / "model_final.pth", weights_only=True), expected) == []


def test_no_readable_checkpoint_is_an_error(finished: Config) -> None:
    for path in Path(finished.output_dir).glob("model_*.pth"):
        truncate(path)
    with pytest.raises(UserError, match="no checkpoint in .* can be read .*model_final.pth"):
        train(finished, resume=True)


def test_leftovers_of_a_killed_process_are_removed(finished: Config) -> None:
    folder = Path(finished.output_dir)
    (folder / "inference/val").mkdir(parents=True)
    leftovers = [folder / ".model_0000003.pth.abc.tmp", folder / "inference/val/.results.json.abc.tmp"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    train(finished, resume=True)
    assert not any(leftover.exists() for leftover in leftovers)


def test_what_an_earlier_run_found_best_is_not_taken_for_this_ones(finished: Config) -> None:
    folder = Path(finished.output_dir)
    (folder / "model_best.pth").write_bytes(b"of an earlier run")
    (folder / "pictures" / "val_7.png").write_bytes(b"of an earlier run")
    kept = {
        name: (folder / name).read_bytes() for name in ("metrics.jsonl", "model_final.pth", "config.yaml")
    }
    for name in ("inference", "inference.earlier"):
        (folder / name / "val").mkdir(parents=True)
        (folder / name / "val/results.json").write_text(name)
    train(finished.replace({"SOLVER.MAX_ITER": 3}))
    assert not (folder / "inference").exists()
    assert (folder / "inference.earlier/val/results.json").read_text() == "inference"
    assert not (folder / "model_best.pth").exists(), "this one evaluated nothing"
    assert (folder / "model_best.pth.earlier").read_bytes() == b"of an earlier run"
    assert all((folder / f"{name}.earlier").read_bytes() == content for name, content in kept.items())
    assert "MAX_ITER: 3" in (folder / "config.yaml").read_text()
    assert [path.name for path in folder.glob("pictures*/val_*")] == ["val_7.png"]
    assert (folder / "pictures.earlier" / "val_7.png").is_file()
    assert "holds an earlier run" in (folder / "log.txt").read_text()
    train(finished.replace({"DATASETS.TEST": list(finished.datasets.train)}))
    best = (folder / "model_best.pth").read_bytes()
    train(finished.replace({"DATASETS.TEST": list(finished.datasets.train)}), resume=True)
    assert len(best) == (folder / "model_best.pth").stat().st_size


def test_classes_in_another_order_are_not_resumed(finished: Config, tmp_path: Path) -> None:
    (name,) = finished.datasets.train
    registered = finished.datasets.registered[name]
    content = json.loads(Path(registered.annotations).read_text())
    first, second = content["categories"]
    first["name"], second["name"] = second["name"], first["name"]
    swapped = tmp_path / "swapped.json"
    swapped.write_text(json.dumps(content))
    keys = {"DATASETS.REGISTER": {name: {"ANNOTATIONS": str(swapped), "IMAGES": registered.images}}}
    with pytest.raises(UserError, match="trained on the classes square, bar, and .* has bar, square"):
        train(finished.replace(keys), resume=True)


def test_a_signal_finishes_the_step_and_saves(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two reports and before an evaluation that is due, and nothing is lost."""
    cfg = tiny_config.replace({"SOLVER.LOG_PERIOD": 3, "TEST.EVAL_PERIOD": 2, "SOLVER.MAX_ITER": 4})
    train(cfg)
    folder = Path(cfg.output_dir)
    expected = torch.load(folder / "model_final.pth", weights_only=True)
    lines = (folder / "metrics.jsonl").read_text().count("\n")
    real, stop_at = trainer_module.train_step, iter([None, signal.SIGTERM, None, signal.SIGINT])

    def step(*args: object) -> object:
        if (number := next(stop_at, None)) is not None:
            os.kill(os.getpid(), number)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer_module, "train_step", step)
    for resume, status in ((False, 143), (True, 130)):
        with pytest.raises(SystemExit) as left:
            train(cfg, resume=resume)
        assert left.value.code == status
    train(cfg, resume=True)
    assert differences(torch.load(folder / "model_final.pth", weights_only=True), expected) == []
    assert (folder / "metrics.jsonl").read_text().count("\n") == lines
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
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
            raise UserError("unreadable-image", "image 3 cannot be read")
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


def test_other_processes_go_on_where_as_many_images_were_seen(finished: Config) -> None:
    path = Path(finished.output_dir) / "model_final.pth"
    cfg = finished.replace({"SOLVER.REFERENCE_WORLD_SIZE": 1, "SOLVER.MAX_ITER": 40})
    assert prepare(cfg, resume=True).start == 5  # it was saved without a reference
    content = torch.load(path, weights_only=True)
    content["config"] = dump_config(scale_config(cfg, 2))
    torch.save(content, path)
    assert prepare(cfg, resume=True).start == 10


OUTSIDE = ["../../victim.pth", "{tmp}/victim.pth", "..", "sub/model_0000001.pth", "model\x07.pth", "\xff\xfe"]


@pytest.mark.parametrize(
    ("listing", "name"),
    [
        *(("last_checkpoint", name) for name in [*OUTSIDE, "model_final.pth\n../../victim.pth", ""]),
        ("checkpoints.txt", OUTSIDE[0]),
        ("checkpoints.txt", "model_final.pth\n../../victim.pth"),
    ],
)
def test_lists_of_checkpoints_name_files_of_the_folder_alone(
    finished: Config, tmp_path: Path, name: str, listing: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(finished.output_dir)
    victim = tmp_path / "victim.pth"
    victim.write_bytes(b"of somebody else")
    (folder / listing).write_text(name.format(tmp=tmp_path), encoding="latin1")
    checkpoint = read_last_checkpoint(folder, set_aside=True)
    assert checkpoint is not None
    assert checkpoint.path == folder / "model_final.pth"
    assert victim.read_bytes() == b"of somebody else"
    assert not list(tmp_path.glob("*.damaged"))
    assert (folder / f"{listing}.damaged").is_file()
    assert f"{listing} is damaged, and passed over" in caplog.text
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_a_checkpoint_of_another_program_has_any_plain_name(finished: Config) -> None:
    folder = Path(finished.output_dir)
    torch.save(torch.load(folder / "model_final.pth", weights_only=True), folder / "epoch-3.pth")
    (folder / "checkpoints.txt").unlink()
    (folder / "last_checkpoint").write_text("epoch-3.pth\n")
    checkpoint = read_last_checkpoint(folder, set_aside=True)
    assert checkpoint is not None
    assert checkpoint.path.name == "epoch-3.pth"


def test_without_its_lists_a_folder_has_the_newest_of_its_checkpoints(finished: Config) -> None:
    folder = Path(finished.output_dir)
    for damage in ("", "/"):
        for listing in ("last_checkpoint", "checkpoints.txt"):
            (folder / listing).write_text(damage)
        newer = torch.load(folder / "model_final.pth", weights_only=True) | {"iteration": 7}
        torch.save(newer, folder / "model_0000007.pth")  # of a longer run than that of model_final.pth
        checkpoint = read_last_checkpoint(folder, set_aside=True)
        assert checkpoint is not None
        assert checkpoint.path.name == "model_0000007.pth"


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoints_that_a_kill_left_are_dropped_later(finished: Config, keep: int) -> None:
    folder = Path(finished.output_dir)
    shutil.copy(folder / "model_0000002.pth", folder / "model_0000001.pth")
    others = [folder / "model_0000009.pth", folder / "own.pth"]  # in no list
    for other in others:
        other.write_bytes(b"of the user")
    names = ["model_0000001.pth", "model_0000002.pth", "model_0000003.pth", "model_final.pth"]
    (folder / "checkpoints.txt").write_text("".join(f"{name}\n" for name in names))
    train(finished.replace({"CHECKPOINT.KEEP": keep}), resume=True)
    found = sorted(path.name for path in folder.glob("*.pth"))
    assert found == sorted([*names[-keep:], *(other.name for other in others)])
    assert (folder / "checkpoints.txt").read_text().split() == names[-keep:]


@pytest.mark.slow
def test_a_damaged_bit_never_loads_something_else(
    finished: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bit may be in content, headers, the directory or the lists."""
    monkeypatch.setattr("gn_detect.files.os.fsync", lambda _: None)
    folder, choose = Path(finished.output_dir), random.Random(1)
    files = ["model_final.pth"] * 3 + ["last_checkpoint", "checkpoints.txt", "metrics.jsonl"]
    content = {name: (folder / name).read_bytes() for name in files}
    whole = {path.name: read_checkpoint(path) for path in folder.glob("model_*.pth")}
    for number in range(240):
        name = files[number % len(files)]
        damaged = bytearray(content[name])
        near_an_end = choose.choice([choose.randrange(2000), -1 - choose.randrange(20000)])
        place = near_an_end if number % 2 and name == "model_final.pth" else choose.randrange(len(damaged))
        damaged[place] ^= 1 << choose.randrange(8)
        (folder / name).write_bytes(bytes(damaged))
        caplog.clear()
        if name == "metrics.jsonl":
            MetricsWriter(folder, 5).close()
        found = read_last_checkpoint(folder, set_aside=True)
        assert found is not None
        expected = whole[found.path.name]
        assert differences(found.tensors, expected.tensors) == []
        assert differences(found.metadata.to_dict(), expected.metadata.to_dict()) == []
        if name == "model_final.pth":
            assert found.path.name == "model_0000003.pth"
            assert "model_final.pth is passed over" in caplog.text
            with pytest.raises(UserError) as caught:
                (folder / f"{name}.damaged").rename(folder / "moved.pth")
                read_checkpoint(folder / "moved.pth")
            assert "\n" not in str(caught.value)
        for name, data in content.items():
            (folder / name).write_bytes(data)


def test_sums_of_files_of_other_programs_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    torch.save({"model": {"weight": torch.zeros(5000)}}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(
        UserError, match=r"theirs\.pth is damaged at theirs/data/0; copy or download it again"
    ):
        read_checkpoint(path)


def test_an_interrupted_first_attempt_is_not_an_earlier_run(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first checkpoint and begun again with --resume, it leaves nothing aside."""
    cfg = tiny_config.replace({"SOLVER.LOG_PERIOD": 1, "SEED": -1, "TEST.EVAL_PERIOD": 2})
    folder = Path(cfg.output_dir)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "evaluate_test_sets", killed)
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    monkeypatch.undo()
    train(cfg, resume=True)
    assert not list(folder.glob("*.earlier"))
    train(cfg.replace({"SOLVER.BASE_LR": 0.5}))
    assert (folder / "model_final.pth.earlier").is_file()


@pytest.mark.parametrize("period", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_evaluation_that_was_killed_changes_no_checkpoint(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, period: int, tmp_path: Path
) -> None:
    """Its repetition saves what the undisturbed run would have saved, the rate included."""
    keys = {"SOLVER.CHECKPOINT_PERIOD": 2, "TEST.EVAL_PERIOD": period, "SOLVER.MAX_ITER": 4}
    cfg = tiny_config.replace(keys)
    whole = tmp_path / "whole"
    train(cfg.replace({"OUTPUT_DIR": str(whole)}))
    real, calls = trainer_module.evaluate_test_sets, iter(range(9))

    def killed(*args: object) -> object:
        if next(calls) % 2 == 0:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer_module, "evaluate_test_sets", killed)
    for attempt in range(4):
        try:
            train(cfg, resume=attempt > 0)
        except KeyboardInterrupt:
            continue
        break
    for name in ("model_0000001.pth", "model_final.pth"):
        one, other = (torch.load(f / name, weights_only=True) for f in (whole, Path(cfg.output_dir)))
        assert differences(one, other) == []


def test_a_category_may_be_called_as_a_loss(tmp_path: Path) -> None:
    """No line of an evaluation that is repeated is left."""
    names = ("total_loss", "iteration", "lr", "a/AP")
    training = {"total_loss": 1.0, "loss_cls": 1.0, "lr": 0.1}
    evaluation = {"bbox/AP": 5.0, **{f"bbox/AP-{name}": 5.0 for name in names}}
    for attempt in range(3):
        with closing(MetricsWriter(tmp_path, attempt and 4, evaluate_again=attempt > 0)) as writer:
            if attempt == 0:
                writer.write(3, training)
            writer.write(3, evaluation)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [*map(json.loads, lines)] == [{"iteration": 3, **training}, {"iteration": 3, **evaluation}]
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics.names == ["iteration", *training, *evaluation]
    assert [name for name in metrics.names if is_average(name, "AP")] == ["bbox/AP"]
    assert [name for name in ("loss_a/bbox/AP", *training) if is_loss(name)] == ["total_loss", "loss_cls"]


@pytest.mark.parametrize(
    "damage", ["[" * 5000, "10**9", '{"iteration": 1' + "0" * 400 + "}", '{"iteration": "1"}']
)
def test_damaged_lines_of_metrics_are_left_out_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"iteration": i, "total_loss": 1.0}) for i in range(4)]
    path.write_bytes(
        "\n".join([good[0], damage, good[1], ""]).encode() + b"\xff\x80\n" + good[3].encode() + b"\n"
    )
    MetricsWriter(tmp_path, 3).close()
    assert path.read_text().splitlines() == good[:2]
    assert "metrics.jsonl: 2 lines are damaged, and left out" in caplog.text
