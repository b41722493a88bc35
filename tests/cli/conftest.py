"""A data set, a config, and the command line called as a function."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gn_detect.cli import main
from tests.engine.tiny import make_dataset, write_config


@dataclass
class Case:
    """Files of one test, which it may spoil: a train and a val part, and a config."""

    train: Path
    val: Path
    config: Path
    output: Path

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change the content of the train part's JSON in place."""
        content = json.loads(self.train.read_text())
        change(content)
        self.train.write_text(json.dumps(content))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Four images to train on, two to evaluate."""
    train, val = make_dataset(tmp_path / "train", 4, seed=1), make_dataset(tmp_path / "val", 2, seed=2)
    return Case(train, val, write_config(tmp_path, train, val), tmp_path / "run")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls the command line, which must refuse; returns its one line on standard error, code included."""

    def call(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: .+ \[[a-z-]+\]\n", error), error
        return error

    return call
