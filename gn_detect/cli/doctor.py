"""``gn-detect doctor``: faults of annotation files and images, and a repaired copy."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import atomic_write_json, atomic_write_text
from ..text import printable
from .output import Result

if TYPE_CHECKING:
    from ..data.coco.rules import Rules
    from ..data.datasets import DatasetSource
    from ..data.doctor.repair import Repair

EXAMPLES = """
gn-detect doctor train.json --images images
gn-detect doctor train.json --images images val.json --images images --strict
gn-detect doctor train.json --images images --fix fixed.json --report report.json
gn-detect doctor train.json --images images --json            # the whole diagnosis on standard output
"""

# Exit status of --strict.
FOUND = 1

_LINES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="COCO annotations, one file for each part")
    parser.add_argument(
        "--images", metavar="FOLDER", action="append", help="images of each FILE, in their order"
    )
    parser.add_argument("--no-images", action="store_true", help="look at the JSON alone; quick")
    parser.add_argument("--no-masks", action="store_true", help="objects need no masks (MODEL.MASK_ON False)")
    parser.add_argument("--report", metavar="FILE", help="write report.json, and a picture of the data, .png")
    parser.add_argument("--fix", metavar="FILE", help="write a repaired copy of the (first) annotation file")
    parser.add_argument(
        "--drop", action="store_true", help="with --fix: go on where more than 5%% of the objects are removed"
    )
    parser.add_argument(
        "--no-crowds", action="store_true", help="with --fix: each crowd is one object ('iscrowd' becomes 0)"
    )
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="images may have absolute names, or .. in them (DATASETS.ALLOW_OUTSIDE)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there are errors or warnings")


def run(args: argparse.Namespace) -> Result:
    _check_files(args)
    from ..data.doctor.report import examine
    from ..visualize.histograms import draw_histograms

    sources = _sources(args)
    written = [Path(path) for path in (args.fix, args.report) if path]
    pictures = [Path(args.report).with_suffix(".png")] if args.report else []
    if len(set(map(os.path.realpath, written + pictures))) < len(written + pictures):
        raise UserError(
            "replaced-file", "--fix, --report and the picture of --report (.png) need different names"
        )
    inputs = {os.path.realpath(source.annotations) for source in sources}
    if not inputs.isdisjoint(map(os.path.realpath, written)):
        raise UserError(
            "replaced-file", "--fix and --report must not name an input: the doctor never changes it"
        )
    diagnosis = examine(
        sources, open_images=not args.no_images, masks=not args.no_masks, crowds=not args.no_crowds
    )
    print(diagnosis)
    if args.report:
        report = Path(args.report)
        atomic_write_json(report, diagnosis.as_json(), indent=1)
        draw_histograms(report.with_suffix(".png"), diagnosis.parts)
        print(f"see {report} and {report.with_suffix('.png')}")
    if args.fix:
        _fix(Path(args.fix), diagnosis.fix, diagnosis.parts[0].rules, args.drop)
    status = FOUND if args.strict and not diagnosis.healthy else 0
    return Result(diagnosis.as_json(), status)


def _check_files(args: argparse.Namespace) -> None:
    if not args.files:
        raise UserError("missing-argument", "no annotation file: gn-detect doctor train.json --images FOLDER")
    if args.images is None and not args.no_images:
        raise UserError(
            "missing-argument", "--images FOLDER is missing, one for each annotation file; or add --no-images"
        )
    args.images = args.images or [Path(file).parent for file in args.files]
    if len(args.files) != len(args.images):
        counts = f"{len(args.files)} annotation files but {len(args.images)} --images"
        raise UserError("missing-argument", f"{counts}; give each annotation file its folder")


def _sources(args: argparse.Namespace) -> list[DatasetSource]:
    from ..data.datasets import DatasetSource

    sources: list[DatasetSource] = []
    for file, images in zip(map(Path, args.files), map(Path, args.images), strict=True):
        if not images.is_dir() and not args.no_images:
            raise UserError(
                "missing-images-folder",
                f"images folder {images} is missing; correct --images, or add --no-images",
            )
        known = any(other.name == file.name for other in sources)
        name = str(file) if known else file.name
        sources.append(DatasetSource(name, file, images, args.allow_outside))
    return sources


def _fix(output: Path, mended: Repair, rules: Rules, dropping: bool) -> None:
    if mended.removals:
        print(f"\n--fix removes {len(mended.removals)}:")
    try:
        mended.check(rules, dropping)
    except UserError:
        _print_some(mended.removals, "--report FILE has the ids of all")
        raise
    _list(mended.removals, output, "removals")
    atomic_write_json(output, mended.content)
    print(f"\nwrote {output}: {mended.num_changes} repaired, {len(mended.removals)} removed of {rules.path}")
    _list(mended.changes, output, "changes")


def _list(lines: list[str], output: Path, what: str) -> None:
    """Print the first lines; if there are more, write all of them into a file next to the output."""
    listed = output.with_name(f"{output.stem}_{what}.txt")
    if len(lines) > _LINES_SHOWN:
        atomic_write_text(listed, "".join(f"{printable(line)}\n" for line in lines))
    _print_some(lines, f"see {listed}")


def _print_some(lines: list[str], others: str) -> None:
    for line in lines[:_LINES_SHOWN]:
        print(f"  {printable(line)}")
    if len(lines) > _LINES_SHOWN:
        print(f"  and {len(lines) - _LINES_SHOWN} more: {others}")
