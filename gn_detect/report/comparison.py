"""Compare the AP of two runs or groups of runs, with intervals from a paired bootstrap over images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import resolve_dataset
from ..errors import UserError
from ..evaluation import (
    AREAS,
    Evaluators,
    average_precision,
    choose_backend,
    draw_images,
    interval,
    prepare_detections,
    prepare_ground_truth,
    read_annotations,
)
from ..evaluation.backends import THRESHOLDS
from ..evaluation.coco_data import GroundTruth
from ..files import open_file
from ..text import printable
from .run_folder import RunFolder, TestSet, read_run

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_IOU_50, _IOU_75 = 0, 5


@dataclass(frozen=True)
class Difference:
    """A metric of both sides in percent, and the interval of the second one's minus the first one's.

    Attributes:
        name: one of :data:`METRICS`, or ``AP-<category>``.
        first, second: means over the runs of each side; nan where there is nothing to find.
        low, high: ends of the 95% interval.
    """

    name: str
    first: float
    second: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """Return the second value minus the first one."""
        return self.second - self.first

    @property
    def is_real(self) -> bool:
        """Return whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """The differences on one dataset.

    Attributes:
        dataset: its name.
        images: number of its images.
        kinds: by IoU type, one difference for each of :data:`METRICS` and each category.
    """

    dataset: str
    images: int
    kinds: dict[str, list[Difference]]


def compare_runs(
    first: Sequence[str | Path], second: Sequence[str | Path], *, resamples: int = 1000, seed: int = 0
) -> list[Comparison]:
    """Compare the evaluations of two sides on their common datasets.

    The images are drawn with replacement, the same ones for all runs: most of the luck of a choice of images
    is common to both sides and cancels. With several runs on a side, such as three seeds, its runs are drawn,
    too. The spread of the mean of n runs is widened by sqrt(n / (n - 1)): n drawn runs spread less than new
    ones.

    Args:
        first, second: run folders with the result files of an evaluation.
        resamples: of the bootstrap.
        seed: of the resamples.

    Raises:
        UserError: a folder is not a run's, the runs have no evaluated dataset in common, or their
            ground truth of it differs.
    """
    sides = [[read_run(folder) for folder in side] for side in (first, second)]
    runs = [run for side in sides for run in side]
    found = [{test.name: test for test in run.tests if test.results is not None} for run in runs]
    common = [name for name in found[0] if all(name in tests for tests in found)]
    if not common:
        names = "; ".join(f"{run.path}: {', '.join(t) or 'none'}" for run, t in zip(runs, found, strict=True))
        raise UserError(
            "no-dataset", f"the runs have no dataset with results in common ({names}); evaluate them on one"
        )
    return [
        compare_on(name, runs, [tests[name] for tests in found], len(sides[0]), resamples, seed)
        for name in common
    ]


def compare_on(
    name: str,
    runs: Sequence[RunFolder],
    tests: Sequence[TestSet],
    first: int,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare ``runs[:first]`` with the others on the dataset ``name``; see :func:`compare_runs`."""
    path = _common_annotations(name, runs)
    file = read_annotations(path)
    kinds = [k for k in ("bbox", "segm") if all(k in test.metrics for test in tests)] or ["bbox"]
    differences: dict[str, list[Difference]] = {}
    count = 0
    for kind in kinds:
        truth = prepare_ground_truth(file, kind)
        count = len(truth.images)
        draws = np.concatenate([np.ones((1, count), dtype=np.int32), draw_images(count, resamples, seed)])
        values: list[dict[str, np.ndarray]] = []
        for test in tests:
            assert test.results is not None
            logger.info("resampling %s of %s", kind, test.results)
            values.append(_values(truth, test.results, kind, draws))
        random = np.random.default_rng(seed + 1)
        picks = [_picked(random, resamples, n) for n in (first, len(runs) - first)]
        differences[kind] = [
            _difference(key, [v[key] for v in values[:first]], [v[key] for v in values[first:]], picks)
            for key in values[0]
        ]
    return Comparison(name, count, differences)


def _common_annotations(name: str, runs: Sequence[RunFolder]) -> Path:
    paths = [resolve_dataset(run.cfg, name).annotations for run in runs]
    for path in paths[1:]:
        try:
            same = path.resolve() == paths[0].resolve() or _content(path) == _content(paths[0])
        except OSError as error:
            raise UserError(
                "cannot-read", f"{error.filename}: cannot be read ({error.strerror}); restore the annotations"
            ) from error
        if not same:
            raise UserError(
                "other-run",
                f"the ground truth of {name!r} is {paths[0]} for one run and {path} for another, and they "
                "differ; evaluate both on the same file",
            )
    return paths[0]


def _content(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()


def _values(truth: GroundTruth, results: Path, kind: str, draws: np.ndarray) -> dict[str, np.ndarray]:
    """Return (R,) percent of each metric of a run."""
    backend = choose_backend(None)
    ranked = Evaluators(truth, prepare_detections(results, truth, [kind]), backend).ranked(kind)
    labels = truth.labels
    aps = np.full((len(AREAS), len(labels), len(draws), THRESHOLDS), np.nan)
    for (category, area), matches in ranked.items():
        aps[area, category] = average_precision(matches, draws) * 100
    per_category = aps[0].mean(axis=2)
    parts = [
        per_category,
        aps[0, ..., _IOU_50],
        aps[0, ..., _IOU_75],
        *(part.mean(axis=2) for part in aps[1:]),
    ]
    found = {name: _mean(part) for name, part in zip(METRICS, parts, strict=True)}
    return found | {f"AP-{label}": per_category[place] for place, label in enumerate(labels)}


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean over the categories (K, R) that have objects; nan without one."""
    known = ~np.isnan(values)
    number = known.sum(axis=0)
    return np.where(number > 0, np.where(known, values, 0).sum(axis=0) / np.maximum(number, 1), np.nan)


def _picked(random: np.random.Generator, resamples: int, runs: int) -> np.ndarray:
    """Return (resamples, runs), the weight of each run in the mean of a side."""
    if runs == 1:
        return np.ones((resamples, 1))
    drawn = random.multinomial(runs, np.full(runs, 1 / runs), resamples) / runs
    widened: np.ndarray = 1 / runs + (drawn - 1 / runs) * np.sqrt(runs / (runs - 1))
    return widened


def _difference(
    name: str, first: Sequence[np.ndarray], second: Sequence[np.ndarray], picks: Sequence[np.ndarray]
) -> Difference:
    sides = [np.stack(side, axis=1) for side in (first, second)]  # (1 + resamples, runs)
    value, other = (float(side[0].mean()) for side in sides)
    before, after = ((side[1:] * pick).sum(axis=1) for side, pick in zip(sides, picks, strict=True))
    low, high = interval(after - before)
    return Difference(name, value, other, low, high)


def format_comparison(comparison: Comparison) -> str:
    """Return a table for each IoU type, and a sentence on its AP."""
    lines = []
    for kind, rows in comparison.kinds.items():
        width = max(len(printable(row.name)) for row in rows)
        lines.append(f"{kind:<{width}}   first  second  difference  95% interval")
        for row in rows:
            if np.isnan(row.difference):
                continue
            mark = "  *" if row.is_real else ""
            lines.append(
                f"{printable(row.name):<{width}}{row.first:8.2f}{row.second:8.2f}{row.difference:+12.2f}  "
                f"{row.low:+.2f} to {row.high:+.2f}{mark}"
            )
        lines.append(conclusion(rows[0], comparison.images))
    return "\n".join(lines)


def conclusion(row: Difference, images: int) -> str:
    """Return a sentence on the difference of one metric."""
    if np.isnan(row.difference):
        return f"{row.name}: the ground truth has nothing to find"
    if not row.is_real:
        return f"{row.name}: no difference that {images} images can tell"
    side = "second" if row.difference > 0 else "first"
    return (
        f"{row.name}: the {side} is better by {abs(row.difference):.2f} ({row.low:+.2f} to {row.high:+.2f})"
    )


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return plain values, in percent."""

    def values(row: Difference) -> dict[str, Any]:
        sides = {"first": row.first, "second": row.second, "difference": row.difference}
        return sides | {"interval": [row.low, row.high], "real": row.is_real}

    return [
        {"dataset": comparison.dataset, "images": comparison.images}
        | {kind: {row.name: values(row) for row in rows} for kind, rows in comparison.kinds.items()}
        for comparison in comparisons
    ]
