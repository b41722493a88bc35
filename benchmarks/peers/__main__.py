"""``python -m benchmarks.peers NAME``: train the nuclei recipe in a library, and record time, AP and memory.

A training has a process of its own with one thread. It writes checkpoints as its library does; each is
evaluated afterwards by pycocotools in another process. Seconds are those of the processor from the end of the
first step to the end of the step before the checkpoint, so start and evaluations are not counted, and other
work on the machine changes them little. A later call with the same folder goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import multiprocessing
import sys
import tokenize
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from gn_detect.files import atomic_write_json

from . import ITERATIONS, REPOSITORY
from .measure import evaluate, measure

RESULTS = REPOSITORY / "benchmarks" / "results" / "peers.json"
NAMES = ("gn_detect", "torchvision", "detectron2", "mayaku")


def main() -> None:
    """Train, evaluate and record, as far as that is not done yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--model", default="", help="of the script's MODELS; by default the first")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("output/peers"), help="for checkpoints")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="another number is not recorded")
    args = parser.parse_args()
    try:
        peer = import_module(f".with_{args.name}", __package__)
    except ModuleNotFoundError as error:
        parser.error(f"{error}; benchmarks/README.md says how to install {args.name}")
    model = args.model or peer.MODELS[0]
    if model not in peer.MODELS:
        parser.error(f"--model {model} is not in {peer.MODELS}")
    key = f"{args.name}, {model}, seed {args.seed}"
    if key in read(RESULTS):
        print(f"{key} is done")
        return
    folder = args.work / f"{key}, {args.iterations}".replace(", ", "-").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    trained = once(
        folder / "trained.json", measure, args.name, folder.resolve(), args.seed, args.iterations, model
    )
    evaluations = []
    steps = trained.pop("seconds")
    for iteration, seconds in enumerate(steps, start=1):
        checkpoint = folder / peer.CHECKPOINT.format(iteration=iteration, last=iteration - 1)
        if iteration == len(steps) and not checkpoint.exists():
            checkpoint = folder / "model_final.pth"  # gn_detect writes its last weights once
        if checkpoint.exists():
            path = folder / f"evaluated-{iteration}.json"
            found = once(path, evaluate, args.name, checkpoint.resolve(), model)
            evaluations.append({"iteration": iteration, "seconds": seconds, **found})
            print(f"{key}: {evaluations[-1]}", flush=True)
    lines = {"script": code_lines(Path(peer.__file__).read_text("utf-8")), "config": config_lines(peer)}
    record = {"lines": lines, **trained, "evaluations": evaluations}
    if args.iterations == ITERATIONS:
        atomic_write_json(RESULTS, read(RESULTS) | {key: record}, indent=1)
    print(f"{key}: {record}")


def read(path: Path) -> dict[str, Any]:
    """Return a file's content, or nothing without the file."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def once(path: Path, function: Callable[..., dict[str, Any]], *args: object) -> dict[str, Any]:
    """Return what the file holds, or else call the function in a process of its own and keep its result."""
    if not path.exists():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            atomic_write_json(path, pool.submit(function, *args).result())
    return read(path)


def config_lines(peer: Any) -> int:
    """Return the lines of a script's configs, without blanks and comments."""
    lines = [line.strip() for path in peer.CONFIGS for line in path.read_text("utf-8").splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def code_lines(source: str) -> int:
    """Return the number of lines with code in Python source, without docstrings and imports."""
    left_out = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*left_out, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


if __name__ == "__main__":
    sys.exit(main())
