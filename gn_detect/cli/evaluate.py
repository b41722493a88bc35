"""``gn-detect eval``: the same as ``gn-detect train --eval-only``."""

from __future__ import annotations

import argparse

from . import train

HELP = "Evaluate a checkpoint, MODEL.WEIGHTS, on DATASETS.TEST."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    train.add_arguments(parser)
    parser.set_defaults(eval_only=True)


def run(args: argparse.Namespace) -> None:
    """Evaluate."""
    train.run(args)
