"""``gn-detect replay``."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..text import printable
from .output import Result

EXAMPLES = """
gn-detect replay runs/one/black_box/iteration_0000123
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="OUTPUT_DIR/black_box/iteration_N")


def run(args: argparse.Namespace) -> Result:
    from ..engine import replay

    findings = replay(args.folder)
    for rank, finding in findings.items():
        for name, value in finding.losses.items():
            print(printable(f"process {rank}: {name} {value:.6g}"))
        print(printable(f"process {rank}: {finding}"))
    return Result({str(rank): asdict(finding) for rank, finding in findings.items()})
