"""A short form of ``python -m tests.fuzz``: no traceback, no hang, no wrong success, and faults are named."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fuzz.__main__ import NEEDED, fuzz_annotations, fuzz_configs, fuzz_images
from tests.fuzz.annotations import changed_ids, mutate, write_base

FAILED_ONCE = {"annotations": [471], "configs": [14, 387]}
"""A category called by half a surrogate pair; a message of two lines; a SEED of more than 64 bits."""


def test_what_failed_once(tmp_path: Path) -> None:
    for name, run in (("annotations", fuzz_annotations), ("configs", fuzz_configs)):
        tally = run(tmp_path / name, FAILED_ONCE[name])
        assert tally.failures == [] and tally.unnamed == []


def test_annotation_files(tmp_path: Path) -> None:
    tally = fuzz_annotations(tmp_path / "annotations", range(5000, 5060))
    assert tally.failures == [] and tally.refused > 30 and tally.repaired > 20
    assert tally.named >= NEEDED * tally.refused, tally.unnamed


def test_images(tmp_path: Path) -> None:
    tally = fuzz_images(tmp_path / "images", range(5000, 5060))
    assert tally.failures == [] and tally.refused > 10 and tally.passed > 10
    assert tally.named == tally.refused, tally.unnamed


def test_configs(tmp_path: Path) -> None:
    tally = fuzz_configs(tmp_path / "configs", range(5000, 5030))
    assert tally.failures == [] and tally.refused > 5 and tally.passed > 2


def test_the_undamaged_file_passes(tmp_path: Path) -> None:
    """Otherwise every refusal would look right."""
    from gn_detect.config import load_config
    from gn_detect.engine.model import make_model
    from tests.engine.tiny import write_config
    from tests.fuzz.trial import AnnotationTrial

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
    assert changed is not None and changed["annotations"] == {104, "3 (counted from 0)"}
