"""The length of a training by passes and by time."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from gn_detect.cli import main
from gn_detect.config import Config, dump_config, load_config
from gn_detect.engine import length
from gn_detect.engine.run import prepare
from tests.refusal import refusal

SCHEDULE = {
    "SOLVER.MAX_ITER": 100,
    "SOLVER.STEPS": [60, 80],
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.CHECKPOINT_PERIOD": 50,
    "TEST.EVAL_PERIOD": 0,
}


def test_passes_over_the_images_and_what_follows(tiny_config: Config) -> None:
    """Six images, two in a batch."""
    cfg = length.of_epochs(tiny_config.replace(SCHEDULE), 10, given=["SOLVER.WARMUP_ITERS"])
    solver = cfg.solver
    assert (solver.max_iter, solver.steps, solver.checkpoint_period) == (30, (18, 24), 15)
    assert (solver.warmup_iters, cfg.test.eval_period) == (10, 0)
    assert length.of_epochs(tiny_config, 0.1).solver.max_iter == 1
    for epochs in (0, -1, float("nan"), float("inf")):
        with refusal("bad-argument", "--epochs"):
            length.of_epochs(tiny_config, epochs)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("1h30m", 5400), ("45 min", 2700), ("600s", 600), ("0.5H", 1800)]
)
def test_times(text: str, seconds: float) -> None:
    assert length.read_time(text) == seconds


@pytest.mark.parametrize("text", ["2", "", "h", "0h", "2 days", "-1h", "30m1h"])
def test_no_times(text: str) -> None:
    with refusal("bad-argument", "--time"):
        length.read_time(text)


def test_a_time_becomes_iterations(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a clock that counts 1 s for each look at it; the weights and the folder stay as they were."""
    cfg = tiny_config.replace({**SCHEDULE, "TEST.EVAL_PERIOD": 25, "TEST.IMS_PER_BATCH": 1})
    before = [p.clone() for p in prepare(cfg, False).model.parameters()]
    clock = iter(range(1000))
    monkeypatch.setattr(length.time, "perf_counter", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO, logger="gn_detect"):
        found = length.within(cfg, 60)
    monkeypatch.undo()
    # 8 iterations take 1 s, and 3 images of the test set 1 s; 4 evaluations.
    assert found.solver.max_iter == int((60 - 4 * 1) / (1 / 8))
    assert found.test.eval_period == round(25 * found.solver.max_iter / 100)
    assert "SOLVER.MAX_ITER 448" in caplog.text
    assert not Path(cfg.output_dir).exists()
    assert all((a == b).all() for a, b in zip(prepare(cfg, False).model.parameters(), before, strict=True))
    with refusal("bad-argument", "--time"):
        length.within(cfg, 1e-9)


def test_the_command(tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny_config))
    command = ["train", "--json", "--config-file", str(config), "DATASETS.TEST", "[]"]
    assert main([*command, "--epochs", "1"]) == 0
    folder = Path(json.loads(capsys.readouterr().out)["output_dir"])
    assert load_config(folder / "config.yaml").solver.max_iter == 3
    begin = time.monotonic()
    assert main([*command, "--time", "3s", "OUTPUT_DIR", str(tmp_path / "timed")]) == 0
    assert time.monotonic() - begin < 300
    assert load_config(tmp_path / "timed" / "config.yaml").solver.max_iter > 3
    for more in (["--epochs", "1"], ["--resume"], ["SOLVER.MAX_ITER", "3"]):
        assert main([*command, "--time", "3s", *more]) == 2
