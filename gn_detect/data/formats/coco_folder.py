"""Read a COCO file with its images, or a folder of COCO files, such as Roboflow's train, valid and test."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..coco.canonical import Notes
from ..coco.reader import read_canonical
from ..coco.rules import Rules
from .builder import PART_WORDS, PARTS, WHOLE, Imported
from .image_index import ImageIndex
from .recognise import coco_files


def read(path: Path, index: ImageIndex) -> Imported:
    """Read the COCO files; their entries are checked when they are trained on.

    Raises:
        UserError: a file is not COCO, the parts are not clear, or an image is missing.
    """
    files = [path] if path.is_file() else coco_files(path)
    if not files:
        raise UserError("unknown-format", f"{path} holds no COCO file; name one")
    parts = {file: _part(file) for file in files} if len(files) > 1 else {files[0]: ""}
    named = [part for part in parts.values() if part]
    if len(files) > 1 and (len(named) < len(files) or len(set(named)) < len(named)):
        raise UserError(
            "unknown-format",
            f"{path} holds several COCO files, such as {files[0]} and {files[1]}, whose names do not say "
            "which is train, val and test; give them by --train-json and --val-json",
        )
    notes = Notes()
    own: list[str] = []
    contents: dict[str, dict[str, Any]] = {}
    places: list[tuple[dict[str, Any], Path]] = []
    for file, part in parts.items():
        read_file = read_canonical(file)
        content = dict(read_file.content)
        own += [f"{file.name}: {note}" for note in read_file.notes]
        images = []
        for position, entry in enumerate(content["images"]):
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                images.append(entry)
                continue
            found, moved = index.find(name, file.parent, f"{file}: image {entry.get('id', position)!s:.40}")
            if moved:
                notes.add("images whose path is another one here are taken by their name", name)
            images.append(entry := dict(entry))
            places.append((entry, found))
        content["images"] = images
        contents[part or WHOLE] = content
    if not places:
        raise UserError("empty-list", f"{files[0]} lists no images; give a file with images")
    folder = index.common_folder(place for _, place in places)
    for entry, place in places:
        entry["file_name"] = Path(os.path.relpath(place, folder)).as_posix()
    for file, part in parts.items():
        _check(contents[part or WHOLE], Rules(file, folder, evaluation=True))
    ordered = {part: contents[part] for part in (*PARTS, WHOLE) if part in contents}
    return Imported("COCO", folder, ordered, [*own, *map(str, notes.values())], set(files))


def _check(content: dict[str, Any], rules: Rules) -> None:
    """Refuse what no training takes, before anything is written; masks are checked when they are read."""
    rules.whole(content)
    names = rules.categories(content["categories"])
    images = rules.images(content["images"])
    for _ in rules.annotations(content["annotations"], images, names):
        pass


def _part(file: Path) -> str:
    """Return the part that a file's name says, or else its folder's."""
    for text in (file.stem, file.parent.name):
        words = re.findall(r"[a-z]+", text.lower())
        if found := [PART_WORDS[word] for word in words if word in PART_WORDS]:
            return found[0]
    return ""
