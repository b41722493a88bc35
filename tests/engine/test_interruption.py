"""SIGTERM and SIGINT as launchers and terminals send them; see test_checkpoint.py for what is saved."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gn_detect.config import Config
from gn_detect.engine import interruption, train
from gn_detect.engine import trainer as trainer_module

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")


class Gone(BaseException):
    """The process has left without another word."""


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What this process, and its data-loader workers, get in the second step."""
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
