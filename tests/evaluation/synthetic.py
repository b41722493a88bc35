"""Random ground truth and detections in COCO's format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

HEIGHT, WIDTH = 120, 160


def random_data(
    seed: int, images: int = 12, categories: tuple[int, ...] = (1, 3, 4, 90)
) -> tuple[dict, list[dict]]:
    """Rectangles as ground truth, crowds among them, and shifted copies and inventions as detections."""
    random = np.random.default_rng(seed)
    truth: dict[str, list] = {
        "images": [
            {"id": int(i), "height": HEIGHT, "width": WIDTH} for i in random.permutation(1000)[:images]
        ],
        "categories": [{"id": c, "name": f"kind {c}"} for c in categories],
        "annotations": [],
    }
    detections = []
    for image in truth["images"][1:]:
        for _ in range(random.integers(0, 9)):
            size = random.integers(4, 90, 2)
            x, y = (random.uniform(0, 1, 2) * (np.array([WIDTH, HEIGHT]) - size)).astype(int).tolist()
            w, h = size.tolist()
            category = int(random.choice(categories))
            crowd = int(random.random() < 0.15)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": crowd,
                    "segmentation": rectangle(x, y, w, h)
                    if crowd
                    else [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
            for _ in range(random.integers(0, 4)):
                dx, dy, dw, dh = (random.integers(-6, 7, 4)).tolist()
                box = [max(x + dx, 0), max(y + dy, 0), max(w + dw, 2), max(h + dh, 2)]
                score = round(float(random.random()), 1)  # ties
                detections.append(make_detection(image["id"], category, box, score))
    return truth, detections


def rectangle(x: int, y: int, w: int, h: int) -> dict[str, Any]:
    """Compressed RLE."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(mask)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def make_detection(image_id: int, category_id: int, box: list[int], score: float) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "score": score,
        "segmentation": rectangle(*box),
    }
