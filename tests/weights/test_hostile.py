"""Hostile and broken files: none is run, none crashes, all are refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gn_detect.weights import numpy_pickle, read_checkpoint
from tests.refusal import refusal

from .hostile import CASES

REPOSITORY = Path(__file__).resolve().parents[2]
MEGABYTES, SECONDS = 600, 20
"""Over all files together; one alone that unpacks to gigabytes would show."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case, from one process that reads them all; an empty dict for files after a crash."""
    folder = tmp_path_factory.mktemp("hostile")
    victim = folder / "was_run"
    files = {}
    for number, (name, (ending, content)) in enumerate(CASES.items()):
        files[name] = folder / f"{number:03d}{ending}"
        files[name].write_bytes(content(str(victim)))
    (folder / "list.json").write_text(json.dumps([str(file) for file in files.values()]))
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("hostile.py"))]
    process = subprocess.run(
        [*command, str(folder / "list.json")], cwd=folder, env=_environment(), capture_output=True, text=True
    )
    reported = [json.loads(line) for line in process.stdout.splitlines()]
    ended = {line["file"]: line for line in reported if "outcome" in line}
    assert process.returncode == 0, f"crashed at {reported[-1:]}: {process.stderr[-2000:]}"
    assert not victim.exists()
    assert {path.name for path in folder.iterdir()} == {"list.json", *(file.name for file in files.values())}
    return {name: ended.get(str(file), {}) for name, file in files.items()}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", CASES)
def test_hostile_file(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    found = outcomes[name]
    assert found["outcome"] == "refused", found
    assert "\n" not in found["message"]
    assert len(found["message"]) < 500
    assert found["file"] in found["message"]
    if "names" in found["message"]:
        assert "refused to read" in found["message"]
        assert "nothing was run" in found["message"]


def test_they_take_little_memory_and_time(outcomes: dict[str, dict[str, Any]]) -> None:
    memory = [found["memory"] for found in outcomes.values()]
    assert max(memory) - min(memory) < MEGABYTES
    assert sum(found["seconds"] for found in outcomes.values()) < SECONDS


def test_a_pickle_of_too_many_instructions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"w": np.ones(2), "log": list(range(5000))}))
    assert read_checkpoint(tmp_path / "m.pkl").tensors["w"].tolist() == [1, 1]
    monkeypatch.setattr(numpy_pickle, "MAX_INSTRUCTIONS", 4000)
    with refusal("unsafe-file", "4000 instructions"):
        read_checkpoint(tmp_path / "m.pkl")


def test_the_command_line_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gn_detect.cli import main

    path, target = tmp_path / "m.pkl", tmp_path / "out.pth"
    path.write_bytes(CASES["os.system, protocol 2"][1](str(tmp_path / "was_run")))
    assert main(["convert", "--keep-norm", str(path), str(target)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: refused to read")
    assert "posix.system" in error
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["m.pkl"]
