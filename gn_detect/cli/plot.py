"""``gn-detect plot``: the curves of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..visualize import plot_curves

HELP = "Draw losses, AP and learning rate of a run."

EXAMPLES = """
gn-detect plot runs/one
gn-detect plot runs/one --output curves.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("run", metavar="RUN", help="run folder, or its metrics.jsonl")
    parser.add_argument("--output", metavar="FILE", help="picture; by default curves.png in the run folder")


def run(args: argparse.Namespace) -> None:
    """Write the picture."""
    source = Path(args.run)
    metrics = source / "metrics.jsonl" if source.is_dir() else source
    output = Path(args.output) if args.output else metrics.parent / "curves.png"
    plot_curves(metrics, output)
    print(f"see {output}")
