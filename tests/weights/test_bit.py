"""BiT's published files, in timm's networks and in a detector with one as its backbone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gn_detect
from gn_detect import convert_checkpoint
from gn_detect.config import dump_config
from gn_detect.config.load import parse_config
from gn_detect.layers import WSConv2d
from gn_detect.weights import (
    Checkpoint,
    CheckpointMetadata,
    config_of_converted,
    implied_keys,
    load_weights,
    norm_settings,
    read_checkpoint,
    save_weights,
    trunk_tensors,
)

timm = pytest.importorskip("timm")

KEYS = [
    "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.BACKBONE.MODEL", "resnetv2_50x1_bit",
    "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.FPN.NORM", "GN", "MODEL.DEVICE", "cpu", "INPUT.FORMAT", "RGB",
    "MODEL.PIXEL_MEAN", "[127.5, 127.5, 127.5]", "MODEL.PIXEL_STD", "[127.5, 127.5, 127.5]",
]  # fmt: skip


def write(path: Path, blocks: tuple[int, ...], widths: tuple[int, ...], stem: int) -> Path:
    """A file with the names and layouts of big_transfer, with any values, and a classifier of 10."""
    random = np.random.default_rng(0)
    arrays = {}

    def kernel(name: str, size: int, inputs: int, outputs: int) -> None:
        values = random.normal(0.01, 0.05, (size, size, inputs, outputs))
        arrays[f"resnet/{name}/kernel"] = values.astype(np.float32)

    def norm(name: str, channels: int) -> None:
        for leaf, mean in (("gamma", 1), ("beta", 0)):
            arrays[f"resnet/{name}/{leaf}"] = random.normal(mean, 0.1, channels).astype(np.float32)

    kernel("root_block/standardized_conv2d", 7, 3, stem)
    channels = stem
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
        for unit in range(1, count + 1):
            place, middle = f"block{stage}/unit{unit:02d}", width // 4
            for layer, size, inputs, outputs in (
                ("a", 1, channels, middle), ("b", 3, middle, middle), ("c", 1, middle, width)
            ):  # fmt: skip
                kernel(f"{place}/{layer}/standardized_conv2d", size, inputs, outputs)
                norm(f"{place}/{layer}/group_norm", inputs)
            if unit == 1:
                kernel(f"{place}/a/proj/standardized_conv2d", 1, channels, width)
            channels = width
    norm("group_norm", channels)
    kernel("head/conv2d", 1, channels, 10)
    arrays["resnet/head/conv2d/bias"] = np.zeros(10, np.float32)
    np.savez(path, **arrays)
    return path


def test_the_names_are_those_that_timm_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "BiT.npz", (2, 1, 1, 1), (256, 512, 1024, 2048), 64)
    conv = partial(timm.layers.StdConv2d, eps=1e-8)
    network = timm.models.resnetv2.ResNetV2(
        layers=[2, 1, 1, 1], conv_layer=conv, stem_type="fixed", num_classes=10
    )
    network.load_pretrained(str(path))
    expected = network.state_dict()
    found, left_out = trunk_tensors(read_checkpoint(path), expected.keys())
    assert left_out == []
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bit")
    return write(folder / "BiT-M-R50x1.npz", (3, 4, 6, 3), (256, 512, 1024, 2048), 64)


def detector(*keys: str) -> nn.Module:
    torch.manual_seed(0)
    return gn_detect.build_model(gn_detect.load_config("Base-RCNN-FPN.yaml", [*KEYS, *keys])).eval()


@pytest.mark.slow
def test_a_detector_with_it_computes_what_timm_computes(file: Path, tmp_path: Path) -> None:
    cfg = gn_detect.load_config("Base-RCNN-FPN.yaml", KEYS)
    model = detector()
    report = load_weights(model, file, for_training=True, config=cfg)
    assert report.scheme == "BiT"
    assert set(report.left_out) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert all("bottom_up" not in name for name in report.missing)
    network = timm.create_model("resnetv2_50x1_bit", num_classes=10).eval()
    network.load_pretrained(str(file))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = network.forward_intermediates(x, intermediates_only=True)[1:]
        for ours, theirs in zip(model.backbone.bottom_up(x).values(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    convs = {n: m for n, m in model.named_modules() if isinstance(m, WSConv2d)}
    assert len(convs) == 53
    save_weights(tmp_path / "own.pth", model.state_dict(), norm_settings(model))
    checkpoint = read_checkpoint(tmp_path / "own.pth")
    assert checkpoint.metadata.weight_standardization == {name: ["StdConv", 1e-8] for name in convs}
    again = detector()
    load_weights(again, checkpoint)
    assert torch.equal(again.backbone(x)["p3"], model.backbone(x)["p3"])


def test_the_input_of_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "BiT.npz", (1, 1, 1, 1), (8, 8, 8, 8), 4)
    other = ["MODEL.PIXEL_MEAN", "[103, 116, 123]", "MODEL.PIXEL_STD", "[1, 1, 1]", "INPUT.FORMAT", "BGR"]
    cfg = gn_detect.load_config("Base-RCNN-FPN.yaml", [*KEYS, *other])
    assert implied_keys(cfg, file) == {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [127.5] * 3,
        "MODEL.PIXEL_STD": [127.5] * 3,
    }


@pytest.mark.parametrize("has_batch_norm", [True, False])
def test_a_conversion_leaves_a_network_with_norms_of_its_own(has_batch_norm: bool) -> None:
    """Its config builds the network with NORM keep; GN would be refused."""
    cfg = gn_detect.load_config("Base-RCNN-FPN.yaml", [*KEYS, "MODEL.FPN.NORM", "FrozenBN"])
    owners = ["backbone.bottom_up.trunk.stages.0.norm1", "backbone.fpn_lateral2.norm"]
    tensors = {f"{owner}.weight": torch.ones(64) for owner in owners}
    norms = CheckpointMetadata(group_norm_groups=dict.fromkeys(owners, 32))
    statistics = owners if has_batch_norm else owners[1:]
    original = tensors | {f"{owner}.running_var": torch.ones(64) for owner in statistics}
    text = config_of_converted(cfg, Checkpoint(tensors, norms), Checkpoint(original))
    assert text is not None
    found = parse_config(text)
    assert found.model.backbone.norm == ("GN" if has_batch_norm else "keep")
    assert found.model.fpn.norm == "GN"


@pytest.mark.slow
def test_a_converted_detector_with_it_loads(tmp_path: Path) -> None:
    """Only the pyramid has BatchNorms."""
    keys = ["MODEL.FPN.NORM", "FrozenBN", "MODEL.GN.NUM_GROUPS", "32"]
    model = detector(*keys)
    cfg = gn_detect.load_config("Base-RCNN-FPN.yaml", [*KEYS, *keys])
    metadata = replace(norm_settings(model), config=dump_config(cfg))
    save_weights(tmp_path / "bn.pth", model.state_dict(), metadata)
    convert_checkpoint(tmp_path / "bn.pth", tmp_path / "gn.pth", min_channels_per_group=1)
    predictor = gn_detect.Predictor.from_pretrained(tmp_path / "gn.pth")
    assert predictor.cfg.model.backbone.norm == "keep"
    assert predictor.cfg.model.fpn.norm == "GN"
