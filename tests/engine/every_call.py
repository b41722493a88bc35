"""Kills a short run at every call that touches its folder, once each, and within its evaluations.

``python -m tests.engine.chaos --every-call``. After each kill the run is resumed, and all that it leaves is
compared with what an undisturbed run leaves: checkpoints with optimiser and rates, metrics, results, and the
names of the files.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gn_detect.engine.metrics import MetricsWriter
from gn_detect.evaluation import model as evaluation
from tests.engine.chaos import differences, metrics_of, start, wait_for
from tests.engine.tiny import make_dataset, write_config

KEYS = [
    "SOLVER.MAX_ITER",
    "4",
    "SOLVER.CHECKPOINT_PERIOD",
    "2",
    "TEST.EVAL_PERIOD",
    "2",
    "CHECKPOINT.KEEP",
    "1",
]
KEYS += ["SOLVER.LOG_PERIOD", "1"]

CHANGES = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "chmod", "link", "symlink", "truncate")
WITH_DESCRIPTOR = ("fsync", "ftruncate", "fchmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
VARYING = ("events.out.tfevents", "log.txt", "environment.json", "config.yaml", ".lock")
"""Files whose content or name is of an attempt, or holds the name of the folder."""


class Places:
    """Counts the places of this process where it may be killed.

    Args:
        folder: of the run.
        log: gets the name of each place.
        target: the one where it is killed, from 1; 0 for none.
        after: it is killed after the call instead of before.
    """

    def __init__(self, folder: Path, log: Path, target: int, after: bool) -> None:
        self.folder, self.log, self.target, self.after = str(folder), log, target, after
        self.count, self.busy = 0, False

    def install(self) -> None:
        """Watch the functions of this process."""
        for name in CHANGES:
            setattr(os, name, self._watched(name, getattr(os, name), self._is_inside))
        for name in WITH_DESCRIPTOR:
            setattr(os, name, self._watched(name, getattr(os, name), lambda *_, **__: True))
        os.open = self._watched("os.open", os.open, self._opens)  # type: ignore[assignment]
        builtins.open = io.open = self._watched("open", io.open, self._writes)  # type: ignore[assignment]
        MetricsWriter.write = self._watched(  # type: ignore[method-assign]
            "metrics line", MetricsWriter.write, lambda *_: True
        )
        for name in ("detections_to_coco", "evaluate_and_diagnose"):
            setattr(evaluation, name, self._watched(name, getattr(evaluation, name), lambda *_: True))

    def _is_inside(self, path: Any, *_: Any, dir_fd: int | None = None, **__: Any) -> bool:
        return dir_fd is not None or (isinstance(path, str | Path) and str(path).startswith(self.folder))

    def _opens(self, path: Any, flags: int, *_: Any, **__: Any) -> bool:
        return bool(flags & WRITING) and self._is_inside(path)

    def _writes(self, path: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return bool(set(mode) & set("wax+")) and self._is_inside(path)

    def _watched(
        self, name: str, real: Callable[..., Any], counts: Callable[..., bool]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.busy or not counts(*args, **kwargs):
                return real(*args, **kwargs)
            self.busy = True
            self.count += 1
            with self.log.open("a") as file:
                file.write(
                    f"{name} {Path(str(args[0])).name if name in (*CHANGES, 'open', 'os.open') else ''}\n"
                )
            self.busy = False
            here = self.count == self.target
            if here and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def attempt(folder: Path, processes: int, target: int, after: bool = False) -> tuple[list[str], list[int]]:
    """Train in ``folder`` until the end or the target. Returns the names of the places, and the statuses."""
    log = folder / "places.txt"
    log.unlink(missing_ok=True)
    places = Places(folder / "run", log, target, after)
    children = start(folder / "tiny.yaml", folder, processes, KEYS, places.install)
    first = wait_for(children[:1])
    if first[0] != 0:
        for child in children[1:]:  # as launchers do
            os.kill(child, signal.SIGKILL)
    return log.read_text().splitlines() if log.exists() else [], first + wait_for(children[1:])


def compare_folders(one: Path, other: Path) -> list[str]:
    """Return the files of two finished runs that are not equal."""
    files = [{str(p.relative_to(f / "run")) for p in (f / "run").rglob("*")} for f in (one, other)]
    names, found_names = ({n for n in part if not n.startswith(VARYING[0])} for part in files)
    found = sorted(names ^ found_names)
    for name in sorted(names & found_names):
        paths = one / "run" / name, other / "run" / name
        if name.endswith(".pth"):
            contents = [torch.load(path, weights_only=True) for path in paths]
            found += [f"{name}{place}" for place in differences(*contents)]
        elif name == "metrics.jsonl":
            found += [] if metrics_of(one) == metrics_of(other) else [name]
        elif paths[0].is_file() and name not in VARYING and not name.endswith(".png"):
            found += [] if paths[0].read_bytes() == paths[1].read_bytes() else [name]
    return found


@contextlib.contextmanager
def run_folders(processes: int) -> Iterator[tuple[Path, Callable[[], Path], list[str]]]:
    """An undisturbed run, a maker of folders for others, and the places where the former could be killed."""
    for name in ("hotcoco", "matplotlib.figure", "matplotlib.backends.backend_agg", "tensorboard.summary"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)  # once, before the forks
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        train, val = make_dataset(base / "train", 4, seed=1), make_dataset(base / "val", 2, seed=2)

        def make(name: str = "disturbed") -> Path:
            shutil.rmtree(base / name, ignore_errors=True)
            (base / name).mkdir()
            write_config(base / name, train, val)
            return base / name

        whole = make("undisturbed")
        places, statuses = attempt(whole, processes, 0)
        if any(statuses):
            raise SystemExit((whole / "output_0.txt").read_text()[-3000:])
        yield whole, make, places


def disturb_at(folder: Path, processes: int, target: int, after: bool, second: int = 0) -> None:
    """Kill a run at a place, then the resumed one at another, if ``second`` is not 0; finish it."""
    attempt(folder, processes, target, after)
    if second:
        attempt(folder, processes, second)
    if any(attempt(folder, processes, 0)[1]):
        raise SystemExit((folder / "output_0.txt").read_text()[-3000:])


def kill_at_every_call(processes: int, every: int = 1, twice: bool = False, first: int = 1) -> int:
    """Kill before each place, and after it. Prints differences, and returns 1 if there are any.

    Args:
        processes: that train together.
        every: kill at each so many places alone.
        twice: kill the resumed run, too.
        first: the place to begin with.
    """
    kills, found = Counter[str](), []
    with run_folders(processes) as (whole, make, places):
        for number in range(first, len(places) + 1, every):
            for after in (False, True):
                folder = make()
                second = 1 + number % 40 if twice else 0
                disturb_at(folder, processes, number, after, second)
                kills[places[number - 1].split(" ")[0]] += 1
                different = compare_folders(whole, folder)
                when = "after" if after else "before"
                found += [f"killed {when} {number} ({places[number - 1]}): {d}" for d in different]
                for line in found[len(found) - len(different) :]:
                    print(line, flush=True)
    print(f"{processes} processes, {len(places)} places: {sum(kills.values())} kills, {json.dumps(kills)}")
    print(f"differences: {len(found)}")
    return int(bool(found))
