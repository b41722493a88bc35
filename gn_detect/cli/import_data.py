"""``gn-detect import``: annotations of other tools become COCO files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import check_writable
from ..text import printable
from .output import Result

if TYPE_CHECKING:
    from ..data.formats.builder import Imported

EXAMPLES = """
gn-detect import FOLDER data.json
gn-detect import FOLDER data.json --split 0.8                 # data_train.json and data_val.json
gn-detect import yolo/data.yaml data.json
gn-detect import annotations.xml data.json --images FOLDER
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a folder or file of annotations; it is not changed")
    parser.add_argument("target", metavar="DST.json", help="the COCO file; parts get names of their own")
    parser.add_argument(
        "--images", metavar="FOLDER", help="the images, searched in depth; by default SRC or its folder"
    )
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="yolo, voc, labelme, cvat, via, label-studio, coco, masks, or masks-files, masks-binary, "
        "masks-instances or masks-classes; recognised by default",
    )
    parser.add_argument(
        "--split", metavar="SHARE", type=float, help="share of the images in a train part, the others in val"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument(
        "--allow-outside",
        action="store_true",
        help="images may lie outside of the folder (DATASETS.ALLOW_OUTSIDE)",
    )


def run(args: argparse.Namespace) -> Result:
    target = Path(args.target)
    if target.suffix.lower() != ".json":
        raise UserError("wrong-ending", f"cannot write {target}: its name must end in .json")
    if args.split is not None and not 0 < args.split < 1:
        raise UserError("bad-argument", f"--split {args.split:g}: it must be between 0 and 1, such as 0.8")
    if args.seed < 0:
        raise UserError("bad-argument", f"--seed {args.seed}: it must be 0 or more")
    check_writable(target)

    from ..data.formats.importing import (
        READERS,
        check_targets,
        part_files,
        read_dataset,
        with_split,
        write_files,
    )

    if args.format and args.format not in READERS:
        raise UserError(
            "bad-argument", f"--format {args.format}: there is no such format; choose {', '.join(READERS)}"
        )
    images = Path(args.images) if args.images else None
    data = read_dataset(Path(args.source), images, args.format or "", args.allow_outside)
    if args.split is not None:
        data = with_split(data, args.split, args.seed)
    files = part_files(data, target)
    check_targets(data, files)
    write_files({files[part]: content for part, content in data.parts.items()})
    print(f"{printable(args.source)} is {data.name}")
    for note in data.notes:
        print(f"  {printable(note)}")
    print()
    _print_table(data, files)
    _print_next(data, files)
    written = {part: str(path) for part, path in files.items()}
    return Result({"format": data.name, "images": str(data.folder), "files": written, "notes": data.notes})


def _print_table(data: Imported, files: dict[str, Path]) -> None:
    """Print the doctor's tables of the files that were written; images stay closed."""
    from ..data.datasets import DatasetSource
    from ..data.doctor.report import examine

    sources = [DatasetSource(path.name, path, data.folder) for path in files.values()]
    print(examine(sources, open_images=False))


def _print_next(data: Imported, files: dict[str, Path]) -> None:
    from .train import command

    train = files.get("train", next(iter(files.values())))
    words = ["train", "--train-json", str(train), "--train-images", str(data.folder)]
    if "val" in files:
        words += ["--val-json", str(files["val"]), "--val-images", str(data.folder)]
    print("\nwrote " + ", ".join(printable(path) for path in files.values()))
    print("next: " + command(*words))
