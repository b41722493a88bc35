"""``gn-detect compare``: tell the difference of two runs from the luck of the images."""

from __future__ import annotations

import argparse

from ..errors import UserError
from .output import Result

EXAMPLES = """
gn-detect compare runs/one runs/two
gn-detect compare runs/gn1 runs/gn2 runs/gn3 --to runs/bn1 runs/bn2 runs/bn3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="two evaluated run folders; with --to the first group")
    add("--to", nargs="+", default=[], metavar="RUN", help="second group, such as other seeds of one config")
    add("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap over images")
    add("--seed", type=int, default=0, help="of the resamples")


def run(args: argparse.Namespace) -> Result:
    if args.resamples < 1:
        raise UserError("bad-argument", f"--resamples {args.resamples}: it must be 1 or more")
    if args.seed < 0:
        raise UserError("bad-argument", f"--seed {args.seed}: it must be 0 or more")
    first, second = (args.runs, args.to) if args.to else (args.runs[:1], args.runs[1:])
    if not args.to and len(second) != 1:
        given = f"{len(args.runs)} runs" if second else "one run"
        raise UserError(
            "missing-argument" if not second else "extra-argument",
            f"{given} to compare; give two, or two groups with --to between them",
        )
    from ..report.comparison import as_json, compare_runs, format_comparison

    comparisons = compare_runs(first, second, resamples=args.resamples, seed=args.seed)
    for comparison in comparisons:
        print(f"{comparison.dataset}, {comparison.images} images, {args.resamples} resamples")
        print(format_comparison(comparison))
    return Result({"datasets": as_json(comparisons)})
