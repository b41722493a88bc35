"""The recipe in gn_detect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gn_detect

from . import CONFIG, PERIOD

MODELS = ("ResNet-18, GN",)
CONFIGS = (CONFIG, CONFIG.with_name("Base-R18-GN.yaml"))
CHECKPOINT = "model_{last:07d}.pth"


def train(folder: Path, seed: int, iterations: int, model: str) -> None:
    keys = {"OUTPUT_DIR": str(folder), "SEED": seed, "SOLVER.MAX_ITER": iterations, "DATASETS.TEST": []}
    cfg = gn_detect.load_config(CONFIG).replace({**keys, "SOLVER.CHECKPOINT_PERIOD": PERIOD})
    gn_detect.train(cfg)


def predict(checkpoint: Path, images: dict[int, Path], model: str) -> Iterator[dict[str, Any]]:
    predictor = gn_detect.Predictor.from_pretrained(checkpoint)
    for image_id, path in images.items():
        yield from predictor(path).to_coco(image_id)
