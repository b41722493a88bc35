"""All kinds of cases, by the name that the command line gives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from gn_detect.config import load_config
from gn_detect.modeling import make_model
from tests.engine.tiny import write_config
from tests.fuzz.annotations import mutate, write_base
from tests.fuzz.checkpoints import prepare_checkpoints
from tests.fuzz.configs import try_config
from tests.fuzz.folders import prepare_folders
from tests.fuzz.formats import prepare_formats
from tests.fuzz.images import try_image
from tests.fuzz.limits import Case, Preparation, run_cases
from tests.fuzz.results import prepare_results
from tests.fuzz.trial import AnnotationTrial, Tally


def prepare_annotations(folder: Path) -> Case:
    """Damaged annotation files, see :class:`AnnotationTrial`."""
    base = write_base(folder)
    cfg = load_config(write_config(folder, folder / "annotations.json"))
    model = make_model(cfg).train()

    def case(seed: int, tally: Tally) -> None:
        name, text = mutate(base, seed)
        trial = AnnotationTrial(folder, base, cfg, model)
        trial.run(f"annotations {seed} ({name})", text)
        tally.add(trial.tally)

    return case


def prepare_images(folder: Path) -> Case:
    """Damaged pictures."""
    folder.mkdir()
    return lambda seed, tally: try_image(folder, seed, tally)


def prepare_configs(folder: Path) -> Case:
    """Damaged configs."""
    base = write_base(folder)
    (folder / "annotations.json").write_text(json.dumps(base))
    config = write_config(folder, folder / "annotations.json")
    return lambda seed, tally: try_config(config, seed, tally)


KINDS: dict[str, tuple[Preparation, int]] = {
    "annotations": (prepare_annotations, 2000),
    "results": (prepare_results, 600),
    "images": (prepare_images, 500),
    "configs": (prepare_configs, 500),
    "folders": (prepare_folders, 400),
    "checkpoints": (prepare_checkpoints, 600),
    "formats": (prepare_formats, 900),
}
"""What makes the cases, and how many are usual."""

NAMED = ("annotations", "images")
"""Kinds in which the doctor looks at the same file, and must name what was damaged."""


def fuzz(kind: str, seeds: Sequence[int]) -> Tally:
    """Try the cases of a kind, in a process of their own."""
    return run_cases(kind, KINDS[kind][0], seeds)
