"""Links that lead to themselves, in the place of files that commands read or write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gn_detect.cli import main
from tests.cli.conftest import Case

Refused = Callable[..., str]


def looped(path: Path) -> Path:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)
    return path


def test_inputs(case: Case, refused: Refused, tmp_path: Path) -> None:
    config, run = looped(tmp_path / "loop.yaml"), tmp_path / "run"
    run.mkdir()
    metrics = looped(run / "metrics.jsonl")
    for words in (
        ["config", "show", "--config-file", config],
        ["plot", run],
        ["plot", metrics],
        ["doctor", looped(tmp_path / "a.json"), "--images", tmp_path],
        ["convert", looped(tmp_path / "a.pth"), tmp_path / "b.pth"],
        ["predict", "--config-file", config, looped(tmp_path / "a.png")],
    ):
        assert str(tmp_path) in refused(*words)


def test_outputs(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are replaced, as any file."""
    fixed = looped(tmp_path / "fixed.json")
    given = [case.train, "--images", case.train.parent / "images", "--fix", fixed]
    assert main(["doctor", *map(str, given)]) == 0
    assert fixed.is_file()
    assert not fixed.is_symlink()
