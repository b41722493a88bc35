"""Two trainings in one folder, and an evaluation during a training."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gn_detect.cli import main
from gn_detect.config import Config, dump_config
from gn_detect.distributed import launch
from gn_detect.engine import train
from gn_detect.engine.folder_lock import LOCK, FolderLock, is_in_use
from gn_detect.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")

SHORT = {"DATASETS.TEST": [], "SOLVER.MAX_ITER": 1}


@contextmanager
def another_training(folder: Path, patience: float = 0.0) -> Iterator[int]:
    """A process that holds the folder, with a child of its own that outlives it by far."""
    folder.mkdir(parents=True, exist_ok=True)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = os.fork()
    if process == 0:
        with FolderLock(folder) as lock:
            lock.take(patience)
            child = os.fork()
            if child:
                sender.send(child)
            while True:
                time.sleep(60)
    child = receiver.recv()
    try:
        yield process
    finally:
        for number in (process, child):
            os.kill(number, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come at once."""
    monkeypatch.setattr(FolderLock.take, "__defaults__", (0.3,))


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_is_refused_with_the_firsts_host_and_process(
    tiny_config: Config, resume: bool
) -> None:
    folder = Path(tiny_config.output_dir)
    with another_training(folder) as process:
        (folder / ".model_final.pth.x.tmp").write_bytes(b"half")
        (folder / "last_checkpoint").write_text("../../model.pth")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(
            UserError, match=rf"run is in use by another training \(process {process} on \S+\)"
        ):
            train(tiny_config.replace(SHORT), resume=resume)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_lock_that_a_killed_run_left_locks_nothing(tiny_config: Config) -> None:
    """Also while a process that it forked still lives."""
    folder = Path(tiny_config.output_dir)
    with another_training(folder) as process:
        assert is_in_use(folder)
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        assert (folder / LOCK).read_text().startswith(f"process {process} on ")
        train(tiny_config.replace(SHORT))
    assert (folder / "model_final.pth").is_file()
    assert not is_in_use(folder)


def test_a_process_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as first, FolderLock(tmp_path) as second:
        first.take()
        threading.Timer(0.5, first.release).start()
        second.take(patience=20)
        assert second.is_held


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError()])
def test_where_nothing_can_be_locked_the_run_warns_and_goes_on(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(fcntl, "flock", fails)
    folder = Path(tiny_config.output_dir)
    folder.mkdir()
    (folder / ".leftover.x.tmp").write_bytes(b"of another run, perhaps")
    with caplog.at_level(logging.WARNING, logger="gn_detect"):
        train(tiny_config.replace(SHORT))
    assert "cannot lock" in caplog.text
    assert "see to it that no other run uses it" in caplog.text
    assert (folder / "model_final.pth").is_file()
    assert (folder / ".leftover.x.tmp").exists()


def test_eval_during_a_training_leaves_its_results(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config.replace({"SOLVER.MAX_ITER": 1})
    folder = Path(cfg.output_dir)
    train(cfg)
    (folder / ".model_0000003.pth.x.tmp").write_bytes(b"half")
    own = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}
    config = tmp_path / "eval.yaml"
    config.write_text(dump_config(cfg))
    command = ["eval", "--json", "--config-file", str(config), "--weights", str(folder / "model_final.pth")]
    with another_training(folder):
        assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["results"].keys() == {"bbox", "segm", "diagnosis"}
    assert {path: path.read_bytes() for path in own} == own
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    written -= {str(path.relative_to(folder)) for path in own}
    names = ("coco_instances_results.json", "results.json")
    assert written == {LOCK, *(f"inference/tiny_test/eval/{name}" for name in names)}


def test_a_lock_of_another_user_that_can_only_be_read_counts(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str | Path, flags: int, *rest: int, **options: Any) -> int:
        if Path(path).name == LOCK and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *rest, **options)

    with another_training(Path(tiny_config.output_dir)) as process:
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(UserError, match=rf"is in use by another training \(process {process} on "):
            train(tiny_config.replace(SHORT))


def test_those_who_ask_at_once_are_not_taken_for_a_training(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as in another process that asks
        assert not is_in_use(tmp_path)
        assert not is_in_use(tmp_path), "asking leaves nothing"
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert is_in_use(tmp_path)


def _train(cfg: Config) -> None:
    train(cfg)


@pytest.mark.slow
def test_all_processes_of_a_refused_run_end(tiny_config: Config) -> None:
    with (
        another_training(Path(tiny_config.output_dir)),
        pytest.raises(UserError, match="is in use by another training"),
    ):
        launch(_train, (tiny_config.replace(SHORT),), device="cpu", num_gpus=2)
