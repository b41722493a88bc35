"""Read the folder of a run."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, dump_config, load_config, without_paths
from ..engine.checkpoint import AUGMENTED, BEST, RESULTS
from ..engine.run import best_metric
from ..errors import UserError
from ..evaluation import DIAGNOSIS, VALIDATION
from ..files import read_text
from ..text import shortened
from ..visualize import Metrics, metric_points, read_metrics

RESULTS_FILE = "coco_instances_results.json"


@dataclass(frozen=True)
class TestSet:
    """One folder of ``inference/``.

    Attributes:
        name: the dataset.
        metrics: ``{"bbox": {"AP": ..., ...}, ...}`` in percent, None for a value that COCO does not define;
            empty without a ``results.json``. ``bbox_TTA`` and ``segm_TTA`` are those with test-time
            augmentation, if the last evaluation of the run had it.
        results: the COCO result file, or None.
    """

    name: str
    metrics: dict[str, dict[str, float | None]]
    results: Path | None


@dataclass(frozen=True)
class BestEvaluation:
    """The evaluation whose weights are ``model_best.pth``.

    Attributes:
        metric: the metric that is compared, such as ``segm/AP``.
        value, iterations: its value, and the number of iterations before this evaluation.
        last_value, last_iterations: the same for the last evaluation.
    """

    metric: str
    value: float
    iterations: int
    last_value: float
    last_iterations: int

    @property
    def is_last(self) -> bool:
        return self.iterations == self.last_iterations

    def __str__(self) -> str:
        best = f"{self.metric} was best after {self.iterations} iterations: {self.value:.2f}, kept as {BEST}"
        return f"{best}; the last evaluation, after {self.last_iterations}, found {self.last_value:.2f}"


@dataclass(frozen=True)
class RunFolder:
    """Everything that a report reads from a run, except for datasets.

    Attributes:
        path: the folder.
        cfg: the config in ``config.yaml``.
        config_text: the same as YAML, without folders: the page may be passed on.
        logged: lines of ``metrics.jsonl``; empty if there are none yet.
        tests: one for each evaluated dataset.
        environment: content of ``environment.json``; empty without this file.
    """

    path: Path
    cfg: Config
    config_text: str
    logged: Metrics
    tests: list[TestSet]
    environment: dict[str, Any]

    def without_folders(self, text: str) -> str:
        """Return a text in which only the last part of each local path is left."""
        entries = self.cfg.datasets.registered.values()
        paths = [path for entry in entries for path in (entry.annotations, entry.images)]
        folders = [*map(os.path.dirname, paths), *paths, os.path.abspath(self.path), self.cfg.output_dir]
        folders += [os.getcwd(), os.path.expanduser("~"), self.cfg.datasets.root]
        absolute = {
            folder for folder in folders if os.path.isabs(folder) and os.path.dirname(folder) != folder
        }
        for folder in sorted(absolute, key=len, reverse=True):
            text = text.replace(os.path.join(folder, ""), "")
        return re.sub(r"(?<![\w./:-])/(?:[^\s/]+/)+(?=[^\s/])", "", text)

    @property
    def best(self) -> BestEvaluation | None:
        """The best evaluation so far; None without an evaluation that gave a number."""
        metric = best_metric(self.cfg)
        points = metric_points(self.logged, metric)
        points = points[np.isfinite(points[:, 1])]
        if not len(points):
            return None
        (best, value), (last, last_value) = points[points[:, 1].argmax()], points[-1]
        return BestEvaluation(metric, float(value), int(best) + 1, float(last_value), int(last) + 1)


def read_run(folder: str | Path) -> RunFolder:
    """Read a run's folder; a missing part is empty.

    Raises:
        UserError: the folder is not a run's, or a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(
            "not-a-run", f"{folder} is not a run's folder: it has no config.yaml; give the run's OUTPUT_DIR"
        )
    metrics = folder / "metrics.jsonl"
    logged = read_metrics(metrics) if metrics.is_file() else Metrics()
    inference = folder / "inference"
    tests = [_test_set(path) for path in sorted(inference.iterdir())] if inference.is_dir() else []
    environment = folder / "environment.json"
    cfg = load_config(folder / "config.yaml")
    return RunFolder(
        folder,
        cfg,
        dump_config(without_paths(cfg)),
        logged,
        [test for test in tests if test.metrics or test.results],
        _read_object(environment) if environment.is_file() else {},
    )


def _test_set(folder: Path) -> TestSet:
    metrics, results = folder / "results.json", folder / RESULTS_FILE
    kinds = read_results(metrics) if metrics.is_file() else {}
    whole = folder.parents[1] / RESULTS
    if kinds and whole.is_file():
        kinds = _with_augmented(kinds, folder.name, whole)
    return TestSet(folder.name, kinds, results if results.is_file() else None)


def _with_augmented(
    kinds: dict[str, dict[str, float | None]], name: str, path: Path
) -> dict[str, dict[str, float | None]]:
    """Add AP with test-time augmentation, if the run's ``results.json`` is of the same evaluation."""
    found = _read_object(path)
    found = found.get(name, found)  # several test sets are listed by name
    if not isinstance(found, dict):
        return kinds
    rows = {kind: row for kind, row in found.items() if kind.removesuffix(AUGMENTED) in kinds}
    everything = _kinds(rows, path)
    return everything if all(everything.get(kind) == row for kind, row in kinds.items()) else kinds


def read_results(path: Path) -> dict[str, dict[str, float | None]]:
    """Read AP and AR from the ``results.json`` of an evaluation: percent by metric, by kind.

    Raises:
        UserError: it cannot be read, or has other content.
    """
    return _kinds(_read_object(path), path)


def _kinds(found: dict[str, Any], path: Path) -> dict[str, dict[str, float | None]]:
    kinds: dict[str, dict[str, float | None]] = {}
    for kind, row in found.items():
        if kind in (DIAGNOSIS, VALIDATION):
            continue
        if not isinstance(row, dict):
            raise _damaged(f"{path}: {kind!r} has no metrics by name")
        kinds[kind] = {name: _percent(value, f"{path}: {kind!r}, {name!r}") for name, value in row.items()}
    return kinds


def _percent(value: Any, label: str) -> float | None:
    """Return a percentage; None for null and nan: COCO defines no value there."""
    if value is None or value != value:
        return None
    if type(value) not in (int, float) or not -1 <= value <= 100.001:
        raise _damaged(f"{label} is {shortened(repr(value), 40)}, not a percentage")
    return float(value)


def _damaged(problem: str) -> UserError:
    return UserError("damaged-run-file", f"{problem}; evaluate the run again")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(f"{path} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(f"{path} is not what an evaluation writes")
    return content
