"""The recipe in mayaku: its Mask R-CNN, as near as its config allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mayaku
import torch
from mayaku.config import MayakuConfig
from mayaku.engine.evaluator import instances_to_coco_json

from . import IMAGES, TRAIN

MODELS = ("ConvNeXt-Atto, LN", "ResNet-50, BN")
CONFIGS = ()
CHECKPOINT = "train/ema/model_iter_{iteration:07d}.pth"


def read_config(seed: int, iterations: int, model: str) -> MayakuConfig:
    if model.startswith("ConvNeXt"):
        backbone = {"name": "convnext_atto"}
        optimizer = {"optimizer_name": "AdamW", "base_lr": 0.001, "weight_decay": 0.05}
    else:
        backbone, optimizer = {"name": "resnet50", "norm": "BN"}, {"base_lr": 0.01}
    return MayakuConfig.model_validate(
        {
            "model": {
                "meta_architecture": "mask_rcnn",
                "mask_on": True,
                "device": "cpu",
                "backbone": {"freeze_at": 0, **backbone},
                "fpn": {"out_channels": 64, "norm": "GN"},
                "anchor_generator": {"sizes": [[8], [16], [32], [64], [128]]},
                "rpn": {"batch_size_per_image": 128},
                "roi_heads": {"num_classes": 1, "batch_size_per_image": 128},
                "roi_box_head": {"num_conv": 4, "conv_dim": 64, "num_fc": 1, "fc_dim": 256},
                "roi_mask_head": {"conv_dim": 64},
            },
            "input": {
                "min_size_train": [256],
                "max_size_train": 384,
                "min_size_test": 256,
                "max_size_test": 384,
                "mask_format": "bitmask",
            },
            "solver": {
                "seed": seed,
                "ims_per_batch": 2,
                "num_epochs": round(iterations / 77),  # of 153 images
                "warmup_fraction": 50 / 300,
                "clip_gradients_enabled": True,
                "clip_gradients_type": "value",
                "clip_gradients_value": 1.0,
                **optimizer,
            },
            "test": {"detections_per_image": 100},
            "dataloader": {"num_workers": 0},
        }
    )


def train(folder: Path, seed: int, iterations: int, model: str) -> None:
    torch.manual_seed(seed)
    cfg = read_config(seed, iterations, model)
    mayaku.train(cfg, train_annotations=TRAIN, train_images=IMAGES, output_dir=folder, device="cpu")


def predict(checkpoint: Path, images: dict[int, Path], model: str) -> Iterator[dict[str, Any]]:
    predictor = mayaku.from_pretrained(checkpoint, device="cpu")
    for image_id, path in images.items():
        yield from instances_to_coco_json(predictor(path), image_id, class_id_map={0: 1})
