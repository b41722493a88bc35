"""The folder of a run, as training and evaluation leave it, made without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gn_detect.config import dump_config, load_config
from gn_detect.evaluation import evaluate_results
from tests.engine.tiny import make_dataset, write_config

HOSTILE = ["<script>document.title='taken over'</script>", "\"><img src=x onerror=alert(1)>&'"]
"""Names of the two classes."""


def detections_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """In four images: all found; one moved away, so missed and false; one of the other class; none found."""
    found = []
    for number, annotation in enumerate(content["annotations"]):
        image, second = annotation["image_id"], number % 2
        x, y, width, height = annotation["bbox"]
        entry = {
            "image_id": image,
            "category_id": annotation["category_id"],
            "bbox": [x, y, width, height],
            "score": 0.9 - 0.05 * image,
        }
        if image == 2 and second:
            entry["bbox"] = [x, 0 if y > 32 else 50, width, height]
        if image == 3 and second:
            entry["category_id"] = 3
        if image < 4:
            x, y, width, height = entry["bbox"]
            entry["segmentation"] = annotation_mask(x, y, width, height)
            found.append(entry)
    found.append({**found[0], "score": 0.1})  # below the report's threshold
    return found


def annotation_mask(x: int, y: int, width: int, height: int) -> dict[str, Any]:
    import numpy as np
    import pycocotools.mask as coco_mask

    mask = np.zeros((64, 80), dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    encoded = coco_mask.encode(mask)
    return {"size": [64, 80], "counts": encoded["counts"].decode()}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder; classes have hostile names unless others are given."""

    def make(names: list[str] = HOSTILE, evaluated: bool = True, trained: bool = True) -> Path:
        annotations = make_dataset(tmp_path / "val", 4, seed=2)
        content = json.loads(annotations.read_text())
        for category, name in zip(content["categories"], names, strict=True):
            category["name"] = name
        annotations.write_text(json.dumps(content))
        folder = tmp_path / "run"
        inference = folder / "inference" / "tiny_test"
        inference.mkdir(parents=True)
        config = load_config(write_config(tmp_path, annotations, annotations))
        (folder / "config.yaml").write_text(dump_config(config))
        if evaluated:
            results = inference / "coco_instances_results.json"
            results.write_text(json.dumps(detections_of(content)))
            metrics = {kind: evaluate_results(annotations, results, kind) for kind in ("bbox", "segm")}
            text = json.dumps(metrics).replace("NaN", "null")
            (inference / "results.json").write_text(text)
        if trained:
            rows: list[dict[str, Any]] = [
                {"iteration": i, "total_loss": 2 / (i + 1), "loss_mask": 1 / (i + 1), "lr": 0.01}
                | {"images_per_second": 3.0}
                for i in range(6)
            ]
            rows.append({"iteration": 5, "bbox/AP": 40.0, "segm/AP": None})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "environment.json").write_text(json.dumps({"torch": "<b>9</b>"}))
        return folder

    return make
