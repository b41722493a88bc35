"""Read a dataset of any format that is known, and write it as COCO files, all of them or none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import atomic_write
from . import coco_folder, cvat, label_studio, labelme, masks, via, voc, yolo
from .builder import WHOLE, Imported
from .image_index import ImageIndex
from .recognise import describe_foreign, find_format
from .split import split_content

READERS: dict[str, Callable[[Path, ImageIndex], Imported]] = {
    "yolo": yolo.read,
    "voc": voc.read,
    "labelme": labelme.read,
    "cvat": cvat.read,
    "via": via.read,
    "label-studio": label_studio.read,
    "masks": masks.read,
    **{f"masks-{reading}": partial(masks.read, reading=reading) for reading in masks.READINGS},
    "coco": coco_folder.read,
}


def read_dataset(
    path: Path, images: Path | None = None, kind: str = "", allow_outside: bool = False
) -> Imported:
    """Read data of a known format as COCO content. Nothing is written.

    Args:
        path: of a file or folder.
        images: the folder in which the images are; by default ``path`` or the file's folder.
        kind: key of :data:`READERS`; recognised if empty.
        allow_outside: names may lead out of that folder (``DATASETS.ALLOW_OUTSIDE``).

    Raises:
        UserError: the format is unknown, or something in the data is wrong.
    """
    if not path.exists():
        raise UserError("missing-annotations", f"there is no {path}; correct the path")
    if images is not None and not images.is_dir():
        raise UserError("missing-images-folder", f"images folder {images} is missing; correct --images")
    index = ImageIndex(images or (path if path.is_dir() else path.parent), allow_outside)
    if not kind:
        kinds = find_format(path)
        if not kinds and path.is_dir() and masks.find_pairs(index):
            kinds = ["masks"]
        readable = [found for found in kinds if found in READERS]
        if len(readable) > 1:
            raise UserError(
                "unknown-format",
                f"{path} holds several formats, {' and '.join(readable)}; choose one by gn-detect import "
                "--format",
            )
        if not readable:
            found = describe_foreign(path).removeprefix("it is a folder; give the COCO annotation file")
            known = ", ".join(READERS)
            reason = found or f"it has none of the formats {known}; name it by gn-detect import --format"
            raise UserError("unknown-format", f"{path}: {reason}")
        kind = readable[0]
    try:
        return READERS[kind](path, index)
    except RecursionError as error:
        raise UserError("damaged-labels", f"{path} is nested too deep; export it again") from error


def with_split(data: Imported, share: float, seed: int) -> Imported:
    """Return the dataset with a part for validation: from ``train``, or from the whole.

    Raises:
        UserError: it has one already, or cannot be split.
    """
    if "val" in data.parts:
        raise UserError("bad-argument", f"{data.name} has a val part already; leave out --split")
    name = "train" if "train" in data.parts else WHOLE
    if name not in data.parts:
        raise UserError(
            "bad-argument", f"{data.name} has {', '.join(data.parts)}, and no train part to split"
        )
    train, val, how = split_content(data.parts[name], data.folder, share, seed)
    others = {part: content for part, content in data.parts.items() if part != name}
    return Imported(
        data.name,
        data.folder,
        {"train": train, "val": val, **others},
        [*data.notes, how],
        data.sources,
    )


def part_files(data: Imported, target: Path) -> dict[str, Path]:
    """Return the file of each part: ``target`` for the whole, ``target_train.json`` and so on for parts."""
    if list(data.parts) == [WHOLE]:
        return {WHOLE: target}
    return {part: target.with_name(f"{target.stem}_{part}{target.suffix}") for part in data.parts}


def write_files(contents: Mapping[Path, Mapping[str, Any]]) -> None:
    """Write COCO files: all are complete before the first gets its name.

    Raises:
        UserError: one cannot be written.
    """
    with ExitStack() as stack:
        for path, content in contents.items():
            json.dump(content, stack.enter_context(atomic_write(path)))


def check_targets(data: Imported, files: Mapping[str, Path]) -> None:
    """Refuse to replace what was read.

    Raises:
        UserError: a file is one of the sources.
    """
    sources = set(map(os.path.realpath, data.sources))
    for path in files.values():
        if os.path.realpath(path) in sources:
            raise UserError("replaced-file", f"{path} is an input and would be replaced; choose another name")
