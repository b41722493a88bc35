"""Object crops of COCO images: what the converted classifiers are calibrated and measured on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MIN_SIDE = 32
"""Pixels; boxes with a shorter side show too little."""

CIFAR_CLASSES = {
    "airplane": 0, "car": 1, "truck": 9, "bird": 2, "cat": 3, "dog": 5, "horse": 7, "boat": 8,
}  # fmt: skip
"""COCO's names of CIFAR-10's classes; deer and frog are not in COCO."""


@dataclass(frozen=True)
class Crops:
    """(N, 3, size, size) uint8 RGB, the COCO category id of each, and the index of its photo."""

    images: Tensor
    categories: Tensor
    photos: Tensor
    names: dict[int, str]


def object_crops(folder: Path, part: str, size: int) -> Crops:
    """Every box that is not a crowd and at least 32x32 pixels, resized without padding (bilinear)."""
    content = _annotations(folder, part)
    files = {image["id"]: image["file_name"] for image in content["images"]}
    boxes: dict[int, list[tuple[list[float], int]]] = {}
    for a in content["annotations"]:
        if not a["iscrowd"] and min(a["bbox"][2:]) >= MIN_SIDE:
            boxes.setdefault(a["image_id"], []).append((a["bbox"], a["category_id"]))
    images, categories, photos = [], [], []
    for number, (image_id, found) in enumerate(sorted(boxes.items())):
        photo = Image.open(folder / "images" / files[image_id]).convert("RGB")
        for (x, y, w, h), category in found:
            box = (x, y, x + w, y + h)
            images.append(_resized(photo, size, box))
            categories.append(category)
            photos.append(number)
    names = {category["id"]: category["name"] for category in content["categories"]}
    return Crops(torch.stack(images), torch.tensor(categories), torch.tensor(photos), names)


def photos(folder: Path, part: str, size: int) -> Tensor:
    """(N, 3, size, size): the largest centred square of every image."""
    images = []
    for path in _paths(folder, part):
        photo = Image.open(path).convert("RGB")
        side = min(photo.size)
        left, top = (photo.width - side) / 2, (photo.height - side) / 2
        images.append(_resized(photo, size, (left, top, left + side, top + side)))
    return torch.stack(images)


def random_crops(folder: Path, part: str, size: int, count: int, seed: int = 0) -> Tensor:
    """(count, 3, size, size): windows of 15% to 100% of an image's area, at random, seeded.

    Smaller ones often show nothing but sky or wall; calibrated on them, models keep less on objects.
    """
    random = np.random.default_rng(seed)
    opened = [Image.open(path).convert("RGB") for path in _paths(folder, part)]
    images = []
    for i in range(count):
        photo = opened[i % len(opened)]
        share, ratio = random.uniform(0.15, 1.0), np.exp(random.uniform(-0.3, 0.3))
        area = photo.width * photo.height * share
        w, h = min(photo.width, (area * ratio) ** 0.5), min(photo.height, (area / ratio) ** 0.5)
        left, top = random.uniform(0, photo.width - w), random.uniform(0, photo.height - h)
        images.append(_resized(photo, size, (left, top, left + w, top + h)))
    return torch.stack(images)


def _annotations(folder: Path, part: str) -> dict[str, Any]:
    path = folder / "annotations" / f"instances_{part}.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _paths(folder: Path, part: str) -> list[Path]:
    return [folder / "images" / image["file_name"] for image in _annotations(folder, part)["images"]]


def _resized(photo: Image.Image, size: int, box: tuple[float, ...]) -> Tensor:
    right, bottom = min(box[2], photo.width), min(box[3], photo.height)
    box = (max(box[0], 0), max(box[1], 0), right, bottom)
    small = photo.resize((size, size), Image.Resampling.BILINEAR, box)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)
