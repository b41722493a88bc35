"""``gn-detect replay``."""

from __future__ import annotations

import argparse

from ..engine import replay

HELP = "Repeat a training step whose loss or gradient was not finite, from its black box."

EXAMPLES = """
gn-detect replay runs/one/black_box/iteration_0000123
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("folder", help="OUTPUT_DIR/black_box/iteration_N")


def run(args: argparse.Namespace) -> None:
    """Print the losses, and the first module whose output or gradient is not finite."""
    for rank, finding in replay(args.folder).items():
        for name, value in finding.losses.items():
            print(f"process {rank}: {name} {value:.6g}")
        print(f"process {rank}: {finding}")
