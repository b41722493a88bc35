"""The recipe in detectron2, from the same config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils.env import seed_all_rng

from . import CONFIG, IMAGES, PERIOD, TRAIN

MODELS = ("ResNet-18, GN",)
CONFIGS = (CONFIG, CONFIG.with_name("Base-R18-GN.yaml"))
CHECKPOINT = "model_{last:07d}.pth"


def read_config(folder: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.DATASETS.set_new_allowed(True)  # for REGISTER, which is a key of gn_detect
    cfg.merge_from_file(str(CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TEST = ()
    return cfg


def train(folder: Path, seed: int, iterations: int, model: str) -> None:
    register_coco_instances("nuclei_train", {}, str(TRAIN), str(IMAGES))
    cfg = read_config(folder)
    cfg.SOLVER.MAX_ITER = iterations
    cfg.SOLVER.CHECKPOINT_PERIOD = PERIOD
    seed_all_rng(seed)
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()


def predict(checkpoint: Path, images: dict[int, Path], model: str) -> Iterator[dict[str, Any]]:
    cfg = read_config(checkpoint.parent)
    cfg.MODEL.WEIGHTS = str(checkpoint)
    predictor = DefaultPredictor(cfg)
    for image_id, path in images.items():
        instances = predictor(read_image(str(path), "BGR"))["instances"]
        for entry in instances_to_coco_json(instances, image_id):
            yield {**entry, "category_id": 1}
