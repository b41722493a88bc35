"""``gn-detect report``: write a run as one HTML page."""

from __future__ import annotations

import argparse

from ..errors import UserError
from .options import check_threshold
from .output import Result

EXAMPLES = """
gn-detect report runs/one
gn-detect report runs/one --output page.html --threshold 0.3 --pictures 12
gn-detect report runs/two --against runs/one
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder")
    add("--output", metavar="FILE", help="page; by default report.html in the run folder")
    add("--threshold", type=float, default=0.5, help="least score in pictures, confusion and table of images")
    add("--against", metavar="RUN", help="another run, of which the page shows the differences")
    add("--pictures", type=int, default=6, metavar="N", help="of the worst and of the best images, each")


def run(args: argparse.Namespace) -> Result:
    check_threshold(args.threshold)
    if args.output and not args.output.lower().endswith((".html", ".htm")):
        raise UserError("wrong-ending", f"cannot write the page {args.output}: its name must end in .html")
    if args.pictures < 0:
        raise UserError("bad-argument", f"--pictures {args.pictures}: it must be 0 or more")
    from ..report import write_report

    path = write_report(
        args.run, args.output, threshold=args.threshold, pictures=args.pictures, against=args.against
    )
    size = path.stat().st_size
    shown = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
    print(f"see {path} ({shown})")
    return Result({"output": str(path), "bytes": size})
