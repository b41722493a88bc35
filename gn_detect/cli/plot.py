"""``gn-detect plot``: draw the curves of a run, or of several on one figure."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import UserError
from .output import Result

EXAMPLES = """
gn-detect plot runs/one
gn-detect plot runs/one --output curves.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder, or its metrics.jsonl")
    add(
        "--output",
        metavar="FILE",
        help="picture, .png or .svg; by default curves.png in the folder of the only run, or here",
    )
    add("--smooth", type=int, default=1, metavar="N", help="mean of N log lines for losses")


def run(args: argparse.Namespace) -> Result:
    if args.smooth < 1:
        raise UserError("bad-argument", f"--smooth {args.smooth}: it must be 1 or more log lines")
    paths = [Path(text) for text in args.runs]
    metrics = [path / "metrics.jsonl" if path.is_dir() else path for path in paths]
    folder = metrics[0].parent if len(metrics) == 1 else Path()
    output = Path(args.output) if args.output else folder / "curves.png"
    names = name_runs(metrics)
    from ..visualize import plot_curves

    plot_curves(dict(zip(names, metrics, strict=True)), output, smooth=args.smooth)
    print(f"see {output}")
    return Result({"output": str(output), "runs": names})


def name_runs(metrics: list[Path]) -> list[str]:
    """Return the shortest ends of the runs' paths that differ; a UserError if one is given twice."""
    folders = [Path(os.path.realpath(path)).parent.parts for path in metrics]
    if len(set(folders)) < len(folders):
        raise UserError("extra-argument", "the same run is given twice; name each once")
    lengths = range(1, max(map(len, folders)) + 1)
    named = (["/".join(parts[-length:]) for parts in folders] for length in lengths)
    return next(names for names in named if len(set(names)) == len(names))
