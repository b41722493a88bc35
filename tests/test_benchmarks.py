"""The figures in the pages are those of ``benchmarks/results``."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import tables
from benchmarks.peers.__main__ import code_lines

RECORDED = [
    path.stem for path in tables.RESULTS.glob("*.json") if "records" in json.loads(path.read_text("utf-8"))
]


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_those_of_the_results(page: str) -> None:
    text = (tables.REPOSITORY / page).read_text("utf-8")
    assert "<!-- table: " in text
    assert tables.filled(text) == text, "run: python -m benchmarks.tables --write"
    shown = next(line for line in text.split("<!-- table: ")[1].splitlines() if re.search(r"\d\.\d", line))
    wrong = text.replace(shown, re.sub(r"\d\.\d", "x", shown))
    assert tables.filled(wrong) == text


def test_the_norm_study_has_its_tables() -> None:
    assert (tables.RESULTS / "norms" / "tables.md").read_text("utf-8") == tables.norm_study() + "\n"


def test_the_readme_quotes_headlines() -> None:
    readme = (tables.REPOSITORY / "README.md").read_text("utf-8").partition("## Install")[0]
    quoted = re.findall(r"\d+\.\d+", re.sub(r"\]\([^)]*\)", "]", readme))
    assert len(quoted) >= 10
    assert set(quoted) <= set(re.findall(r"\d+\.\d+", tables.headlines()))


def test_decisions_quote_the_results() -> None:
    seconds = [tables.value(r["figures"]["s"], "mean") for r in tables.load("throughput")["records"]]
    page = (tables.REPOSITORY / "docs" / "decisions" / "007-evaluator.md").read_text("utf-8")
    assert {float(number) for number in re.findall(r"(\d+\.\d) s", page)} == {seconds[0], seconds[2]}


@pytest.mark.parametrize("topic", RECORDED)
def test_a_record_has_a_machine_and_runs(topic: str) -> None:
    content = tables.load(topic)
    assert len({record["what"] for record in content["records"]}) == len(content["records"])
    for record in content["records"]:
        assert {"machine", "versions"} <= {*content, *record}
        for figure in record["figures"].values():
            if figure["runs"] is None:
                assert {"value", "interval"} & {*figure}
            elif "value" in figure and len(figure["runs"]) > 1:  # of runs before they were rounded
                runs = {"runs": figure["runs"]}
                assert figure["value"] == pytest.approx(tables.value(runs, content["statistic"]), abs=0.1)


def test_the_time_to_an_ap_lies_on_the_line_between_evaluations() -> None:
    points = [(10.0, 5.0), (20.0, 25.0), (30.0, 22.0), (40.0, 42.0)]
    assert tables.time_to(4, points) == pytest.approx(8)  # from AP 0 at 0 s
    assert tables.time_to(5, points) == pytest.approx(10)
    assert tables.time_to(20, points) == pytest.approx(17.5)
    assert tables.time_to(24, points) == pytest.approx(19.5)  # the first time, though the AP falls again
    assert tables.time_to(32, points) == pytest.approx(35)
    assert tables.time_to(43, points) is None
    assert tables.time_to(1, []) is None


def test_lines_of_code_leave_out_what_does_nothing() -> None:
    source = '''"""A docstring
of two lines."""

from a import (
    b,
)

# a comment
def f(x):  # counted
    """Do it."""
    import c

    return b(
        x,
        """a
        text""",
    )
'''
    assert code_lines(source) == 6
