"""``python tools/norm_study.py``: the paper's figure 1 and table 3 on real data, as far as time allows.

Every training is a process of one thread; the study goes on from the figures in its ``results.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from gn_detect.files import atomic_write_json, atomic_write_text

from . import classifier, detector, drawn
from .cells import Cell, Task, plan, quick_plan

TASKS: list[Task] = ["classifier", "detector"]


def main() -> None:
    """Run the cells that have no result yet, then draw what there is."""
    args = _parse()
    path = args.output / ("quick.json" if args.quick else "results.json")
    cells = quick_plan(args.tasks) if args.quick else plan(args.tasks, args.seeds)
    done = json.loads(path.read_text()) if path.exists() else {}
    missing = [cell for cell in cells if cell.name not in done]
    args.output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(cells), initial=len(cells) - len(missing), unit="training") as bar:
        for cell, found in _run(missing, args):
            if path.exists():  # another study may be writing to it
                done |= json.loads(path.read_text())
            done[cell.name] = found
            atomic_write_json(path, dict(sorted(done.items())), indent=1)
            bar.set_postfix_str(cell.name)
            bar.update()
    print(f"{sum(cell.name in done for cell in cells)} of {len(cells)} trainings are done")
    # Also of the tasks that were not asked for this time: the files hold all that is known.
    both = quick_plan(TASKS) if args.quick else plan(TASKS, args.seeds)
    results = {cell: done[cell.name] for cell in both if cell.name in done}
    text = drawn.tables(results)
    print(text)
    if results:
        atomic_write_text(args.output / "tables.md", text + "\n")
        drawn.figure(results, args.output / "norms.png")
        print(f"results: {path}, figure: {args.output / 'norms.png'}, tables: {args.output / 'tables.md'}")


def _run(cells: list[Cell], args: argparse.Namespace) -> Iterator[tuple[Cell, dict[str, float]]]:
    """Each cell with its figures as it ends; none is begun after ``--hours``."""
    end = time.monotonic() + args.hours * 3600
    waiting = iter(cells)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context, initializer=_end_with_parent) as pool:
        running: dict[Future[dict[str, float]], Cell] = {}
        while True:
            while len(running) < args.workers and time.monotonic() < end:
                cell = next(waiting, None)
                if cell is None:
                    break
                running[pool.submit(_measure, cell, args.shared, args.quick)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                if error := future.exception():
                    print(f"{cell.name} failed and is tried again by the next run: {error!r}")
                    end = 0.0  # no other is begun; those that run are kept
                else:
                    yield cell, future.result()


def _end_with_parent() -> None:
    """End all trainings of a study that is killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _measure(cell: Cell, shared: Path, quick: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    measure = classifier.error_of if cell.task == "classifier" else detector.average_precisions
    start = time.monotonic()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        found = measure(cell, shared, quick)
    known = {key: value for key, value in found.items() if value == value}  # COCO has no AP without objects
    return {**known, "seconds": round(time.monotonic() - start, 1)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tools/norm_study.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/norm_study"))
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of the images")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=2.0, help="after which no training is begun")
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side, of one thread each")
    parser.add_argument("--quick", action="store_true", help="see that it works; the figures mean nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
