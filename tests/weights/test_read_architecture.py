"""A config is found from a checkpoint alone, and the model that it makes takes all of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gn_detect.config import Config, dump_config, load_config
from gn_detect.errors import UserError
from gn_detect.modeling import build_model
from gn_detect.weights import (
    Checkpoint,
    CheckpointMetadata,
    known_config,
    load_weights,
    norm_settings,
    read_architecture,
    read_checkpoint,
    save_weights,
)
from tests.refusal import refusal
from tests.weights import schemes

NARROW = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"]
NARROW += [
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "16",
    "MODEL.FPN.OUT_CHANNELS",
    "16",
    "MODEL.GN.NUM_GROUPS",
    "2",
]
HEADS = [
    "MODEL.ROI_BOX_HEAD.FC_DIM",
    "24",
    "MODEL.ROI_BOX_HEAD.CONV_DIM",
    "8",
    "MODEL.ROI_MASK_HEAD.CONV_DIM",
    "12",
]

CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
CASCADE_KEY = "MODEL.ROI_BOX_CASCADE_HEAD."

MODELS = {
    "GN everywhere": ("GN/mask_rcnn_R_50_FPN_2x_gn.yaml", []),
    "frozen BN, R-101": ("COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_1x.yaml", []),
    "no masks": ("GN/faster_rcnn_R_50_FPN_2x_gn.yaml", []),
    "C4": ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", []),
    "cascade": ("GN/mask_rcnn_R_50_FPN_2x_gn.yaml", CASCADE),
    "deformable": (
        "GN/mask_rcnn_R_50_FPN_2x_gn.yaml",
        ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, False, True]"],
    ),
    "modulated": (
        "GN/mask_rcnn_R_50_FPN_2x_gn.yaml",
        [
            *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, True, True]"),
            *("MODEL.RESNETS.DEFORM_MODULATED", "True", "MODEL.RESNETS.DEFORM_NUM_GROUPS", "2"),
        ],
    ),
    "ResNet-18": ("quick/Base-R18-GN.yaml", []),
    "ResNeXt": (
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.RESNETS.NUM_GROUPS", "2", "MODEL.RESNETS.STRIDE_IN_1X1", "False"],
    ),
    "other heads": (
        "GN/mask_rcnn_R_50_FPN_2x_gn.yaml",
        [
            *["MODEL.ROI_MASK_HEAD.NUM_CONV", "2", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "5"],
            *["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True", "MODEL.RPN.CONV_DIMS", "[-1, -1]"],
            *["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "True"],
        ],
    ),
}  # fmt: skip


def narrow(config: str, keys: list[str]) -> Config:
    return load_config(config, [*NARROW, *HEADS, *keys])


def rebuilt(path: Path) -> tuple[Config, torch.nn.Module]:
    """Build the model of a file; 80 classes, as everywhere here."""
    found = read_architecture(read_checkpoint(path))
    base = "Base-RCNN-FPN.yaml" if "MODEL.FPN.OUT_CHANNELS" in found.keys else "Base-RCNN-C4.yaml"
    keys = {"MODEL.MASK_ON": found.has_masks, "MODEL.GN.NUM_GROUPS": 2, **found.keys}
    cfg = load_config(base, [text for key, value in keys.items() for text in (key, str(value))])
    return cfg, build_model(cfg)


@pytest.mark.parametrize("name", MODELS)
def test_a_detector_is_rebuilt_from_its_tensors(tmp_path: Path, name: str) -> None:
    cfg = narrow(*MODELS[name])
    save_weights(tmp_path / "model.pth", build_model(cfg).state_dict())
    found, model = rebuilt(tmp_path / "model.pth")
    report = load_weights(model, tmp_path / "model.pth")  # strict: all must fit
    assert report.missing == report.unexpected == report.mismatched == []
    assert found.model.resnets.norm == cfg.model.resnets.norm


def test_what_tensors_do_not_tell_comes_from_the_config_in_the_file(tmp_path: Path) -> None:
    keys = ["MODEL.GN.EPS", "0.001", "MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16], [32], [64], [128]]"]
    cfg = narrow("GN/mask_rcnn_R_50_FPN_2x_gn.yaml", keys)
    metadata = {"config": dump_config(cfg), "class_names": ["a", "b"]}
    save_weights(tmp_path / "model.pth", build_model(cfg).state_dict(), metadata)
    found = read_architecture(read_checkpoint(tmp_path / "model.pth"))
    assert found.class_names == ["a", "b"]
    assert found.keys["MODEL.GN.EPS"] == 0.001
    assert found.keys["MODEL.ANCHOR_GENERATOR.SIZES"] == cfg.model.anchor_generator.sizes


def test_the_stages_of_a_cascade_come_from_the_config_in_the_file(tmp_path: Path) -> None:
    """No tensor holds the thresholds and the box weights of a stage; published cascades have three."""
    keys = [f"{CASCADE_KEY}IOUS", "[0.5, 0.75]"]
    keys += [f"{CASCADE_KEY}BBOX_REG_WEIGHTS", "[[10, 10, 5, 5], [25, 25, 12, 12]]"]
    cfg = narrow("GN/mask_rcnn_R_50_FPN_2x_gn.yaml", [*CASCADE, *keys])
    state, path = build_model(cfg).state_dict(), tmp_path / "model.pth"
    save_weights(path, state, {"config": dump_config(cfg)})
    found = read_architecture(read_checkpoint(path))
    assert found.keys[f"{CASCADE_KEY}IOUS"] == (0.5, 0.75)
    assert found.keys[f"{CASCADE_KEY}BBOX_REG_WEIGHTS"][1] == (25, 25, 12, 12)
    assert str(found) == "Cascade Mask R-CNN R-50-FPN with GN"
    save_weights(path, state)
    with refusal("unknown-network", "cascade of 2 stages", "BBOX_REG_WEIGHTS", "--config-file"):
        read_architecture(read_checkpoint(path))


@pytest.mark.parametrize("norm", ["bn", "gn"])
def test_a_backbone_of_another_library(tmp_path: Path, norm: str) -> None:
    config = "GN/mask_rcnn_R_50_FPN_2x_gn.yaml" if norm == "gn" else "Base-RCNN-FPN.yaml"
    model = build_model(narrow(config, []))
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.bottom_up.")}
    torch.save(schemes.torchvision_backbone(state, norm), tmp_path / "resnet.pth")
    found = read_architecture(read_checkpoint(tmp_path / "resnet.pth"))
    assert not found.is_detector
    assert found.norm == ("GN" if norm == "gn" else "FrozenBN")
    assert found.keys["MODEL.RESNETS.DEPTH"] == 50
    assert found.keys["MODEL.RESNETS.WIDTH_PER_GROUP"] == 4
    assert str(found) == f"backbone R-50 with {found.norm}"


def test_what_is_no_resnet_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(3, 3)}, tmp_path / "vgg.pth")
    with refusal("unknown-network", "vgg.pth", "features.0.weight", "--config-file"):
        read_architecture(read_checkpoint(tmp_path / "vgg.pth"))


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 8), (1, 8, 3, 3)])
@pytest.mark.parametrize("name", [pytest.param("ResNeXt", marks=pytest.mark.slow), "C4", "ResNet-18"])
def test_weights_of_odd_shapes_are_one_line_at_most(name: str, shape: tuple[int, ...]) -> None:
    model = build_model(narrow(*MODELS[name]))
    tensors = dict(model.state_dict())
    groups = norm_settings(model)
    refused = 0
    for key in [key for key in tensors if key.endswith(".weight") and ".res3" not in key]:
        damaged = Checkpoint({**tensors, key: torch.zeros(shape)}, groups, path=Path("a.pth"))
        try:
            read_architecture(damaged)
        except UserError as error:
            refused += 1
            assert str(error).startswith("a.pth: ")
            assert "\n" not in str(error)
    assert refused > 3 or len(shape) == 4


def test_the_groups_of_a_converted_file(tmp_path: Path) -> None:
    """It holds no config, but the groups of each norm."""
    model = build_model(narrow("GN/mask_rcnn_R_50_FPN_2x_gn.yaml", ["MODEL.GN.MIN_CHANNELS_PER_GROUP", "4"]))
    save_weights(tmp_path / "gn.pth", model.state_dict(), norm_settings(model))
    cfg, again = rebuilt(tmp_path / "gn.pth")
    assert cfg.model.gn.min_channels_per_group == 4
    load_weights(again, tmp_path / "gn.pth")


BOMBS = ["a: &a [1]\nb: [" + "*a, " * 25_000 + "]", "a: " + "[" * 100_000, "x" * 10**7]


@pytest.mark.parametrize("config", BOMBS)
def test_a_config_in_a_checkpoint_that_grows_is_none_of_ours(config: str) -> None:
    assert known_config(Checkpoint({}, CheckpointMetadata(config=config))) is None
