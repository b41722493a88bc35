"""Seeded damage to datasets of other formats: each is refused, or what comes out of it can be trained on."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pycocotools.mask as coco_mask

from gn_detect.data import CocoDataset, DatasetSource
from gn_detect.data.formats.importing import read_dataset, write_files
from gn_detect.errors import UserError
from tests.data.format_writers import WRITERS
from tests.engine.tiny import make_dataset
from tests.fuzz.damage import damage_bytes
from tests.fuzz.limits import Case
from tests.fuzz.trial import Tally

VALUES = (
    b"nan", b"1e999", b"-1", b"0", b"1", b"0.5", b"3", b"null", b"[]", b"{}", b'"x"', b'"../a"', b"true",
    b"9" * 30, b"\xff", b"\0", b"<", b"&x;", b"[[[[", b"",
)  # fmt: skip


def prepare_formats(folder: Path) -> Case:
    """Damage one file of a small dataset in one format after the other."""
    made = make_dataset(folder / "made", 3)
    content = json.loads(made.read_text())
    for annotation in content["annotations"][::2]:
        mask = coco_mask.merge(coco_mask.frPyObjects(annotation["segmentation"], 64, 80))
        annotation["segmentation"] = {"size": [64, 80], "counts": mask["counts"].decode()}
    places = {name: write(content, made.parent / "images", folder / name) for name, write in WRITERS.items()}
    kinds = list(places)

    def case(seed: int, tally: Tally) -> None:
        name = kinds[seed % len(kinds)]
        _try_file(places[name], name, seed, tally)

    return case


def _try_file(place: Path, name: str, seed: int, tally: Tally) -> None:
    chance = random.Random(seed)
    files = sorted(path for path in place.rglob("*") if path.is_file() and not _is_image(path))
    file = chance.choice(files)
    before = file.read_bytes()
    file.write_bytes(_damaged(before, chance))
    tally.cases += 1
    label = f"{name} {seed} ({file.name})"
    outcome = tally.attempt(label, _use, place, name.split()[0])
    file.write_bytes(before)
    if isinstance(outcome, UserError):
        tally.refused += 1
    elif outcome is not None:
        tally.passed += 1
        tally.failures += [f"{label}: wrong success: {outcome}"] if outcome else []


def _is_image(path: Path) -> bool:
    return path.suffix == ".png" and path.parent.name != "masks"


def _damaged(data: bytes, chance: random.Random) -> bytes:
    """Return other values for some, or bytes that are wrong anywhere."""
    values = list(re.finditer(rb'-?\d+\.?\d*|"[^"]*"|<[^<>]*>', data))
    if not values or chance.random() < 0.3:
        return damage_bytes(data, chance)
    for found in sorted(
        chance.sample(values, min(len(values), chance.choice((1, 1, 3)))), key=lambda m: -m.start()
    ):
        data = data[: found.start()] + chance.choice(VALUES) + data[found.end() :]
    return data


def _use(place: Path, kind: str) -> str:
    """Return what the import let through and the training refuses; nothing where all is well."""
    data = read_dataset(place, kind=kind)
    for part, content in data.parts.items():
        file = place.parent / f"{part}.json"
        write_files({file: content})
        try:
            dataset = CocoDataset(
                DatasetSource(part, file, data.folder), masks=None, evaluation=True, quiet=True
            )
            dataset.check_files()
        except UserError as error:
            return str(error)
        for row in range(len(dataset)):
            dataset.read(row)
            dataset.target(row)
    return ""
