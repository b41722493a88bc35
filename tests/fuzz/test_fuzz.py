"""A short form of ``python -m tests.fuzz``: no traceback, no hang, no wrong success, and faults are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gn_detect.config import load_config
from gn_detect.modeling import make_model
from tests.engine.tiny import write_config
from tests.fuzz.__main__ import NEEDED
from tests.fuzz.annotations import changed_ids, mutate, write_base
from tests.fuzz.kinds import KINDS, fuzz
from tests.fuzz.limits import Case, run_cases
from tests.fuzz.trial import AnnotationTrial, Tally

FAILED_ONCE = {
    "annotations": [471],  # a category called by half a surrogate pair
    "configs": [14, 387],  # a message of two lines; a SEED of more than 64 bits
}


def refuses_or_uses(tally: Tally) -> bool:
    """Whether nothing went wrong."""
    assert tally.failures == []
    return not tally.slow and not tally.large


@pytest.mark.parametrize("kind", list(FAILED_ONCE))
def test_what_failed_once(kind: str) -> None:
    tally = fuzz(kind, FAILED_ONCE[kind])
    assert refuses_or_uses(tally)
    assert tally.unnamed == []


def test_annotation_files() -> None:
    tally = fuzz("annotations", range(5000, 5030))
    assert refuses_or_uses(tally)
    assert tally.refused > 8
    assert tally.repaired > 8
    assert tally.named >= NEEDED * tally.refused, tally.unnamed


def test_images() -> None:
    tally = fuzz("images", range(5000, 5030))
    assert refuses_or_uses(tally)
    assert tally.refused > 5
    assert tally.passed > 5
    assert tally.named == tally.refused, tally.unnamed


@pytest.mark.parametrize(
    ("kind", "count"),
    [("configs", 20), ("results", 20), ("folders", 6), ("checkpoints", 8), ("formats", 30)],
)
def test_a_few(kind: str, count: int) -> None:
    tally = fuzz(kind, range(5000, 5000 + count))
    assert refuses_or_uses(tally)
    assert tally.refused > count / 8
    assert tally.passed > 1


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", list(KINDS))
def test_many(kind: str) -> None:
    """As many as ``python -m tests.fuzz`` tries, of other numbers."""
    tally = fuzz(kind, range(100_000, 100_000 + KINDS[kind][1]))
    assert refuses_or_uses(tally)


def test_the_undamaged_file_passes(tmp_path: Path) -> None:
    """Otherwise every refusal would look right."""
    base = write_base(tmp_path / "base")
    cfg = load_config(write_config(tmp_path, tmp_path / "base" / "annotations.json"))
    trial = AnnotationTrial(tmp_path / "base", base, cfg, make_model(cfg).train())
    trial.run("undamaged", json.dumps(base))
    tally = trial.tally
    assert (tally.passed, tally.repaired, tally.failures) == (1, 1, [])


def test_mutations_are_functions_of_their_seed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    assert mutate(base, 7) == mutate(base, 7)
    names = {mutate(base, seed)[0] for seed in range(400)}
    assert len(names) > 25
    content = json.loads(json.dumps(base))
    content["annotations"][3]["bbox"] = [0, 0, 1, 1]
    changed = changed_ids(base, json.dumps(content))
    assert changed is not None
    assert changed["annotations"] == {104, "3 (counted from 0)"}


def prepare_bad_cases(folder: Path) -> Case:
    """By number: a traceback, a loop, a process that dies, much memory, and nothing wrong."""
    import os

    def traceback() -> None:
        raise LookupError("text")

    def loop() -> None:
        while True:
            pass

    def memory() -> int:
        return len(b"x" * (1 << 30))

    actions: list[Callable[[], object]] = [traceback, loop, lambda: os._exit(3), memory, lambda: 1]

    def case(seed: int, tally: Tally) -> None:
        tally.cases += 1
        tally.passed += tally.attempt(f"bad {seed}", actions[seed]) is not None

    return case


def test_each_failure_is_that_of_its_case() -> None:
    tally = run_cases("bad", prepare_bad_cases, range(5), seconds=6, most_memory=1 << 30)
    assert (tally.cases, tally.passed, tally.tracebacks) == (5, 2, 1)
    assert tally.slow == ["bad 1"]
    assert [label[:5] for label in tally.large] == ["bad 3"]
    assert [failure[:5] for failure in tally.failures] == ["bad 0", "bad 1", "bad 2"]
