"""Every mistake of the first hour: status 2, one line with its code that names the thing, and no debris.

docs/troubleshooting.md has a row for each message, in which "..." stands for what varies.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import Case
from tests.cli.first_hour import MISTAKES, provoke, skip_reason
from tests.test_errors import documented


@pytest.mark.usefixtures("quick_launch")
@pytest.mark.parametrize("name", MISTAKES)
def test_message(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    repository: Path,
    name: str,
) -> None:
    mistake = MISTAKES[name]
    if reason := skip_reason(mistake):
        pytest.skip(reason)
    message, code = provoke(mistake, case, monkeypatch, capsys)
    assert code == mistake.code, message
    names = (mistake.names,) if isinstance(mistake.names, str) else mistake.names
    assert [name for name in names if name not in message] == [], message
    rows = [row for row_code, row in documented(repository) if row_code == code]
    rows = [".*".join(map(re.escape, row.split("..."))) for row in rows]
    assert any(re.search(row, message) for row in rows), f"docs/troubleshooting.md lacks: {message}"
    left = {path.name for path in case.output.glob("*")} if case.output.is_dir() else set()
    pointer = case.output / "last_checkpoint"  # where an image is at fault, iterations may have been done
    saved = {pointer.read_text()} if pointer.exists() else set()
    assert {file for file in left if file.endswith((".pth", ".tmp"))} <= saved
