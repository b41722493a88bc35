"""A detector small enough for tests, and data for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gn_detect.config import Config, load_config
from gn_detect.modeling import MaskRCNN, build_model
from gn_detect.structures import Target

SMALL = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.FPN.NORM": "GN",
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 2,
    "MODEL.ROI_MASK_HEAD.NORM": "GN",
    "MODEL.ROI_HEADS.NUM_CLASSES": 3,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.WEIGHTS": "",
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_ON": True,
}


@pytest.fixture
def small_config() -> Callable[..., Config]:
    """``small_config({"KEY": value, ...})``: Mask R-CNN R-18-FPN of 32 channels and 3 classes."""

    def make(changes: dict | None = None) -> Config:
        return load_config("Base-RCNN-FPN.yaml").replace(SMALL | (changes or {}))

    return make


@pytest.fixture
def small_model(small_config: Callable[..., Config]) -> Callable[..., MaskRCNN]:
    """``small_model({"KEY": value, ...})``: the model of :func:`small_config`, seeded."""

    def make(changes: dict | None = None) -> MaskRCNN:
        torch.manual_seed(0)
        return build_model(small_config(changes))

    return make


@pytest.fixture
def make_images() -> Callable[..., list[torch.Tensor]]:
    """``make_images((height, width), ...)``: random uint8 images."""

    def make(*sizes: tuple[int, int]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]

    return make


@pytest.fixture
def target() -> Target:
    """Two objects in an image of 96 x 128 pixels, one with a polygon and one with a bitmap."""
    bitmap = torch.zeros(96, 128, dtype=torch.bool)
    bitmap[20:60, 70:110] = True
    polygon = torch.tensor([10.0, 10, 50, 10, 50, 70, 10, 70], dtype=torch.float64).numpy()
    boxes = torch.tensor([[10.0, 10, 50, 70], [70, 20, 110, 60]])
    return Target(boxes, torch.tensor([0, 2]), [[polygon], bitmap])


@pytest.fixture
def empty_target() -> Target:
    """An image without objects."""
    return Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [])
