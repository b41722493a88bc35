"""The recipe in torchvision: its Mask R-CNN in a loop as in its tutorial and reference script."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.io import ImageReadMode, decode_image
from torchvision.models import resnet18
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import box_convert
from torchvision.transforms import v2

from . import IMAGES, PERIOD, TRAIN

MODELS = ("ResNet-18, GN", "ResNet-18, BN")
CONFIGS = ()
CHECKPOINT = "model_{iteration}.pth"


def build_model(norm: str) -> MaskRCNN:
    norm_layer = partial(nn.GroupNorm, 32) if norm.endswith("GN") else nn.BatchNorm2d
    backbone = BackboneWithFPN(
        resnet18(norm_layer=norm_layer),
        return_layers={f"layer{stage}": str(stage - 1) for stage in (1, 2, 3, 4)},
        in_channels_list=[64, 128, 256, 512],
        out_channels=64,
        norm_layer=norm_layer,
    )
    return MaskRCNN(
        backbone,
        min_size=256,
        max_size=384,
        rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_post_nms_top_n_train=1000,
        rpn_batch_size_per_image=128,
        box_head=FastRCNNConvFCHead((64, 7, 7), [64] * 4, [256], norm_layer),
        box_predictor=FastRCNNPredictor(256, num_classes=2),
        box_batch_size_per_image=128,
        mask_head=MaskRCNNHeads(64, [64] * 4, 1, norm_layer),
        mask_predictor=MaskRCNNPredictor(64, 64, num_classes=2),
    )


def rate(iteration: int) -> float:
    warmup = min(1.0, 0.001 + 0.999 * iteration / 50)
    return warmup * 0.1 ** sum(iteration >= step for step in (210, 270))


def train(folder: Path, seed: int, iterations: int, model: str) -> None:
    torch.manual_seed(seed)
    steps = [v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)]
    dataset = CocoDetection(IMAGES, TRAIN, transforms=v2.Compose([*steps, v2.SanitizeBoundingBoxes()]))
    dataset = wrap_dataset_for_transforms_v2(dataset, target_keys=["boxes", "labels", "masks"])
    loader = DataLoader(
        dataset, 2, shuffle=True, drop_last=True, collate_fn=lambda pairs: zip(*pairs, strict=True)
    )
    network = build_model(model).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0001)
    scheduler = LambdaLR(optimizer, rate)
    iteration = 0
    while iteration < iterations:
        for images, targets in loader:
            losses = network(list(images), list(targets))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_value_(network.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            iteration += 1
            if iteration % PERIOD == 0 or iteration == iterations:
                torch.save(network.state_dict(), folder / f"model_{iteration}.pth")
            if iteration == iterations:
                break


@torch.no_grad()
def predict(checkpoint: Path, images: dict[int, Path], model: str) -> Iterator[dict[str, Any]]:
    network = build_model(model)
    network.load_state_dict(torch.load(checkpoint))
    network.eval()
    for image_id, path in images.items():
        image = v2.functional.to_dtype(decode_image(path, ImageReadMode.RGB), torch.float32, scale=True)
        found = network([image])[0]
        boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
        masks = (found["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
        for box, score, mask in zip(boxes, found["scores"].tolist(), masks, strict=True):
            yield {
                "image_id": image_id,
                "category_id": 1,
                "bbox": box,
                "score": score,
                "segmentation": rle.encode(np.asfortranarray(mask)),
            }
