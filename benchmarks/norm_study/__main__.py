"""``python tools/norm_study.py``: the paper's figure 1 and table 3 on real data, as far as time allows.

Every training is a process of one thread and leaves a file in ``--output``; the study goes on from those.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from gn_detect.files import atomic_write_json

from . import classifier, detector, drawn
from .cells import Cell, plan, quick_plan


def main() -> None:
    """Run the cells that have no file yet, then draw what there is."""
    args = _parse()
    folder = args.output / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    cells = quick_plan(args.tasks) if args.quick else plan(args.tasks, args.seeds)
    missing = [cell for cell in cells if not (folder / f"{cell.name}.json").exists()]
    with tqdm(total=len(cells), initial=len(cells) - len(missing), unit="training") as bar:
        for cell in _run(missing, args, folder):
            bar.set_postfix_str(cell.name)
            bar.update()
    done = {
        cell: json.loads(path.read_text())
        for cell in cells
        if (path := folder / f"{cell.name}.json").exists()
    }
    print(f"{len(done)} of {len(cells)} trainings are done")
    text = drawn.tables(done)
    print(text)
    (args.output / "tables.md").write_text(text + "\n", encoding="utf-8")
    if done:
        drawn.figure(done, args.output / "norms.png")
        print(f"figure: {args.output / 'norms.png'}, tables: {args.output / 'tables.md'}")


def _run(cells: list[Cell], args: argparse.Namespace, folder: Path) -> Iterator[Cell]:
    """Each cell when its file is there; none is begun after ``--hours``."""
    end = time.monotonic() + args.hours * 3600
    waiting = iter(cells)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        running: dict[Future[None], Cell] = {}
        while True:
            while len(running) < args.workers and time.monotonic() < end:
                cell = next(waiting, None)
                if cell is None:
                    break
                running[pool.submit(_measure, cell, args.shared, args.quick, folder)] = cell
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)


def _measure(cell: Cell, shared: Path, quick: bool, folder: Path) -> None:
    torch.set_num_threads(1)
    measure = classifier.error_of if cell.task == "classifier" else detector.average_precisions
    start = time.monotonic()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        found = measure(cell, shared, quick)
    atomic_write_json(folder / f"{cell.name}.json", {**found, "seconds": round(time.monotonic() - start, 1)})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tools/norm_study.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/norm_study"))
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of the images")
    parser.add_argument(
        "--tasks", nargs="+", choices=("classifier", "detector"), default=["classifier", "detector"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=2.0, help="after which no training is begun")
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side, of one thread each")
    parser.add_argument("--quick", action="store_true", help="see that it works; the figures mean nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
