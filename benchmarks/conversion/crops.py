"""Object crops of COCO images: what the converted classifiers are calibrated and measured on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
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
class Photos:
    """Images of a COCO part: ``coco80``'s ``train`` or ``val``.

    ``chosen`` tells by an image's place in the JSON whether it is used: settings are chosen on some of the
    train photos, and the val photos stay unseen.
    """

    folder: Path
    part: str
    chosen: Callable[[int], bool] = lambda index: True

    def opened(self) -> Iterator[tuple[int, Image.Image]]:
        """(COCO id, RGB image) of each."""
        for index, image in enumerate(self.content["images"]):
            if self.chosen(index):
                yield image["id"], Image.open(self.folder / "images" / image["file_name"]).convert("RGB")

    def with_boxes(self) -> Iterator[tuple[Image.Image, list[float], int]]:
        """(image, xywh, category id) of every box that is no crowd and at least 32x32 pixels."""
        boxes: dict[int, list[tuple[list[float], int]]] = {}
        for a in self.content["annotations"]:
            if not a["iscrowd"] and min(a["bbox"][2:]) >= MIN_SIDE:
                boxes.setdefault(a["image_id"], []).append((a["bbox"], a["category_id"]))
        for image_id, photo in self.opened():
            for box, category in boxes.get(image_id, []):
                yield photo, box, category

    @property
    def count(self) -> int:
        return sum(map(self.chosen, range(len(self.content["images"]))))

    @property
    def content(self) -> dict[str, Any]:
        path = self.folder / "annotations" / f"instances_{self.part}.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content


def parts(folder: Path) -> tuple[set[int], set[int], set[int]]:
    """Places of the train photos in three parts, drawn at random.

    A third for the final figures, that no setting is chosen on; a third of the others to choose settings on;
    and the rest.
    """
    count = Photos(folder, "train").count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(30)).tolist()
    final = round(count / 3)
    development = final + (count - final) // 3
    return set(order[:final]), set(order[final:development]), set(order[development:])


@dataclass(frozen=True)
class Crops:
    """(N, 3, size, size) uint8 RGB, the COCO category id of each, and the names of those."""

    images: Tensor
    categories: Tensor
    names: dict[int, str]


def object_crops(photos: Photos, size: int) -> Crops:
    """Every box, resized without padding (bilinear)."""
    images, categories = [], []
    for photo, (x, y, w, h), category in photos.with_boxes():
        images.append(_resized(photo, size, (x, y, x + w, y + h)))
        categories.append(category)
    names = {category["id"]: category["name"] for category in photos.content["categories"]}
    return Crops(torch.stack(images), torch.tensor(categories), names)


def squares(photos: Photos, size: int) -> Tensor:
    """(N, 3, size, size): the largest centred square of every image."""
    images = []
    for _, photo in photos.opened():
        side = min(photo.size)
        left, top = (photo.width - side) / 2, (photo.height - side) / 2
        images.append(_resized(photo, size, (left, top, left + side, top + side)))
    return torch.stack(images)


def windows(photos: Photos, size: int, count: int, seed: int = 0) -> Tensor:
    """(count, 3, size, size): windows of 15% to 100% of an image's area, at random, half of them mirrored.

    Smaller ones often show nothing but sky or wall; calibrated on them, models keep less on objects.
    """
    random = np.random.default_rng(seed)
    opened = [photo for _, photo in photos.opened()]
    images = []
    for i in range(count):
        photo = opened[i % len(opened)]
        share, ratio = random.uniform(0.15, 1.0), np.exp(random.uniform(-0.3, 0.3))
        area = photo.width * photo.height * share
        w, h = min(photo.width, (area * ratio) ** 0.5), min(photo.height, (area / ratio) ** 0.5)
        left, top = random.uniform(0, photo.width - w), random.uniform(0, photo.height - h)
        images.append(_perhaps_mirrored(_resized(photo, size, (left, top, left + w, top + h)), random))
    return torch.stack(images)


def windows_at_objects(photos: Photos, size: int, copies: int, seed: int = 0) -> Tensor:
    """(copies times boxes, 3, size, size): boxes moved by up to 15% and scaled by 0.7 to 1.4, half mirrored.

    Cut from the photo and not, as an augmentation of small crops would, resampled a second time.
    """
    random = np.random.default_rng(seed)
    images = []
    for photo, (x, y, w, h), _ in photos.with_boxes():
        for _ in range(copies):
            wide, high = np.exp(random.uniform(-0.35, 0.35, 2)) * (w, h) / 2
            centre_x = x + w * random.uniform(0.35, 0.65)
            centre_y = y + h * random.uniform(0.35, 0.65)
            box = (centre_x - wide, centre_y - high, centre_x + wide, centre_y + high)
            images.append(_perhaps_mirrored(_resized(photo, size, box), random))
    return torch.stack(images)


def _perhaps_mirrored(image: Tensor, random: np.random.Generator) -> Tensor:
    return image.flip(2) if random.random() < 0.5 else image


def _resized(photo: Image.Image, size: int, box: tuple[float, ...]) -> Tensor:
    right, bottom = min(box[2], photo.width), min(box[3], photo.height)
    box = (max(box[0], 0), max(box[1], 0), right, bottom)
    small = photo.resize((size, size), Image.Resampling.BILINEAR, box)
    return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)
