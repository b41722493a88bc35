"""Data of any format as the COCO files of a run, in ``OUTPUT_DIR/data``."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..data.formats.builder import WHOLE
from ..data.formats.importing import read_dataset, with_split, write_files
from ..errors import UserError
from ..text import printable
from .folder_lock import is_in_use

FOLDER = "data"
SHARE = 0.8  # of the images that are trained on, where the data have no part for validation


@dataclass(frozen=True)
class RunData:
    """The COCO files of a run.

    Attributes:
        train, val: annotation file and images folder.
        lines: what was done, for people.
    """

    train: tuple[str, str]
    val: tuple[str, str] | None
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(map(printable, self.lines))


def prepare_data(
    path: str | Path, output_dir: str | Path, seed: int = 0, allow_outside: bool = False, resume: bool = False
) -> RunData:
    """Write data as ``train.json``, ``val.json`` and, if there is one, ``test.json`` of a run; images stay.

    Each process of a group writes the same bytes.

    Args:
        path: of the data, in any format that is read.
        output_dir: the run's folder.
        seed: of the split, where there is no part for validation; below 0 for 0.
        allow_outside: ``DATASETS.ALLOW_OUTSIDE``.
        resume: take the files that the run has.

    Raises:
        UserError: the data are wrong, or a training is using the folder.
    """
    folder = Path(output_dir) / FOLDER
    if resume and (folder / "train.json").is_file():
        return _known(folder)
    data = read_dataset(Path(path), allow_outside=allow_outside)
    if "train" not in data.parts and WHOLE not in data.parts:
        raise UserError("no-dataset", f"{path} has no train part, only {', '.join(data.parts)}; add one")
    if "val" not in data.parts:
        data = with_split(data, SHARE, max(seed, 0))
    if os.environ.get("RANK", "0") == "0" and is_in_use(output_dir):
        raise UserError(
            "folder-in-use", f"a training is writing into {output_dir}; choose another OUTPUT_DIR"
        )
    images = str(data.folder)
    info = {"description": f"{data.name}, converted by gn-detect", "images": os.path.abspath(images)}
    files = {part: folder / f"{part}.json" for part in data.parts}
    write_files({files[part]: {"info": info, **content} for part, content in data.parts.items()})
    sizes = [
        f"{part} {len(content['images'])} images with {len(content['annotations'])} objects"
        for part, content in data.parts.items()
    ]
    lines = [f"{path} is {data.name}: {', '.join(sizes)}", *(f"  {note}" for note in data.notes)]
    lines.append(f"  as COCO files in {folder}; their images folder is {images}")
    return RunData((str(files["train"]), images), (str(files["val"]), images), tuple(lines))


def _known(folder: Path) -> RunData:
    """Return the files that a run has."""
    pairs: dict[str, tuple[str, str]] = {}
    for part in ("train", "val"):
        file = folder / f"{part}.json"
        if file.is_file():
            try:
                images = json.loads(file.read_text("utf-8"))["info"]["images"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    "damaged-run-file", f"{file} is damaged; start a new run, with another OUTPUT_DIR"
                ) from error
            pairs[part] = (str(file), str(images))
    return RunData(pairs["train"], pairs.get("val"), (f"the run goes on with {folder}, as it was made",))
