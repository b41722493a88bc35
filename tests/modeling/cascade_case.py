"""A cascade whose weights and inputs are formulas, so that any library can make the same one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

KEYS = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_STD": [57.0, 57.0, 57.0],
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.FPN.NORM": "GN",
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.1,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 48,
    "MODEL.ROI_BOX_HEAD.NORM": "GN",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.ROI_MASK_HEAD.NORM": "GN",
    "MODEL.MASK_ON": True,
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 40,
    # Every anchor and every proposal is a sample, so that nothing is random.
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 100000,
    "MODEL.RPN.POSITIVE_FRACTION": 1.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 100000,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
}


def values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return tensors of the given shapes, by detectron2's names."""
    found = {}
    for i, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) ** 1.5 * 0.7 + i)
        if ".norm." in name:
            wave = 0.1 * wave + (1 if name.endswith("weight") else 0)
        elif name.endswith("bias"):
            wave = 0.05 * wave
        else:
            scale = {"cls_score": 2.5, "bbox_pred": 0.7}.get(name.split(".")[-2], 1.4)
            wave = scale * wave / math.prod(shape[1:]) ** 0.5
        found[name] = wave.view(shape).float()
    return found


def images() -> list[Tensor]:
    """Return two uint8 images of 96 x 128 and 128 x 96 pixels."""
    found = []
    for height, width in ((96, 128), (128, 96)):
        index = torch.arange(3 * height * width).view(3, height, width)
        found.append(((index * 7919 + index // 13 * 104729) % 251).to(torch.uint8))
    return found


def objects() -> list[tuple[Tensor, Tensor, list[list[np.ndarray]]]]:
    """Return boxes (M, 4), labels (M,) and polygons of the objects in each image."""
    boxes = [
        [[8.0, 12, 60, 70], [40, 30, 100, 88], [70, 5, 120, 40]],
        [[10.0, 20, 50, 110], [30, 60, 90, 120]],
    ]
    labels = [[0, 2, 1], [1, 0]]
    polygons = [
        [[np.array([x0, y0, x1, y0 + 4, x1 - 6, y1, x0, y1 - 8])] for x0, y0, x1, y1 in part]
        for part in boxes
    ]
    return [
        (torch.tensor(b), torch.tensor(label), polygon)
        for b, label, polygon in zip(boxes, labels, polygons, strict=True)
    ]
