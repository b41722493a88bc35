"""Codes of errors: each is raised, documented and survives the way to another process."""

from __future__ import annotations

import argparse
import ast
import pickle
import re
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from gn_detect.data.coco.faults import ERROR, FAULTS, DataError
from gn_detect.errors import Code, Diverged, UserError

CODES = get_args(Code)
LISTS = ("errors.py", "faults.py")  # a code in these is not yet raised


def documented(repository: Path) -> list[tuple[str, str]]:
    """Return code and message of each row of docs/troubleshooting.md."""
    text = (repository / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([a-z-]+)` \| `(.+?)` \| .+ \|$", text, re.MULTILINE)


@cache
def texts_of(file: Path) -> list[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def texts(files: list[Path]) -> list[str]:
    """Return the string constants of Python files, and the constant parts of their f-strings."""
    return [text for file in files for text in texts_of(file)]


def sources(repository: Path) -> list[Path]:
    return sorted((repository / "gn_detect").rglob("*.py"))


def test_the_page_has_all_codes_in_their_order(repository: Path) -> None:
    assert list(dict.fromkeys(code for code, _ in documented(repository))) == list(CODES)
    assert len(set(CODES)) == len(CODES)


def test_each_code_is_raised(repository: Path) -> None:
    assert set(CODES) - set(texts([file for file in sources(repository) if file.name not in LISTS])) == set()


def test_each_clause_of_the_page_is_one_of_the_package(repository: Path) -> None:
    known = "\n".join(texts([*sources(repository), Path(argparse.__file__)]))
    clauses = [part.strip() for _, row in documented(repository) for part in re.split(r"\.\.\.|[;:,]", row)]
    assert [clause for clause in clauses if clause not in known] == []


def test_errors_of_entries_are_faults_that_the_doctor_finds() -> None:
    entries = CODES[CODES.index("malformed") : CODES.index("no-weights")]
    assert set(entries) <= set(FAULTS)
    assert {code for code in entries if FAULTS[code].severity != ERROR} == {"box-empty"}


@pytest.mark.parametrize(
    "error",
    [
        UserError("not-json", "a\n.json"),
        Diverged("diverged", "loss nan"),
        DataError("bad-box", "annotation 1", Path("a.json")),
    ],
)
def test_an_error_survives_the_way_to_another_process(error: UserError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (copy.code, copy.line, vars(copy)) == (error.code, error.line, vars(error))
    assert error.line == f"{error} [{error.code}]" and "\n" not in error.line
