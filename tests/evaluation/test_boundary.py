"""Boundary AP, by an independent computation: pixel by pixel, and AP from its definition."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest

from gn_detect.evaluation import evaluate_kinds
from gn_detect.evaluation.boundary import outline

HEIGHT, WIDTH = 90, 120  # a diagonal of 150 pixels: outlines of 3


def rle(mask: np.ndarray) -> dict[str, Any]:
    found = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def slow_outline(mask: np.ndarray, reach: int) -> np.ndarray:
    found = np.zeros_like(mask)
    height, width = mask.shape
    for y, x in np.argwhere(mask):
        for dy, dx in product(range(-reach, reach + 1), repeat=2):
            row, column = y + dy, x + dx
            if not (0 <= row < height and 0 <= column < width and mask[row, column]):
                found[y, x] = True
    return found


def blob(random: np.random.Generator) -> np.ndarray:
    """Return a disc, at times cut by the image's edge, at times with a hole."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    row, column, radius = random.uniform(0, HEIGHT), random.uniform(0, WIDTH), random.uniform(6, 20)
    distance = np.hypot(y - row, x - column)
    return (distance < radius) & (distance > random.choice([0, 4]))


def moved(mask: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.roll(mask, random.integers(-1, 2, 2), axis=(0, 1)) if random.random() < 0.8 else mask


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (7, 9), (1, 30)])
def test_outlines_pixel_by_pixel(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for _ in range(3):
        mask = np.zeros(size, dtype=bool)
        part = blob(random)[: size[0], : size[1]]
        mask[: part.shape[0], : part.shape[1]] = part
        reach = max(1, round(0.02 * np.hypot(*size)))
        assert (coco_mask.decode(outline(rle(mask))) == slow_outline(mask, reach)).all()
    empty = rle(np.zeros(size, dtype=bool))
    assert coco_mask.area(outline(empty)) == 0


def test_boundary_ap_from_its_definition() -> None:
    """With one object and one detection in each image, AP follows from the IoUs and scores alone."""
    random = np.random.default_rng(1)
    images, objects, found, ious = [], [], [], []
    for number in range(1, 25):
        mask = blob(random)
        guess = moved(mask, random)
        images.append({"id": number, "height": HEIGHT, "width": WIDTH})
        common = {"image_id": number, "category_id": 1}
        area = int(mask.sum())
        box = [0, 0, WIDTH, HEIGHT]
        objects.append(
            {**common, "id": number, "bbox": box, "area": area, "iscrowd": 0} | {"segmentation": rle(mask)}
        )
        found.append({**common, "score": float(random.random()), "segmentation": rle(guess)})
        first, second = slow_outline(mask, 3), slow_outline(guess, 3)
        values = [(a & b).sum() / (a | b).sum() for a, b in ((mask, guess), (first, second))]
        ious.append(min(values))
    truth = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "blob"}]}
    order = np.argsort([-entry["score"] for entry in found])
    expected = []
    for threshold in np.linspace(0.5, 0.95, 10):
        hits = np.array(ious)[order] >= threshold
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        recall = np.cumsum(hits) / len(hits)
        best = [max(precision[recall >= r - 1e-9], default=0.0) for r in np.linspace(0, 1, 101)]
        expected.append(100 * np.mean(best))
    results = evaluate_kinds(truth, found, ["segm", "boundary"])
    assert results["boundary"]["AP"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert results["boundary"]["AP50"] == pytest.approx(expected[0], abs=1e-6)
    assert results["boundary"]["AP"] < results["segm"]["AP"] - 5
    alone = evaluate_kinds(truth, found, ["boundary"])
    assert alone["boundary"] == pytest.approx(results["boundary"], nan_ok=True)


def test_a_crowd_is_compared_by_its_mask() -> None:
    """A detection inside a crowd is no false positive, though its outline is not the crowd's."""
    crowd, inside, other = (np.zeros((HEIGHT, WIDTH), dtype=bool) for _ in range(3))
    crowd[10:80, 10:80], inside[30:40, 30:40], other[2:9, 90:110] = True, True, True
    common = {"image_id": 1, "category_id": 1}
    truth = {
        "images": [{"id": 1, "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "blob"}],
        "annotations": [
            {**common, "id": 1, "bbox": [10, 10, 70, 70], "iscrowd": 1, "segmentation": rle(crowd)},
            {**common, "id": 2, "bbox": [90, 2, 20, 7], "iscrowd": 0, "segmentation": rle(other)},
        ],
    }
    found = [
        {**common, "score": 0.9, "segmentation": rle(inside)},
        {**common, "score": 0.8, "segmentation": rle(other)},
    ]
    assert evaluate_kinds(truth, found, ["boundary"])["boundary"]["AP"] == pytest.approx(100)
