"""Numbers that decide sizes or divide are bounded in the config, and a model that they make together, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from gn_detect.config import load_config
from gn_detect.modeling import make_model
from tests.engine.tiny import write_config
from tests.refusal import refusal

DIVIDES_OR_SIZES = [
    "MODEL.GN.NUM_GROUPS", "MODEL.GN.MIN_CHANNELS_PER_GROUP", "MODEL.GN.EPS", "MODEL.RESNETS.NUM_GROUPS",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "MODEL.RESNETS.STEM_OUT_CHANNELS", "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "MODEL.FPN.OUT_CHANNELS", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "MODEL.RPN.PRE_NMS_TOPK_TEST", "MODEL.ROI_BOX_HEAD.FC_DIM",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "INPUT.MAX_SIZE_TRAIN", "INPUT.MAX_SIZE_TEST", "SOLVER.IMS_PER_BATCH",
    "SOLVER.LOG_PERIOD", "SOLVER.MAX_ITER", "TEST.IMS_PER_BATCH",
    "TEST.DETECTIONS_PER_IMAGE", "INPUT.LARGE_SCALE_JITTER.MAX_SCALE",
]  # fmt: skip

UNBOUNDED = ("MODEL.GN.EPS", "SOLVER.LOG_PERIOD", "SOLVER.MAX_ITER")

SIZES = [key for key in DIVIDES_OR_SIZES if key not in UNBOUNDED] + [
    "DATALOADER.NUM_WORKERS", "INPUT.MIN_SIZE_TEST", "MODEL.ROI_BOX_HEAD.NUM_CONV",
    "MODEL.ROI_BOX_HEAD.NUM_FC", "MODEL.ROI_MASK_HEAD.NUM_CONV", "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO",
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", "SOLVER.REFERENCE_WORLD_SIZE",
    "SOLVER.ACCUMULATE",
]  # fmt: skip


@pytest.mark.parametrize("key", DIVIDES_OR_SIZES)
@pytest.mark.parametrize("value", ["0", "-1", ".nan", "text", "[]"])
def test_no_key_divides_by_zero(key: str, value: str) -> None:
    with refusal("bad-value", key):
        load_config(overrides=[key, value])


def test_auto_is_a_number_of_parts() -> None:
    """It is 0, which a training replaces."""
    for value in ("0", "auto"):
        assert load_config(overrides=["SOLVER.ACCUMULATE", value]).solver.accumulate == 0
    for value in ("-1", "1.5", "automatic"):
        with refusal("bad-value", "SOLVER.ACCUMULATE"):
            load_config(overrides=["SOLVER.ACCUMULATE", value])


@pytest.mark.parametrize("key", SIZES)
def test_no_key_makes_something_huge(key: str) -> None:
    with refusal("bad-value", key):
        load_config(overrides=[key, "1000000000"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ANCHOR_GENERATOR.SIZES", str([[8.0] * 10_000])),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", str([[0.0]])),
        ("MODEL.RPN.CONV_DIMS", str([-1] * 1000)),
        ("MODEL.RPN.CONV_DIMS", "[1000000]"),
        ("INPUT.MIN_SIZE_TRAIN", "[1000000]"),
        ("INPUT.LARGE_SCALE_JITTER.SIZE", "[1000000, 1000000]"),
    ],
)
def test_no_list_makes_something_huge(key: str, value: str) -> None:
    with refusal("bad-value", key):
        load_config(overrides=[key, value])


def test_a_model_that_would_fill_the_memory_is_not_begun(tmp_path: Path) -> None:
    """Each number is allowed by itself: together they are 17 GB."""
    keys = ["MODEL.ROI_BOX_HEAD.FC_DIM", "16384", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "64"]
    cfg = load_config(write_config(tmp_path), [*keys, "MODEL.FPN.OUT_CHANNELS", "64"])
    with refusal("conflicting-keys", "parameters"):
        make_model(cfg)
