"""Loggers get the rows of metrics.jsonl, each once, and neither disturb nor end a training."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gn_detect.cli import main
from gn_detect.config import Config
from gn_detect.distributed import launch
from gn_detect.engine import loggers, train
from gn_detect.engine.loggers import Loggers
from tests.engine.chaos import TIMINGS, differences
from tests.refusal import refusal

Rows = dict[int, dict[str, float]]

KEYS = {"SOLVER.MAX_ITER": 6, "SOLVER.LOG_PERIOD": 1, "SOLVER.CHECKPOINT_PERIOD": 2, "TEST.EVAL_PERIOD": 4}


def rows_of(cfg: Config) -> Rows:
    """The rows that a logger should have: the lines of metrics.jsonl by iteration, without null."""
    rows: Rows = {}
    for line in map(json.loads, (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()):
        row = rows.setdefault(line.pop("iteration"), {})
        row |= {key: value for key, value in line.items() if value is not None}
    return rows


class Recorder:
    """A library that keeps its runs in memory, and refuses a step twice."""

    runs: dict[str, list[tuple[int, dict[str, float]]]]
    configs: list[dict[str, Any]]
    ends: list[bool]
    fails_at: int | None

    def __init__(self, cfg: Config, id: str | None) -> None:
        self.id, self.place = id or f"run-{len(self.runs)}", "memory"
        self._rows = self.runs.setdefault(self.id, [])
        self.configs.append(loggers._public(cfg))
        self.last = self._rows[-1][0] if self._rows else -1

    def write(self, step: int, row: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("no answer\nfrom the server")
        assert step > max((known for known, _ in self._rows), default=-1)
        self._rows.append((step, dict(row)))

    def close(self, finished: bool) -> None:
        self.ends.append(finished)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """In the place of W&B."""
    members = {"runs": {}, "configs": [], "ends": [], "fails_at": None}
    stand_in = type("Stand", (Recorder,), members)
    monkeypatch.setitem(loggers.KINDS, "wandb", stand_in)
    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    return stand_in


@pytest.fixture
def cfg(tiny_config: Config) -> Config:
    return tiny_config.replace({**KEYS, "LOGGERS": ["wandb"]})


def differing(first: Config, second: Config) -> list[str]:
    """Weights, optimizer and the like of two runs that are not equal, bit for bit."""
    finals = [torch.load(Path(c.output_dir) / "model_final.pth", weights_only=True) for c in (first, second)]
    return differences(*finals)


def test_a_logger_gets_config_and_metrics_and_changes_nothing(cfg: Config, recorder: type[Recorder]) -> None:
    train(cfg)
    assert {id: dict(rows) for id, rows in recorder.runs.items()} == {"run-0": rows_of(cfg)}
    assert recorder.ends == [True]
    assert json.loads((Path(cfg.output_dir) / "loggers.json").read_text()) == {"wandb": "run-0"}
    (config,) = recorder.configs
    assert config["SOLVER"]["MAX_ITER"] == 6
    assert config["DATASETS"]["REGISTER"]["tiny_train"]["ANNOTATIONS"] == "annotations.json"
    assert str(Path(cfg.output_dir).parent) not in json.dumps(config)

    without = cfg.replace({"LOGGERS": [], "OUTPUT_DIR": f"{cfg.output_dir}-without"})
    train(without)
    assert [place for place in differing(cfg, without) if "config" not in place] == []
    assert not (Path(without.output_dir) / "loggers.json").exists()


def test_the_config_is_sent_without_folders_and_secrets(tiny_config: Config, tmp_path: Path) -> None:
    """In detectron2's configs keys that nothing reads may hold paths, too."""
    cfg = tiny_config.replace(
        {
            "MODEL.WEIGHTS": "https://me:secret@host.org/r18.pth?token=secret#secret",
            "DATASETS.ROOT": str(tmp_path),
            "DATASETS.PROPOSAL_FILES_TRAIN": [str(tmp_path / "proposals.pkl")],
        }
    )
    config = loggers._public(cfg)
    assert config["MODEL"]["WEIGHTS"] == "https://host.org/r18.pth"
    assert "secret" not in json.dumps(config)
    assert str(tmp_path) not in json.dumps(config)
    local = loggers._public(cfg.replace({"MODEL.WEIGHTS": str(tmp_path / "r18.pth")}))
    assert local["MODEL"]["WEIGHTS"] == "r18.pth"


def killed_at(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """Let the training die in an iteration, as if killed: no logger is closed."""
    from gn_detect.engine import trainer

    class Killed(BaseException):
        pass

    real, steps = trainer.seed_iteration, iter(range(100))

    def seed(*args: Any) -> None:
        if args[1] == iteration and next(steps) == 0:
            monkeypatch.setattr(Loggers, "close", lambda self: None)
            raise Killed
        real(*args)

    monkeypatch.setattr(trainer, "seed_iteration", seed)


@pytest.mark.parametrize("iteration", [3, 5])
def test_a_killed_run_continues_and_no_step_is_there_twice(
    cfg: Config, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, iteration: int
) -> None:
    """Checkpoints follow iterations 1 and 3, the evaluation iteration 3; a row waits for the next one."""
    with monkeypatch.context() as patch, pytest.raises(BaseException, match="^$"):
        killed_at(patch, iteration)
        train(cfg)
    assert [step for step, _ in recorder.runs["run-0"]] == list(range(iteration - 1))
    # The resumed run goes back to a checkpoint before the newest.
    newest = "model_0000001.pth" if iteration == 3 else "model_0000003.pth"
    os.truncate(Path(cfg.output_dir) / newest, 100) if iteration == 5 else None
    train(cfg, resume=True)
    sent = dict(recorder.runs["run-0"])
    assert len(recorder.runs) == 1
    assert {step: without_times(row) for step, row in sent.items()} == {
        step: without_times(row) for step, row in rows_of(cfg).items()
    }
    assert recorder.ends == [True]


def without_times(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key not in TIMINGS | {"iteration_time"}}


def test_a_new_run_in_the_same_folder_is_a_new_run_of_the_logger(
    cfg: Config, recorder: type[Recorder]
) -> None:
    short = cfg.replace({"SOLVER.MAX_ITER": 1, "DATASETS.TEST": []})
    train(short)
    train(short)
    assert list(recorder.runs) == ["run-0", "run-1"]
    assert json.loads((Path(cfg.output_dir) / "loggers.json.earlier").read_text()) == {"wandb": "run-0"}


def test_a_failing_logger_is_dropped_with_one_warning_and_gets_the_rest_later(
    cfg: Config, recorder: type[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    recorder.fails_at = 2
    train(cfg)
    assert [step for step, _ in recorder.runs["run-0"]] == [0, 1]
    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING and "logger" in r.getMessage()]
    assert "wandb" in warning.getMessage()
    lines = (Path(cfg.output_dir) / "log.txt").read_text().splitlines()
    assert [line for line in lines if r"no answer\nfrom the server" in line]

    recorder.fails_at = None
    train(cfg, resume=True)
    assert dict(recorder.runs["run-0"]).keys() == rows_of(cfg).keys()


def test_a_logger_that_does_not_begin_ends_no_training(
    cfg: Config, recorder: type[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    recorder.runs = None  # type: ignore[assignment]
    train(cfg.replace({"SOLVER.MAX_ITER": 1, "DATASETS.TEST": []}))
    assert (Path(cfg.output_dir) / "model_final.pth").is_file()
    assert [r for r in caplog.records if r.levelno == logging.WARNING and "logger" in r.getMessage()]


@pytest.mark.parametrize("content", ["{", "[1]", '{"wandb": "../../x"}', '{"wandb": 3}', "[" * 100_000])
def test_damaged_ids_begin_new_runs(cfg: Config, recorder: type[Recorder], content: str) -> None:
    folder = Path(cfg.output_dir)
    folder.mkdir()
    (folder / "loggers.json").write_text(content)
    Loggers(cfg, start=4).close()
    assert list(recorder.runs) == ["run-0"]


@pytest.mark.parametrize(
    ("name", "package"),
    [("wandb", "wandb"), ("mlflow", "mlflow"), ("mlflow", "alembic"), ("trackio", "trackio")],
)
def test_a_missing_package_is_refused_before_anything_is_written(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    for other in ("mlflow", "sqlalchemy"):
        monkeypatch.setitem(sys.modules, other, type(sys)(other))
    monkeypatch.setitem(sys.modules, package, None)
    with refusal("missing-package", name, package, f'pip install "gn-detect[{name}]"'):
        train(tiny_config.replace({"LOGGERS": [name]}))
    assert not Path(tiny_config.output_dir).exists()


def test_an_unknown_logger_is_refused(tiny_config: Config) -> None:
    with refusal("bad-value", "LOGGERS", "wandb", "mlflow", "trackio"):
        tiny_config.replace({"LOGGERS": ["comet"]})


def test_the_flag_sets_the_key(tiny_config: Config, tmp_path: Path, recorder: type[Recorder]) -> None:
    words = ["train", "--config-file", str(tmp_path / "tiny.yaml"), "--logger", "wandb"]
    assert main([*words, "LOGGERS", "mlflow"]) == 2
    assert not Path(tiny_config.output_dir).exists()
    assert main([*words, "--logger", "wandb", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "[]"]) == 0
    assert [[step for step, _ in rows] for rows in recorder.runs.values()] == [[0]]


def in_two_processes(cfg: Config) -> None:
    class Own(Recorder):
        runs, configs, ends, fails_at = {}, [], [], None

        def close(self, finished: bool) -> None:
            (Path(cfg.output_dir) / f"closed-by-{os.getpid()}").write_text(str(len(self.runs[self.id])))

    loggers.KINDS["wandb"] = Own
    sys.modules["wandb"] = type(sys)("wandb")
    train(cfg)


@pytest.mark.slow
def test_only_the_first_process_logs(cfg: Config) -> None:
    cfg = cfg.replace({"SOLVER.MAX_ITER": 2, "DATASETS.TEST": []})
    launch(in_two_processes, (cfg,), device="cpu", num_gpus=2)
    assert [path.read_text() for path in Path(cfg.output_dir).glob("closed-by-*")] == ["2"]


# The libraries themselves, each read back by its own reader.


def need(*packages: str) -> None:
    for package in packages:
        pytest.importorskip(package, reason=f"the extra of {package} is not installed")


@pytest.fixture
def wandb_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, str], Rows]:
    """Read the newest folder of a run by ``wandb leet inspect``."""
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")

    def read(cfg: Config, id: str) -> Rows:
        folder = max((Path(cfg.output_dir) / "wandb").glob("offline-run-*"), key=lambda path: path.name)
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        records = list(map(json.loads, lines))
        (run,) = [record["run"] for record in records if record["type"] == "run"]
        assert run["run_id"] == id
        assert run["config"]["update"]["SOLVER"]["MAX_ITER"] == cfg.solver.max_iter
        rows: Rows = {}
        for record in records:
            if record["type"] == "history":
                item = record["history"]["item"]
                step = item.pop("_step")
                assert step not in rows
                rows[step] = {key: value for key, value in item.items() if not key.startswith("_")}
        return rows

    return read


@pytest.fixture
def mlflow_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, str], Rows]:
    need("mlflow", "sqlalchemy", "alembic")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def read(cfg: Config, id: str) -> Rows:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{cfg.output_dir}/mlflow.db")
        (experiment,) = [e for e in client.search_experiments() if e.name == "gn-detect"]
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.run_id == id
        assert run.info.status == "FINISHED"
        assert run.data.params["SOLVER.MAX_ITER"] == str(cfg.solver.max_iter)
        rows: Rows = {}
        for key in run.data.metrics:
            for metric in client.get_metric_history(id, key):
                assert key not in rows.setdefault(metric.step, {})
                rows[metric.step][key] = metric.value
        return rows

    return read


@pytest.fixture
def trackio_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, str], Rows]:
    need("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)

    def read(cfg: Config, id: str) -> Rows:
        """In a process of its own: Trackio takes its folder when it is imported."""
        script = (
            "import json, sys, trackio\n"
            "from trackio.sqlite_storage import SQLiteStorage\n"
            "(run,) = trackio.Api().runs('gn-detect')\n"
            "rows = SQLiteStorage.get_logs('gn-detect', run.name, run_id=run.id)\n"
            "print(json.dumps([run.name, run.config, rows]))\n"
        )
        command = [sys.executable, "-c", script]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        name, config, found = json.loads(output)
        assert name == f"run-{id}"
        assert config["SOLVER"]["MAX_ITER"] == cfg.solver.max_iter
        assert config["_Username"] is None
        rows: Rows = {}
        for row in found:
            del row["timestamp"]
            step = row.pop("step")
            assert step not in rows
            rows[step] = row
        return rows

    return read


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_run_that_is_killed_and_resumed_is_read_back_by_the_library(
    cfg: Config, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    read: Callable[[Config, str], Rows] = request.getfixturevalue(f"{name}_rows")
    folder = Path(cfg.output_dir)
    words = [sys.executable, "-m", "gn_detect", "train", "--config-file", str(tmp_path / "tiny.yaml")]
    keys = {**KEYS, "SOLVER.MAX_ITER": 40, "SOLVER.CHECKPOINT_PERIOD": 10, "TEST.EVAL_PERIOD": 10}
    words += ["--logger", name, *(str(word) for pair in keys.items() for word in pair)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        metrics = folder / "metrics.jsonl"
        end = time.monotonic() + 120
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 16):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    id = json.loads((folder / "loggers.json").read_text())[name]
    subprocess.run([*words, "--resume"], stdout=subprocess.DEVNULL, check=True)
    assert json.loads((folder / "loggers.json").read_text())[name] == id
    cfg = cfg.replace(keys)
    expected = {step: without_times(row) for step, row in rows_of(cfg).items()}
    assert len(expected) == 40
    assert "segm/AP" in expected[39]
    found = {step: without_times(row) for step, row in read(cfg, id).items()}
    assert found.keys() == expected.keys()
    for step, row in expected.items():
        assert found[step] == pytest.approx(row), step
