"""Output of a terminal while a command works: a live bar, and lines that fit; files get whole lines."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gn_detect.cli import main
from tests.cli.conftest import Case

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


def in_terminal(*arguments: object, folder: Path, columns: int = 200) -> tuple[int, str]:
    """Exit status of a command, and all that it writes to a terminal."""
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "gn_detect", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    with subprocess.Popen(command, stdout=inside, stderr=inside, cwd=folder, env=environment) as process:
        os.close(inside)
        written = b""
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # Linux: the last process of the terminal has gone
                part = b""
            if not part:
                break
            written += part
    os.close(terminal)
    return process.returncode, written.decode()


def final_lines(text: str) -> list[str]:
    """Lines as they stay: what follows a carriage return replaces what was before it."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> tuple[str, Path]:
    """The output of a training in a terminal, and the run's folder."""
    from tests.engine.tiny import make_dataset, write_config

    folder = tmp_path_factory.mktemp("a_folder_with_a_name_that_is_rather_long_for_a_terminal_of_usual_width")
    train, val = make_dataset(folder / "train", 4, seed=1), make_dataset(folder / "val", 2, seed=2)
    keys = ["SOLVER.LOG_PERIOD", "2", "TEST.EVAL_PERIOD", "4", "VIS.NUM_IMAGES", "1"]
    status, text = in_terminal(
        "train", "--config-file", write_config(folder, train, val), *keys, folder=repository
    )
    assert status == 0, text
    return text, folder / "run"


def test_training_has_a_live_bar(trained: tuple[str, Path]) -> None:
    text, _ = trained
    assert re.search(r"\rtraining: .*2/6 \[\d\d:\d\d<\d\d:\d\d, .*, loss [\d.]+, lr [\d.e-]+\]", text)
    assert re.search(r"\revaluating: ", text)
    assert re.search(r"\rdrawing pictures of tiny_test: ", text)
    assert all(len(part) < 100 for part in re.split(r"[\r\n]", text) if "it/s" in part or "iter/s" in part)


def test_a_bar_below_another_moves_the_cursor(trained: tuple[str, Path]) -> None:
    assert "\x1b[A" in trained[0]
    assert "\\x1b" not in trained[0]


def test_lines_in_a_terminal_are_short_and_not_torn(trained: tuple[str, Path]) -> None:
    text, _ = trained
    lines = final_lines(text)
    long = [line for line in lines if len(line) >= 100]
    assert all(max(map(len, line.split())) > 50 for line in long), long  # a path is left whole
    iterations = [line for line in lines if "eta" in line]
    shape = r"\d\d:\d\d:\d\d iter [246]/6  eta [\d:]+  total_loss [\d.]+  lr [\d.e-]+  [\d.]+ s/iter"
    assert len(iterations) == 3 and all(re.fullmatch(shape, line) for line in iterations), iterations


def test_a_training_ends_with_what_to_try_next(trained: tuple[str, Path]) -> None:
    text, run = trained
    end = text.replace("\r\n", "\n").replace("\\\n", " ").splitlines()[-4:]
    assert re.fullmatch(r"box AP [\d.]+, mask AP [\d.]+", end[0])
    assert end[1] == f"pictures of predictions, and the curves: {run / 'pictures'}"
    assert end[2].startswith("next: ")
    predict = end[2].split()
    assert predict[2] == "predict"
    assert Path(predict[3]).parent == run
    assert Path(predict[4]).suffix == ".png"
    assert all(Path(path).is_file() for path in predict[3:5])
    assert end[3].split()[1:] == ["report", str(run)]


def test_the_log_file_has_whole_lines(trained: tuple[str, Path]) -> None:
    lines = [line for line in (trained[1] / "log.txt").read_text().splitlines() if " iter " in line]
    assert len(lines) == 3
    assert all("loss_mask" in line and "images/s" in line and "memory" in line for line in lines)
    assert "\r" not in (trained[1] / "log.txt").read_text()


def test_without_a_terminal_there_is_no_bar(
    case: Case, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's, with which a run shows no log
    words = ["train", "--config-file", str(case.config), "SOLVER.MAX_ITER", "1", "VIS.NUM_IMAGES", "1"]
    assert main(words) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "\r" not in out
    assert "loss_mask" in out
    assert "drawing pictures of tiny_test: " in out


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_quiet_shows_nothing_in_a_terminal(case: Case, repository: Path, processes: str) -> None:
    keys = ["--num-gpus", processes, "SOLVER.MAX_ITER", "1"]
    status, text = in_terminal("train", "--quiet", "--config-file", case.config, *keys, folder=repository)
    assert (status, text) == (0, "")
