"""Group the images of dsb2018 by slide, so that no slide is both trained on and tested on.

The data do not name the slides. Images are crops, and two signs show that they come from one slide: an edge
of one continues at the opposite edge of another, or both have nearly the same distribution of colours. Crops
of one slide that touch at a corner alone show the second sign at most, so it is taken generously: groups that
are too large cost some precision, groups that are too small would make test images easier than new ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PARTS = ("train", "val")  # of the data as they are published; the study divides all of them anew

# Over an edge where two crops meet, grey values step as they do inside them. Of the 26532 pairs of edges of
# images of one kind, 47 have a step of less than 1.25 times that and a correlation above 0.8.
STEP, CORRELATION = 1.25, 0.8
LIKE = 0.5  # largest mean difference of the quantiles of two images' colours, in values of 256
QUANTILES = np.linspace(0.02, 0.98, 17)
SMOOTH = 5  # pixels along an edge that are averaged before a correlation: noise is not correlated
LEAST_STEP = 0.1  # inside an image without noise


@dataclass(frozen=True)
class Picture:
    """An image of the data set: ``kind`` is its height, width and modality."""

    name: str
    kind: tuple[int, int, str]


def read_pictures(data: Path) -> list[Picture]:
    """Return all images of ``data``, the folder of dsb2018, in order of their names."""
    found = [
        Picture(image["file_name"], (image["height"], image["width"], image["modality"]))
        for part in PARTS
        for image in read_annotations(data, part)["images"]
    ]
    return sorted(found, key=lambda picture: picture.name)


def read_annotations(data: Path, part: str) -> dict[str, Any]:
    """Return the content of one published annotation file."""
    content: dict[str, Any] = json.loads((data / "annotations" / f"instances_{part}.json").read_text("utf-8"))
    return content


def group(data: Path) -> dict[str, int]:
    """Return the number of each image's slide, counted from 0 in order of the images' names."""
    pictures = read_pictures(data)
    pixels = {p.name: np.asarray(Image.open(data / "images" / p.name).convert("RGB")) for p in pictures}
    kinds: dict[tuple[int, int, str], list[str]] = {}
    for picture in pictures:
        kinds.setdefault(picture.kind, []).append(picture.name)
    leader = {picture.name: picture.name for picture in pictures}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for names in kinds.values():
        for one, other in (*neighbours(names, pixels), *like(names, pixels)):
            first, second = sorted((find(one), find(other)))
            leader[second] = first
    numbers = {name: number for number, name in enumerate(n for n in leader if find(n) == n)}
    return {name: numbers[find(name)] for name in leader}


def neighbours(names: Sequence[str], pixels: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of images of one size of which an edge continues in the other's opposite edge."""
    grey = np.stack([pixels[name].mean(2) for name in names])
    for turned in (grey, grey.transpose(0, 2, 1)):
        last, first = turned[:, -1], turned[:, 0]
        inside = np.abs(last - turned[:, -2]).mean(1)[:, None] + np.abs(first - turned[:, 1]).mean(1)
        step = np.stack([np.abs(row - first).mean(1) for row in last])
        for above, below in np.argwhere(step < STEP * np.maximum(inside / 2, LEAST_STEP)):
            if above != below and correlation(last[above], first[below]) > CORRELATION:
                yield names[above], names[below]


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of two rows of grey values, (W,), after smoothing; 0 if one is constant."""
    smooth = [np.convolve(row, np.ones(SMOOTH) / SMOOTH, "valid") for row in (one, other)]
    return float(np.corrcoef(*smooth)[0, 1]) if min(row.std() for row in smooth) else 0.0


def like(names: Sequence[str], pixels: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of images with nearly the same distribution of colours."""
    found = {name: np.quantile(pixels[name].reshape(-1, 3), QUANTILES, axis=0) for name in names}
    for one, other in combinations(names, 2):
        if np.abs(found[one] - found[other]).mean() < LIKE:
            yield one, other


def describe(data: Path, slides: Mapping[str, int]) -> str:
    """Return the sizes of the slides, kind by kind."""
    lines = []
    kinds = {picture.name: picture.kind for picture in read_pictures(data)}
    for kind in sorted(set(kinds.values())):
        sizes = Counter(slides[name] for name, own in kinds.items() if own == kind)
        lines.append(f"{kind}: {sum(sizes.values())} images on {len(sizes)} slides {sorted(sizes.values())}")
    return "\n".join(lines)
