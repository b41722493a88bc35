"""``python -m benchmarks.transfer``: fine-tuning with few images per worker, frozen BN against converted GN.

Every training is recorded as it ends, and a later call goes on from there. A training has one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from gn_detect.files import atomic_write_json, atomic_write_text

from . import gradients, plan, slides, summary
from .arms import ARMS, CAUSES
from .data import SLIDES, folds
from .pretrained import PRETRAINED
from .training import Place, fine_tune

RESULTS = SLIDES.parent


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/dsb2018"))
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("slides", help="group the images by slide, and write results/transfer/slides.json")
    run = commands.add_parser("run", help="run the cells of a study that have no result yet")
    run.add_argument("study", choices=plan.STUDIES)
    run.add_argument("--work", type=Path, default=Path("output/transfer"), help="for checkpoints")
    run.add_argument("--hours", type=float, default=1.0, help="after which no training is begun")
    run.add_argument("--only", default="", help="part of the units and names of cells to run")
    first = commands.add_parser("gradients", help="measure the first step of each arm of the study of causes")
    first.add_argument("--work", type=Path, default=Path("output/transfer"), help="for checkpoints")
    commands.add_parser("summary", help="compute intervals, and write results/transfer/summary.json")
    args = parser.parse_args()
    if args.command == "slides":
        content = {"slides": slides.group(args.data)}
        atomic_write_text(SLIDES, json.dumps(content, indent=0) + "\n")
        print(slides.describe(args.data, content["slides"]))
    elif args.command == "summary":
        found = summary.summarise(args.data, RESULTS)
        atomic_write_json(RESULTS / "summary.json", found, indent=1)
        print(summary.in_words(found))
    elif args.command == "gradients":
        measure_gradients(args)
    else:
        run_study(args)


def run_study(args: argparse.Namespace) -> None:
    """Run missing cells until the time is over."""
    torch.set_num_threads(1)
    end = time.monotonic() + args.hours * 3600
    places = {name: Place(args.data, args.work, name, fold) for name, fold in folds(args.data).items()}
    (RESULTS / args.study).mkdir(parents=True, exist_ok=True)
    for cell in plan.cells(args.study, RESULTS):
        if time.monotonic() > end:
            print("the time is over; the same command continues")
            return
        path = RESULTS / args.study / f"{cell.unit}.json"
        done = read(path)
        if cell.name not in done and args.only in f"{cell.unit}: {cell.name}":
            place = places[cell.fold]
            arm = PRETRAINED[cell.arm] if place.is_pretrained else (ARMS | CAUSES)[cell.arm]
            record = fine_tune(place, cell, arm)
            atomic_write_json(path, read(path) | {cell.name: record}, indent=1)
            print(f"{cell.unit}: {cell.name}: AP {record['AP']}, {record['seconds']} s", flush=True)


def measure_gradients(args: argparse.Namespace) -> None:
    """Measure the first step of the arms that have no result yet."""
    torch.set_num_threads(1)
    path = RESULTS / "gradients.json"
    places = {fold: Place(args.data, args.work, fold, folds(args.data)[fold]) for fold in plan.GRADIENT_FOLDS}
    for fold, seed, arm in product(plan.GRADIENT_FOLDS, plan.CAUSE_SEEDS, plan.GRADIENT_ARMS):
        key = f"{fold}, images {seed}, {arm}"
        if key not in read(path):
            found = gradients.measure(places[fold], 1, arm, (ARMS | CAUSES)[arm], seed)
            atomic_write_json(path, read(path) | {key: found}, indent=1)
            print(f"{key}: {found}", flush=True)


def read(path: Path) -> dict[str, Any]:
    """Return the records of a file; none if it is not there."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


if __name__ == "__main__":
    main()
