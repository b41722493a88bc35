"""SIGTERM and SIGINT as launchers and terminals send them; see test_checkpoint.py for what is saved."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gn_detect.config import Config, load_config
from gn_detect.distributed import launch
from gn_detect.distributed.group import get_rank
from gn_detect.engine import interruption, train
from gn_detect.engine import trainer as trainer_module
from gn_detect.evaluation import model as evaluation_module
from tests.engine.chaos import TIMINGS, differences, metrics_of
from tests.engine.tiny import write_config

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")


class Gone(BaseException):
    """The process has left without another word."""


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals that this process and its data-loader workers get in the second step."""
    real, steps, signals = trainer_module.train_step, iter(range(100)), list[int]()

    def step(*args: object) -> object:
        if next(steps) == 1:
            for number in signals:
                # From another process: loader workers take a signal of their parent's as a friendly one.
                group = [*multiprocessing.active_children(), multiprocessing.current_process()]
                subprocess.run(["kill", f"-{number}", *(str(process.pid) for process in group)], check=True)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer_module, "train_step", step)
    return signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_whole_group_of_processes_finishes_the_step(
    tiny_config: Config, signals: list[int], number: int, status: int
) -> None:
    """Once from the launcher and once from the terminal, it is one request."""
    signals += [number, number]
    with pytest.raises(SystemExit) as left:
        train(tiny_config.replace({"DATASETS.TEST": [], "DATALOADER.NUM_WORKERS": 1}))
    assert left.value.code == status
    assert (Path(tiny_config.output_dir) / "last_checkpoint").read_text() == "model_0000001.pth"


def test_second_signal_ends_the_process_at_once(
    tiny_config: Config, signals: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(status: int) -> None:
        raise Gone(status)

    monkeypatch.setattr(interruption, "ECHO_SECONDS", -1.0)
    monkeypatch.setattr(interruption.os, "_exit", leave)
    signals += [signal.SIGTERM, signal.SIGINT]
    with pytest.raises(Gone) as left:
        train(tiny_config.replace({"DATASETS.TEST": []}))
    assert left.value.args == (130,)
    assert not (Path(tiny_config.output_dir) / "last_checkpoint").exists()


def stop_at(monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> list[str]:
    """A SIGTERM in an evaluation: at an image, or in COCO's part, endless then. Returns what was done."""
    done, real = list[str](), getattr(evaluation_module, where)

    def called(*args: object) -> object:
        done.append(where)
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGTERM)
            end = time.process_time() + 60
            while where == "evaluate_and_diagnose":
                assert time.process_time() < end, "the signal has not ended the evaluation"
        return real(*args)

    monkeypatch.setattr(evaluation_module, where, called)
    return done


SHORT = {"SOLVER.MAX_ITER": 4, "TEST.EVAL_PERIOD": 2, "SOLVER.LOG_PERIOD": 3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_data: tuple[Path, Path]) -> Path:
    """Folder of a run that gets no signal."""
    cfg = load_config(write_config(tmp_path_factory.mktemp("undisturbed"), *tiny_data)).replace(SHORT)
    train(cfg)
    return Path(cfg.output_dir)


@pytest.mark.parametrize(
    ("where", "number", "last"),
    [
        ("detections_to_coco", 1, "model_0000001.pth"),
        ("evaluate_and_diagnose", 2, "model_final.pth"),
        pytest.param("detections_to_coco", 5, "model_final.pth", marks=pytest.mark.slow),
        pytest.param("evaluate_and_diagnose", 1, "model_0000001.pth", marks=pytest.mark.slow),
    ],
)
def test_signal_in_an_evaluation_ends_it_and_resuming_repeats_it(
    tiny_config: Config,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    number: int,
    last: str,
) -> None:
    """After two iterations, where no checkpoint is due, and at the end."""
    cfg = tiny_config.replace(SHORT)
    folders = [Path(cfg.output_dir), undisturbed]
    done = stop_at(monkeypatch, where, number)
    with pytest.raises(SystemExit) as left:
        train(cfg)
    assert left.value.code == 143
    assert len(done) == number, "the rest of the images is left out"
    monkeypatch.undo()
    assert (folders[0] / "last_checkpoint").read_text() == last
    assert not list(folders[0].rglob("*.tmp"))
    train(cfg, resume=True)
    finals = [torch.load(folder / "model_final.pth", weights_only=True) for folder in folders]
    assert differences(*finals) == []
    assert metrics_of(folders[0].parent) == [
        {key: value for key, value in row.items() if key not in TIMINGS}
        for row in map(json.loads, (folders[1] / "metrics.jsonl").read_text().splitlines())
    ]


def _stopped_in_an_evaluation(cfg: Config, rank: int) -> None:
    """Runs in each of two processes; one of them alone gets the signal."""
    if get_rank() == rank:
        stop_at(pytest.MonkeyPatch(), "detections_to_coco", 2)
    train(cfg)


@pytest.mark.usefixtures("quick_launch")
@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_leave_an_evaluation_together(tiny_config: Config, rank: int) -> None:
    """Also the one that had fewer images, and waits."""
    cfg = tiny_config.replace({"SOLVER.MAX_ITER": 1, "DATASETS.TEST": ["tiny_train"]})
    with pytest.raises(SystemExit) as left:
        launch(_stopped_in_an_evaluation, (cfg, rank), device="cpu", num_gpus=2)
    assert left.value.code == 143
    folder = Path(cfg.output_dir)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert not (folder / "results.json").exists()
    assert "SIGTERM: during an evaluation; --resume repeats it" in (folder / "log.txt").read_text()
