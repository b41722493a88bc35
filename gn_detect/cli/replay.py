"""``gn-detect replay``."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..engine import replay
from ..text import printable
from .output import Result

HELP = "Repeat a training step whose loss or gradient was not finite, from its black box."

EXAMPLES = """
gn-detect replay runs/one/black_box/iteration_0000123
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder."""
    parser.add_argument("folder", help="OUTPUT_DIR/black_box/iteration_N")


def run(args: argparse.Namespace) -> Result:
    """Print the losses, and the first module whose output or gradient is not finite."""
    findings = replay(args.folder)
    for rank, finding in findings.items():
        for name, value in finding.losses.items():
            print(printable(f"process {rank}: {name} {value:.6g}"))
        print(printable(f"process {rank}: {finding}"))
    return Result({str(rank): asdict(finding) for rank, finding in findings.items()})
