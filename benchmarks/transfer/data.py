"""Training and test images of each fold: whole slides, and every kind of image in proportion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gn_detect.files import atomic_write_text

from .slides import PARTS, Picture, read_annotations, read_pictures

SLIDES = Path(__file__).resolve().parents[1] / "results" / "transfer" / "slides.json"
"""Slide of each image, as ``python -m benchmarks.transfer slides`` found them."""

STAINED = "colour_bright"
HALVES, DEVELOPMENT_FOLDS, STAINED_FOLDS = 2, 3, 5


@dataclass(frozen=True)
class Fold:
    """Names of images.

    Attributes:
        source: images that the source is trained on.
        train: images that it is fine-tuned on.
        test: images that the result is tested on.
    """

    source: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]


def read_slides() -> dict[str, int]:
    """Return the number of each image's slide."""
    found: dict[str, int] = json.loads(SLIDES.read_text("utf-8"))["slides"]
    return found


def divide(pictures: Sequence[Picture], slides: Mapping[str, int], count: int) -> list[list[str]]:
    """Divide images into ``count`` parts of like size; whole slides, and each kind spread over the parts.

    The largest slides come first, each into the part that has the fewest images of its kind, and of all.
    """
    members: dict[int, list[Picture]] = {}
    for picture in pictures:
        members.setdefault(slides[picture.name], []).append(picture)
    parts: list[list[Picture]] = [[] for _ in range(count)]
    for slide in sorted(members.values(), key=lambda found: (-len(found), found[0].name)):
        kind = slide[0].kind

        def filled(part: list[Picture], kind: tuple[int, int, str] = kind) -> tuple[int, int]:
            return sum(picture.kind == kind for picture in part), len(part)

        min(parts, key=filled).extend(slide)
    return [sorted(picture.name for picture in part) for part in parts]


def folds(data: Path) -> dict[str, Fold]:
    """Return all folds by name.

    ``A`` is trained on half A and tested on half B, ``B`` the other way round. ``dev1`` to ``dev3`` lie
    inside half A, so that half B is untouched by choices; ``small1`` to ``small3`` are the same at half the
    resolution, and ``young1`` to ``young3`` those with sources after half of their training. ``stained1`` to
    ``stained5`` go from fluorescence to stained images. With ``imagenet`` before a name (``A``, ``B``,
    ``dev1``) the source is a backbone of ImageNet, for the same images.
    """
    pictures, slides = read_pictures(data), read_slides()
    halves = [tuple(part) for part in divide(pictures, slides, HALVES)]
    found = {
        name: Fold(train, train, test)
        for name, train, test in (("A", halves[0], halves[1]), ("B", halves[1], halves[0]))
    }
    inside = [picture for picture in pictures if picture.name in halves[0]]
    for number, part in enumerate(divide(inside, slides, DEVELOPMENT_FOLDS), 1):
        train = tuple(name for name in halves[0] if name not in part)
        for name in ("dev", "small", "young"):
            found[f"{name}{number}"] = Fold(train, train, tuple(part))
    stained = [picture for picture in pictures if picture.kind[2] == STAINED]
    fluorescent = tuple(picture.name for picture in pictures if picture.kind[2] != STAINED)
    for number, part in enumerate(divide(stained, slides, STAINED_FOLDS), 1):
        train = tuple(picture.name for picture in stained if picture.name not in part)
        found[f"stained{number}"] = Fold(fluorescent, train, tuple(part))
    for name in ("A", "B", "dev1"):
        found[f"imagenet{name}"] = replace(found[name], source=())
    return found


def annotations_of(data: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return COCO ground truth of the named images, in order of their ids, as in both published files."""
    wanted = set(names)
    contents = [read_annotations(data, part) for part in PARTS]
    images = [image for content in contents for image in content["images"] if image["file_name"] in wanted]
    ids = {image["id"] for image in images}
    annotations = [a for content in contents for a in content["annotations"] if a["image_id"] in ids]
    return {"images": images, "annotations": annotations, "categories": contents[0]["categories"]}


def write_annotations(data: Path, names: Sequence[str], path: Path) -> None:
    """Write the COCO JSON of the named images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(annotations_of(data, names)))


def slides_of(truth: Mapping[str, Any]) -> np.ndarray:
    """Return the slide of each image of ``truth``, numbered from 0 without gaps, (I,)."""
    slides = read_slides()
    found = [slides[image["file_name"]] for image in truth["images"]]
    numbers = {slide: number for number, slide in enumerate(dict.fromkeys(found))}
    return np.array([numbers[slide] for slide in found])
