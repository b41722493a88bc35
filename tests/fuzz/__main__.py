"""``python -m tests.fuzz``: thousands of damaged annotation files, images and configs in one process.

Every case is a function of its number, so that ``--first N --annotations 1`` repeats case N.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from gn_detect.config import load_config
from gn_detect.engine.model import make_model
from tests.engine.tiny import write_config
from tests.fuzz.annotations import mutate, write_base
from tests.fuzz.configs import try_config
from tests.fuzz.images import try_image
from tests.fuzz.trial import AnnotationTrial, Tally

NEEDED = 0.95
"""Share of refused cases in which the doctor must name what was damaged."""


def fuzz_annotations(folder: Path, seeds: Iterable[int]) -> Tally:
    """Damaged annotation files, see :class:`AnnotationTrial`."""
    base = write_base(folder)
    config = write_config(folder, folder / "annotations.json")
    cfg = load_config(config)
    trial = AnnotationTrial(folder, base, cfg, make_model(cfg).train())
    for seed in seeds:
        name, text = mutate(base, seed)
        trial.run(f"annotations {seed} ({name})", text)
    return trial.tally


def fuzz_images(folder: Path, seeds: Iterable[int]) -> Tally:
    """Damaged pictures."""
    folder.mkdir()
    tally = Tally()
    for seed in seeds:
        try_image(folder, seed, tally)
    return tally


def fuzz_configs(folder: Path, seeds: Iterable[int]) -> Tally:
    """Damaged configs."""
    base = write_base(folder)
    (folder / "annotations.json").write_text(json.dumps(base))
    config = write_config(folder, folder / "annotations.json")
    tally = Tally()
    for seed in seeds:
        try_config(config, seed, tally)
    return tally


def main() -> int:
    """Run, print what happened; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotations", type=int, default=2000)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--configs", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    faulthandler.enable()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        for name, run in (
            ("annotations", fuzz_annotations),
            ("images", fuzz_images),
            ("configs", fuzz_configs),
        ):
            begin, count = time.perf_counter(), getattr(args, name)
            tally = run(Path(temporary) / name, range(args.first, args.first + count))
            for line in tally.failures + [f"not named: {line}" for line in tally.unnamed]:
                print(line)
            share = f", the doctor names {tally.named} of them" if name != "configs" else ""
            print(
                f"{name}: {tally.cases} cases in {time.perf_counter() - begin:.0f} s: {tally.refused} refused"
                f"{share}; {tally.passed} used; {tally.repaired} repaired; {len(tally.failures)} failures"
            )
            failed |= bool(tally.failures) or (name != "configs" and tally.named < NEEDED * tally.refused)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
