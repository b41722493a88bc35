"""Failures in the middle of a run give one clear line, and the newest good checkpoint stays."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gn_detect.config import Config, load_config
from gn_detect.data import build_train_loader
from gn_detect.distributed import launch
from gn_detect.distributed.group import barrier, get_rank
from gn_detect.distributed.launch import LOST_PEER
from gn_detect.engine import train
from gn_detect.engine import trainer as trainer_module
from gn_detect.engine.interruption import Interruption
from gn_detect.engine.metrics import Meter, MetricsWriter
from gn_detect.engine.step import compile_help, make_state, train_step
from gn_detect.errors import UserError
from gn_detect.files import atomic_write
from gn_detect.modeling import build_model
from gn_detect.weights import checkpoint as weights_checkpoint
from tests.engine.tiny import make_dataset, write_config

KEYS = {"DATASETS.TEST": [], "SOLVER.CHECKPOINT_PERIOD": 1, "SOLVER.MAX_ITER": 4, "SOLVER.LOG_PERIOD": 1}


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", "--recursive", str(folder)], check=False)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Arranges that something happens before a step, counted from 0."""

    def arrange(number: int, happen: Callable[[], object]) -> None:
        real, steps = trainer_module.train_step, iter(range(1000))

        def step(*args: object) -> object:
            if next(steps) == number:
                happen()
            return real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(trainer_module, "train_step", step)

    return arrange


def fails(cfg: Config, message: str) -> None:
    """Training ends with one line, and the newest checkpoint can be read."""
    with pytest.raises(UserError, match=message) as caught:
        train(cfg)
    assert "\n" not in str(caught.value)
    folder = Path(cfg.output_dir)
    last = folder / (folder / "last_checkpoint").read_text()
    assert torch.load(last, weights_only=True)["iteration"] >= 0
    assert not list(folder.glob(".*.tmp"))


def test_disk_full(tiny_config: Config, mounted: Path, at_step: Callable) -> None:
    cfg = tiny_config.replace({**KEYS, "OUTPUT_DIR": str(mounted / "run")})

    def fill() -> None:
        with pytest.raises(OSError), (mounted / "filler").open("wb") as file:
            file.write(b"0" * 2**23)

    at_step(2, fill)
    fails(
        cfg, "cannot write .*/run/model_0000002.pth: No space left on device; make room; nothing was changed$"
    )


def test_folder_that_becomes_read_only(tiny_config: Config, mounted: Path, at_step: Callable) -> None:
    """As by a remount after an error of the disk; files that are open already can still be written."""
    cfg = tiny_config.replace({**KEYS, "OUTPUT_DIR": str(mounted / "run")})

    def protect() -> None:
        for options in (["--bind", cfg.output_dir], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *options, cfg.output_dir], check=True)

    at_step(2, protect)
    fails(cfg, r"cannot write .*/run/model_0000002\.pth: Read-only file system; choose another folder")


def test_read_only_folder_is_refused_at_the_start(tiny_config: Config, mounted: Path) -> None:
    (mounted / "run").mkdir()
    if subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=False).returncode:
        pytest.skip("this system does not remount file systems")
    cfg = tiny_config.replace({**KEYS, "OUTPUT_DIR": str(mounted / "run")})
    with pytest.raises(UserError, match="cannot write .*config.yaml: Read-only file system; choose another"):
        train(cfg)


@pytest.mark.parametrize("evaluates", [False, True])
def test_deleted_folder_ends_the_run_and_loses_no_iteration(
    tiny_config: Config, at_step: Callable, monkeypatch: pytest.MonkeyPatch, evaluates: bool
) -> None:
    """In training, and in the final evaluation, which makes folders for what it writes."""
    cfg = tiny_config.replace(KEYS)
    folder = Path(cfg.output_dir)
    if evaluates:
        cfg = tiny_config.replace({"SOLVER.MAX_ITER": 2})
        real = trainer_module.evaluate_test_sets

        def evaluate(*args: object) -> object:
            shutil.rmtree(folder)
            return real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(trainer_module, "evaluate_test_sets", evaluate)
    else:
        at_step(2, lambda: shutil.rmtree(folder))
    fails(
        cfg, "OUTPUT_DIR .*/run was deleted while the run went on.*after iteration [23]: --resume continues"
    )
    monkeypatch.undo()
    assert "MAX_ITER" in (folder / "config.yaml").read_text()
    steps = []
    monkeypatch.setattr(trainer_module, "train_step", lambda *args: steps.append(1) or train_step(*args))
    train(cfg, resume=True)
    assert len(steps) == (0 if evaluates else 1)
    assert (folder / "model_final.pth").is_file()


def test_deleted_metrics_are_begun_again(
    tiny_config: Config, at_step: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = tiny_config.replace(KEYS)
    folder = Path(cfg.output_dir)
    at_step(2, lambda: (folder / "metrics.jsonl").unlink())
    train(cfg)
    assert "was deleted; it is written anew" in caplog.text
    assert (folder / "model_final.pth").is_file()
    assert (folder / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of a file's size")
@pytest.mark.parametrize(
    ("length", "value", "name"), [(1, 0.5, "events.out.tfevents.*"), (40, 0.1 + 0.2, "metrics.jsonl")]
)
def test_message_names_the_file_that_could_not_be_written(
    tmp_path: Path, length: int, value: float, name: str
) -> None:
    """Short lines are longer as TensorBoard's records, long numbers are longer in JSON."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(MetricsWriter(tmp_path, 0)) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            with pytest.raises(
                UserError, match=f"cannot write .*/{name}: File too large; make room, then --resume$"
            ):
                for iteration in range(100):
                    writer.write(iteration, {f"loss_{i}": value for i in range(length)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def own_config(tmp_path: Path) -> Config:
    """Its data may be spoiled."""
    return load_config(write_config(tmp_path, make_dataset(tmp_path / "train", 6, seed=1))).replace(KEYS)


def images_of(cfg: Config) -> list[Path]:
    return sorted(Path(cfg.datasets.registered["tiny_train"].images).iterdir())


def test_image_that_vanishes(own_config: Config, at_step: Callable) -> None:
    cfg = own_config.replace({"DATALOADER.NUM_WORKERS": 0, "SOLVER.MAX_ITER": 30})
    at_step(1, lambda: [path.unlink() for path in images_of(cfg)])
    fails(cfg, r"image .*\d.png is missing; restore it")


def test_image_that_becomes_corrupt(own_config: Config, at_step: Callable) -> None:
    """Read by a worker, whose error the training reports."""
    cfg = own_config.replace({"DATALOADER.NUM_WORKERS": 1, "SOLVER.MAX_ITER": 30})
    at_step(1, lambda: [os.truncate(path, 500) for path in images_of(cfg)])
    fails(cfg, r"cannot read image .*\d.png")


def kill_workers() -> None:
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGKILL)


WORKER_DIED = r"a data-loader worker died .*DATALOADER.NUM_WORKERS \(1\); --resume"


def test_killed_worker(own_config: Config, at_step: Callable) -> None:
    cfg = own_config.replace({"DATALOADER.NUM_WORKERS": 1, "SOLVER.MAX_ITER": 60})
    at_step(1, kill_workers)
    fails(cfg, WORKER_DIED)


def test_worker_killed_while_a_checkpoint_is_written(
    own_config: Config, at_step: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is finished first. (PyTorch's own handler would raise in the middle of the writing.)"""
    cfg = own_config.replace({"DATALOADER.NUM_WORKERS": 1, "SOLVER.MAX_ITER": 60})

    @contextmanager
    def slow_disk(path: Path, mode: str) -> Iterator[SimpleNamespace]:
        with atomic_write(path, mode) as file:

            def write(content: bytes) -> int:
                if multiprocessing.active_children() and len(content) > 1000:
                    kill_workers()
                    time.sleep(0.3)  # until the signal
                return file.write(content)

            yield SimpleNamespace(write=write, flush=file.flush)

    at_step(3, lambda: monkeypatch.setattr(weights_checkpoint, "atomic_write", slow_disk))
    fails(cfg, WORKER_DIED)
    assert (Path(cfg.output_dir) / "last_checkpoint").read_text() == "model_0000003.pth"


@pytest.mark.parametrize(
    "milliseconds",
    [0, 30, *(pytest.param(wait, marks=pytest.mark.slow) for wait in (10, 20, 40, 50))],
)
def test_worker_killed_at_any_time(own_config: Config, at_step: Callable, milliseconds: int) -> None:
    """While its batch is received, too, where its connection breaks before it counts as dead."""
    cfg = own_config.replace({"DATALOADER.NUM_WORKERS": 1, "SOLVER.MAX_ITER": 200})
    at_step(2, threading.Timer(milliseconds / 1000, kill_workers).start)
    fails(cfg, WORKER_DIED)


def test_signal_handlers_are_left_as_they_were(tiny_config: Config) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    loader, _ = build_train_loader(tiny_config.replace({"DATALOADER.NUM_WORKERS": 1}))
    assert next(iter(loader))
    assert signal.getsignal(signal.SIGCHLD) is before


def test_out_of_gpu_memory_names_the_batch_and_the_keys(tiny_config: Config) -> None:
    model = build_model(tiny_config)
    loader, _ = build_train_loader(tiny_config)

    def forward(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    state = make_state(tiny_config, model)
    model.forward = forward  # type: ignore[method-assign, assignment]
    with pytest.raises(UserError) as caught:
        train_step(tiny_config, model, next(iter(loader)), state)
    message = str(caught.value)
    for words in (
        "out of GPU memory in the forward pass: 2 images", "the largest 80x64", "4 instances (2 in one image",
        "SOLVER.ACCUMULATE auto", "ACTIVATION_CHECKPOINTING", "AMP.ENABLED", "INPUT.MAX_SIZE_TRAIN (96)",
    ):  # fmt: skip
        assert words in message


def _die(folder: str) -> None:
    """Runs in each of two processes: one is killed, the other gets a signal and waits for it."""
    with Interruption() as interruption:
        barrier()
        os.kill(os.getpid(), signal.SIGKILL if get_rank() == 1 else signal.SIGTERM)
        try:
            while True:
                interruption.requested()
        except RuntimeError as error:
            (Path(folder) / "noticed.txt").write_text(str(error))
            raise


@pytest.mark.usefixtures("quick_launch")
def test_killed_process_ends_the_others(tmp_path: Path) -> None:
    """Also one with a signal does not wait for the dead to finish the step."""
    with pytest.raises(UserError, match="process 1 of this machine was killed by SIGKILL.*--resume"):
        launch(_die, (str(tmp_path),), device="cpu", num_gpus=2)
    assert any(words in (tmp_path / "noticed.txt").read_text() for words in LOST_PEER)


def _cannot_save(parent: int) -> None:
    """Told to stop, by way of the parent, and then the disk is full."""
    with Interruption() as interruption:
        barrier()
        if get_rank() == 0:
            os.kill(parent, signal.SIGTERM)
        while not interruption.requested():
            time.sleep(0.01)
    if get_rank() == 0:
        raise UserError("cannot-write", "cannot write model_0000003.pth: no space left")


@pytest.mark.usefixtures("quick_launch")
def test_a_failure_while_stopping_is_reported(tmp_path: Path) -> None:
    """Status 143 means that a checkpoint was saved."""
    with pytest.raises(UserError, match="cannot write model_0000003.pth"):
        launch(_cannot_save, (os.getpid(),), device="cpu", num_gpus=2)


@pytest.mark.parametrize("what", ["stop", "skip"])
def test_waiting_for_the_device_counts_as_time_of_training(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Reading the losses waits for all steps before."""
    paused, read = [], Meter._read
    pause = Meter.pause

    @contextmanager
    def noted(meter: Meter) -> Iterator[None]:
        with pause(meter):
            paused.append(True)
            yield
            paused.pop()

    def reads(meter: Meter) -> None:
        assert not (paused and meter._losses)
        read(meter)

    monkeypatch.setattr(Meter, "pause", noted)
    monkeypatch.setattr(Meter, "_read", reads)
    train(tiny_config.replace({"SOLVER.NON_FINITE": what, "SOLVER.CHECKPOINT_PERIOD": 2}))


@pytest.mark.slow
def test_a_compiler_that_fails_is_named_with_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small function stands for the detector, which takes a minute."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with (
        pytest.raises(UserError, match=r"MODEL.COMPILE True, .*no-such-compiler.*MODEL.COMPILE False"),
        compile_help(),
    ):
        torch.compile(lambda x: x.sin() + 1)(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="of another kind"), compile_help():
        raise RuntimeError("of another kind")
