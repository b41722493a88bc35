"""Result files in any layout are read one entry at a time; what is wrong with them is said."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from gn_detect.errors import UserError
from gn_detect.evaluation import results_file
from gn_detect.evaluation.results_file import ResultsWriter, read_entries

ENTRIES = [{"a": [1.5, "]},{"], "b": {}}, {}, {"text": '\u00e9\n\\"'}, {"n": 12345678901}]


@pytest.mark.parametrize("window", [1, 3, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_entries_come_back_whatever_the_layout_and_the_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, indent: int | None
) -> None:
    monkeypatch.setattr(results_file, "_CHARACTERS", window)
    path = tmp_path / "r.json"
    for content in (ENTRIES, [], [12, 345], [[]]):
        path.write_text(f" \n{json.dumps(content, indent=indent, ensure_ascii=False)}\n\n", encoding="utf-8")
        assert list(read_entries(path)) == content


@pytest.mark.parametrize(
    "text", ["", "[", "[1", "[1,", "[1,]", "[1 2]", "[1]x", "[nul]", "x", '{"a"', "[" * 99999]
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UserError, match="r.json: not JSON"):
        list(read_entries(path))


def test_what_is_no_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text('{"annotations": []}')
    with pytest.raises(UserError, match="r.json: not COCO results; it needs a list"):
        list(read_entries(path))


def test_entries_are_read_before_the_file_ends(tmp_path: Path) -> None:
    """A file that breaks off later gives its first entries: it was not read as a whole."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"n": i, "pad": "x" * 1000} for i in range(20_000)])[:-50])
    read = read_entries(path)
    assert [next(read)["n"] for _ in range(100)] == list(range(100))


@pytest.mark.parametrize("count", [0, 1, 4])
def test_what_is_written_is_a_list_with_a_line_for_each_entry(count: int) -> None:
    file = io.StringIO()
    writer = ResultsWriter(file)
    writer.add(ENTRIES[:1][:count])
    writer.add(ENTRIES[1:count])
    writer.end()
    assert json.loads(file.getvalue()) == ENTRIES[:count]
