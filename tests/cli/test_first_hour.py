"""Every mistake of the first hour: status 2, one line that names the thing and a remedy, and no debris.

docs/troubleshooting.md has a row for each message, in which "..." stands for what varies.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import Case
from tests.cli.first_hour import MISTAKES, provoke, skip_reason


def documented_messages(repository: Path) -> list[re.Pattern[str]]:
    """The first column of the table, as expressions."""
    text = (repository / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.+?)` \| .+ \|$", text, re.MULTILINE)
    return [re.compile(".*".join(map(re.escape, row.split("...")))) for row in rows]


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
    message = provoke(mistake, case, monkeypatch, capsys)
    assert mistake.names in message
    assert mistake.remedy in message
    rows = [row.pattern for row in documented_messages(repository) if row.search(message)]
    assert len(rows) == 1, f"docs/troubleshooting.md has {len(rows)} rows for: {message}"
    left = {path.name for path in case.output.glob("*")} if case.output.is_dir() else set()
    pointer = case.output / "last_checkpoint"  # where an image is at fault, iterations may have been done
    saved = {pointer.read_text()} if pointer.exists() else set()
    assert {file for file in left if file.endswith((".pth", ".tmp"))} <= saved


def test_the_table_has_no_row_more_than_there_are_mistakes(repository: Path) -> None:
    assert 25 <= len(documented_messages(repository)) <= len(MISTAKES)
