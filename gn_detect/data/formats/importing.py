"""Read a dataset of any format that is known, split it, and write it as COCO files, all of them or none.

A split is by images: seeded, with equal shares of the classes, and near-duplicates together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError
from ...files import atomic_write
from ..images import DAMAGED, cannot_read, open_image
from . import coco_folder, cvat, label_studio, labelme, masks, via, voc, yolo
from .builder import WHOLE, Imported
from .image_index import ImageIndex
from .recognise import describe_foreign, find_format

# A hash has the signs of the steps from one cell to the next of a small grey picture, to the right and down.
_CELLS = 16
_STEP = 2  # greys of 256, from which a step counts
_ALIKE = 0.8  # the least share of set bits that near-duplicates have in common
_WHOLE, _NEAR, _ROWS = 20_000, 500, 512  # images of which all pairs are compared, else neighbours by name

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
        given = ", ".join(data.parts)
        raise UserError("bad-argument", f"{data.name} has {given}, and no train part to split")
    train, val, how = split_content(data.parts[name], data.folder, share, seed)
    others = {part: content for part, content in data.parts.items() if part != name}
    return replace(data, parts={"train": train, "val": val, **others}, notes=[*data.notes, how])


def split_content(
    content: dict[str, Any], folder: Path, share: float, seed: int
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Split COCO content into two parts by image, and say how.

    Args:
        content: in canonical form.
        folder: of the images, which are read.
        share: of the images in the first part.
        seed: of the order in which images are dealt out.

    Raises:
        UserError: there are not two images, or one cannot be read.
    """
    images = [entry for entry in content["images"] if isinstance(entry, dict)]
    if len(images) < 2:
        raise UserError("bad-argument", f"{folder}: {len(images)} image cannot be split; add images")
    groups = group_alike([folder / str(entry.get("file_name")) for entry in images])
    rows = {entry.get("id"): row for row, entry in enumerate(images)}
    classes = {entry["id"]: column for column, entry in enumerate(content["categories"])}
    counts = np.zeros((len(images), len(classes) + 1))
    counts[:, -1] = 1
    for entry in content["annotations"]:
        row, column = rows.get(entry.get("image_id")), classes.get(entry.get("category_id"))
        if row is not None and column is not None:
            counts[row, column] += 1
    chosen = deal(counts, groups, share, seed)
    alike = len(images) - len(set(groups.tolist()))
    together = f"{len(images)} images, of which {alike} look like another one"
    if not 0 < chosen.sum() < len(images):
        groups = np.arange(len(images))
        chosen = deal(counts, groups, share, seed)
        together = f"{len(images)} images that all look alike, so AP says little about others"
    parts = []
    for wanted in (False, True):
        ids = {entry.get("id") for entry, held in zip(images, chosen.tolist(), strict=True) if held == wanted}
        kept = {
            "images": [entry for entry in images if entry.get("id") in ids],
            "annotations": [entry for entry in content["annotations"] if entry.get("image_id") in ids],
        }
        parts.append({**content, **kept})
    sizes = " and ".join(str(len(part["images"])) for part in parts)
    return parts[0], parts[1], f"split into {sizes} images (seed {seed}); {together}"


def deal(counts: np.ndarray, groups: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return (I,) bool, the images of the second part.

    Groups come in a random order, those with the rarest classes first. Each goes to the part that leaves the
    shares of its classes nearer to ``share``.

    Args:
        counts: (I, C + 1) objects of each class in an image, and 1 for the image.
        groups: (I,) the number of each image's group.
        share: of the first part.
        seed: of the order.
    """
    _, member = np.unique(groups, return_inverse=True)
    sums = np.zeros((member.max() + 1, counts.shape[1]))
    np.add.at(sums, member, counts)
    totals = sums.sum(axis=0)
    weight = 1 / np.maximum(totals, 1)
    rarest = np.where(sums > 0, totals, np.inf).min(axis=1)
    order = np.random.default_rng(seed).permutation(len(sums))
    order = order[np.argsort(rarest[order], kind="stable")]
    excess = np.zeros(counts.shape[1])  # of the second part, over its share of the groups so far
    second = np.zeros(len(sums), dtype=bool)
    for group in order.tolist():
        own = sums[group]
        taken, left = excess + share * own, excess - (1 - share) * own
        second[group] = (weight * taken**2).sum() < (weight * left**2).sum()
        excess = taken if second[group] else left
    if not second.any() and len(second) > 1:
        second[np.lexsort((np.arange(len(sums)), sums[:, -1]))[0]] = True
    return second[member]


def group_alike(paths: Sequence[Path]) -> np.ndarray:
    """Return (I,) the number of each image's group; images that look alike share one, also in a chain."""
    with ThreadPoolExecutor() as pool:
        hashes = np.stack(list(pool.map(_hash, paths))).astype(np.float32)
    order = np.argsort(np.array(list(map(str, paths))), kind="stable")
    hashes, bits = hashes[order], hashes.sum(axis=1)[order]
    group = np.arange(len(paths))  # the least place of a member
    reach = len(paths) if len(paths) <= _WHOLE else _NEAR
    for first in range(0, len(paths), _ROWS):
        rows, others = slice(first, first + _ROWS), slice(first, first + _ROWS + reach)
        common = hashes[rows] @ hashes[others].T
        union = bits[rows, None] + bits[None, others] - common
        for alike in common >= _ALIKE * union:
            found = group[others][alike]
            if (found != found.min()).any():
                group[np.isin(group, found)] = found.min()
    groups = np.empty_like(group)
    groups[order] = order[group]
    return groups


def _hash(path: Path) -> np.ndarray:
    """Return (4 * cells,) bool: where the grey picture becomes brighter and darker, to the right and down."""
    try:
        with open_image(path) as image:
            image.draft("L", (_CELLS * 4, _CELLS * 4))
            grey = image.convert("L") if not image.mode.startswith(("I", "F")) else _scaled(image)
            small = grey.resize((_CELLS + 1, _CELLS + 1), Image.Resampling.BOX)
    except DAMAGED as error:
        raise cannot_read(path, error) from error
    cells = np.asarray(small, dtype=np.int16)
    steps = np.stack([np.diff(cells, axis=1)[:-1], np.diff(cells, axis=0)[:, :-1]])
    return np.concatenate([(steps >= _STEP).ravel(), (steps <= -_STEP).ravel()])


def _scaled(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) * (255 / max(high - low, 1))).astype(np.uint8))


def part_files(data: Imported, target: Path) -> dict[str, Path]:
    """Return the file of each part: ``target`` for the whole, ``target_train.json`` and so on for parts."""
    if list(data.parts) == [WHOLE]:
        return {WHOLE: target}
    return {part: target.with_name(f"{target.stem}_{part}{target.suffix}") for part in data.parts}


def write_files(contents: Mapping[Path, Mapping[str, Any]]) -> None:
    """Write COCO files: all are complete before the first gets its name (UserError if one cannot be)."""
    with ExitStack() as stack:
        for path, content in contents.items():
            json.dump(content, stack.enter_context(atomic_write(path)))


def check_targets(data: Imported, files: Mapping[str, Path]) -> None:
    """Refuse to replace a file that was read (UserError)."""
    sources = set(map(os.path.realpath, data.sources))
    for path in files.values():
        if os.path.realpath(path) in sources:
            raise UserError("replaced-file", f"{path} is an input and would be replaced; choose another name")
