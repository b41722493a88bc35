"""What a run left in its folder."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config, dump_config, load_config, without_paths
from ..engine.checkpoint import BEST
from ..engine.run import best_metric
from ..errors import UserError
from ..files import read_text
from ..visualize import Metrics, metric_points, read_metrics

RESULTS_FILE = "coco_instances_results.json"


@dataclass(frozen=True)
class TestSet:
    """One folder of ``inference/``.

    Attributes:
        name: of the dataset.
        metrics: ``{"bbox": {"AP": ..., ...}, ...}`` in percent, None where COCO defines no value; empty
            where there is no ``results.json``.
        results: the COCO result file, or None.
    """

    name: str
    metrics: dict[str, dict[str, float | None]]
    results: Path | None


@dataclass(frozen=True)
class BestEvaluation:
    """The evaluation whose weights are ``model_best.pth``.

    Attributes:
        metric: that decided, such as ``segm/AP``.
        value, iterations: of it, and how many were trained until then.
        last_value, last_iterations: of the last evaluation.
    """

    metric: str
    value: float
    iterations: int
    last_value: float
    last_iterations: int

    @property
    def is_last(self) -> bool:
        """Whether both are one and the same."""
        return self.iterations == self.last_iterations

    def __str__(self) -> str:
        best = f"{self.metric} was best after {self.iterations} iterations: {self.value:.2f}, kept as {BEST}"
        return f"{best}; the last evaluation, after {self.last_iterations}, found {self.last_value:.2f}"


@dataclass(frozen=True)
class RunFolder:
    """All that a report reads of a run, but for datasets.

    Attributes:
        path: of the folder.
        cfg: of ``config.yaml``.
        config_text: the same as YAML, without folders, as the page is passed on.
        logged: lines of ``metrics.jsonl``; empty where there are none yet.
        tests: by dataset.
        environment: of ``environment.json``; empty for a run that did not write it.
    """

    path: Path
    cfg: Config
    config_text: str
    logged: Metrics
    tests: list[TestSet]
    environment: dict[str, Any]

    def without_folders(self, text: str) -> str:
        """Return a text for the page, in which of local paths the last part stays."""
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
        """The best evaluation so far; None where there was none, or none gave a number."""
        metric = best_metric(self.cfg)
        points = metric_points(self.logged, metric)
        points = points[np.isfinite(points[:, 1])]
        if not len(points):
            return None
        (best, value), (last, last_value) = points[points[:, 1].argmax()], points[-1]
        return BestEvaluation(metric, float(value), int(best) + 1, float(last_value), int(last) + 1)


def read_run(folder: str | Path) -> RunFolder:
    """Read a run's folder; whatever is not there yet is empty.

    Raises:
        UserError: it is no run's folder, or a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run's folder: it has no config.yaml; give the run's OUTPUT_DIR")
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
    return TestSet(folder.name, kinds, results if results.is_file() else None)


def read_results(path: Path) -> dict[str, dict[str, float | None]]:
    """Return what an evaluation wrote into a ``results.json``: percent by metric, by kind.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    found = _read_object(path)
    kinds: dict[str, dict[str, float | None]] = {}
    for kind, row in found.items():
        if not isinstance(row, dict):
            raise UserError(f"{path}: {kind!r} has no metrics by name; evaluate the run again")
        kinds[kind] = {name: _percent(value, f"{path}: {kind!r}, {name!r}") for name, value in row.items()}
    return kinds


def _percent(value: Any, label: str) -> float | None:
    """Return a percentage; None for null and nan, where COCO defines no value."""
    if value is None or value != value:
        return None
    if type(value) not in (int, float) or not -1 <= value <= 100.001:
        raise UserError(f"{label} is {_shown(value)}, not a percentage; evaluate the run again")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); evaluate the run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what an evaluation writes; evaluate the run again")
    return content
