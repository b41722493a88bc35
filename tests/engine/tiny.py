"""A few small pictures with COCO annotations, and a model that trains on them in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

NAMES = ("square", "bar")


def make_dataset(folder: Path, count: int = 4, seed: int = 0, same: bool = False) -> Path:
    """``folder/annotations.json`` and ``folder/images``: bright squares and bars on dark noise.

    Args:
        same: all images and annotations are equal but for their ids.
    """
    images = folder / "images"
    images.mkdir(parents=True)
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3 + 4 * i, "name": name} for i, name in enumerate(NAMES)],
    }
    for image_id in range(1, count + 1):
        random = np.random.default_rng(seed if same else [seed, image_id])
        pixels = random.integers(0, 60, (64, 80, 3), dtype=np.uint8)
        for kind in range(2):
            w, h = (20, 20) if kind == 0 else (34, 12)
            x, y = int(random.integers(2, 78 - w)), int(random.integers(2, 28 - h)) + 34 * kind
            pixels[y : y + h, x : x + w] = (250, 200, 60) if kind == 0 else (60, 220, 250)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": 3 + 4 * kind,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
        name = f"{image_id:03d}.png"
        Image.fromarray(pixels).save(images / name)
        content["images"].append({"id": image_id, "file_name": name, "height": 64, "width": 80})
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(content))
    return annotations


TINY = """
MODEL:
  DEVICE: cpu
  MASK_ON: true
  WEIGHTS: ""
  PIXEL_MEAN: [103.53, 116.28, 123.675]
  PIXEL_STD: [57.4, 57.1, 58.4]
  GN: {NUM_GROUPS: 4}
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS:
    DEPTH: 18
    NORM: GN
    STRIDE_IN_1X1: false
    STEM_OUT_CHANNELS: 8
    RES2_OUT_CHANNELS: 8
    OUT_FEATURES: [res2, res3, res4, res5]
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 16, NORM: GN}
  ANCHOR_GENERATOR: {SIZES: [[8], [16], [32], [64], [128]]}
  RPN:
    IN_FEATURES: [p2, p3, p4, p5, p6]
    BATCH_SIZE_PER_IMAGE: 64
    PRE_NMS_TOPK_TRAIN: 200
    PRE_NMS_TOPK_TEST: 100
    POST_NMS_TOPK_TRAIN: 100
    POST_NMS_TOPK_TEST: 50
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 2, BATCH_SIZE_PER_IMAGE: 32}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 32, POOLER_RESOLUTION: 5}
  ROI_MASK_HEAD: {NUM_CONV: 1, CONV_DIM: 16, NORM: GN, POOLER_RESOLUTION: 7}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 96, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
DATALOADER: {NUM_WORKERS: 0}
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.02
  MAX_ITER: 6
  STEPS: []
  WARMUP_ITERS: 3
  LOG_PERIOD: 2
  CHECKPOINT_PERIOD: 0
VIS: {NUM_IMAGES: 0}
SEED: 1
"""


def write_config(folder: Path, train: Path | None = None, val: Path | None = None) -> Path:
    """``folder/tiny.yaml`` for datasets of :func:`make_dataset`; the run goes to ``folder/run``."""
    parts = {"TRAIN": train, "TEST": val}
    register = {
        f"tiny_{key.lower()}": {"ANNOTATIONS": str(file), "IMAGES": str(file.parent / "images")}
        for key, file in parts.items()
        if file is not None
    }
    content = yaml.safe_load(TINY) | {
        "OUTPUT_DIR": str(folder / "run"),
        "DATASETS": {
            **{key: [f"tiny_{key.lower()}"] if file else [] for key, file in parts.items()},
            "REGISTER": register,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
