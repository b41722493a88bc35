"""mmdetection's detectors with weight standardisation, and the groups in their config."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gn_detect
from gn_detect import UserError
from gn_detect.conversion import rewrite_checkpoint
from gn_detect.layers import Conv2d, WSConv2d
from gn_detect.weights import (
    implied_keys,
    load_weights,
    norm_settings,
    norms_of,
    read_architecture,
    read_checkpoint,
    save_weights,
    translate,
)
from gn_detect.weights.mmdetection_config import read_sections
from tests.refusal import refusal

from . import schemes
from .test_translate import GN, SMALL

VARIABLES = """
# configs/gn+ws/mask_rcnn_r50_fpn_gn_ws_2x.py, as version 1 stores it
conv_cfg = dict(type='ConvWS')
norm_cfg = dict(type='GN', num_groups=4, requires_grad=True)
model = dict(
    type='MaskRCNN',
    pretrained='open-mmlab://jhu/resnet50_gn_ws',
    backbone=dict(type='ResNet', depth=50, conv_cfg=conv_cfg, norm_cfg=norm_cfg, style='pytorch'),
    neck=dict(type='FPN', in_channels=[32, 64, 128, 256], conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    rpn_head=dict(type='RPNHead', anchor_ratios=[0.5, 1.0, 2.0]),
    bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_cfg=conv_cfg, norm_cfg=norm_cfg),
    mask_head=dict(type='FCNMaskHead', num_convs=4, conv_cfg=conv_cfg, norm_cfg=norm_cfg))
"""
FLAT = """conv_cfg = dict(type='ConvWS')
model = dict(
    backbone=dict(
        conv_cfg=dict(type='ConvWS'), depth=50,
        norm_cfg=dict(num_groups=4, requires_grad=True, type='GN'),
        type='ResNet'),
    neck=dict(conv_cfg=dict(type='ConvWS'), norm_cfg=dict(num_groups=4, type='GN')),
    roi_head=dict(
        bbox_head=dict(conv_cfg=dict(type='ConvWS'), norm_cfg=dict(num_groups=4, type='GN')),
        mask_head=dict(conv_cfg=dict(type='ConvWS'), norm_cfg=dict(num_groups=4, type='GN'))),
    rpn_head=dict(type='RPNHead'))
"""


class ConvWS2d(nn.Conv2d):
    """mmcv/cnn/bricks/conv_ws.py, in words of our own."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(len(self.weight), -1)
        centred = self.weight - flat.mean(dim=1).reshape(-1, 1, 1, 1)
        weight = centred / (flat.std(dim=1).reshape(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def detector(*keys: str) -> nn.Module:
    torch.manual_seed(1)
    return gn_detect.build_model(gn_detect.load_config(GN, [*SMALL, *keys])).eval()


def write(path: Path, text: str, version: int, key: str = "config") -> dict[str, Tensor]:
    """A file of mmdetection's with this config; returns the values in our names."""
    state = schemes.randomised(detector())
    theirs = schemes.mmdetection(state, version)
    torch.save({"meta": {key: text, "epoch": 24}, "state_dict": theirs}, path)
    return state


CONV = [f"MODEL.{part}.CONV" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
ALL_WS = [text for key in CONV for text in (key, "WS")]


def standardise_by_hand(model: nn.Module) -> set[str]:
    """Replace the convolutions that mmdetection builds with ``conv_cfg`` by its own; return their names."""
    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, Conv2d) and "proposal_generator" not in name
    }
    for name in names:
        old = model.get_submodule(name)
        new = ConvWS2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            old.stride,
            old.padding,
            bias=False,
        )
        new.weight = old.weight
        new.forward = functools.partial(_with_norm, new, old.norm, old.activation)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return names


def _with_norm(
    conv: ConvWS2d, norm: nn.Module, activation: str | None, x: Tensor, *residual: Tensor
) -> Tensor:
    y = norm(ConvWS2d.forward(conv, x))
    y = y + residual[0] if residual else y
    return y.relu() if activation else y


@pytest.mark.parametrize(("version", "text", "key"), [(1, VARIABLES, "config"), (2, FLAT, "cfg")])
def test_standardised_weights_compute_what_mmdetection_computes(
    version: int, text: str, key: str, tmp_path: Path
) -> None:
    path = tmp_path / "ws.pth"
    state = write(path, text, version, key)
    model = detector(*ALL_WS)
    load_weights(model, path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    expected = detector()
    expected.load_state_dict(state)
    names = standardise_by_hand(expected)
    assert names == {name for name, module in model.named_modules() if isinstance(module, WSConv2d)}
    assert len(names) == 53 + 8 + 4 + 4  # R-50, the pyramid, the box head, the mask head
    images = [torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(2))]
    with torch.no_grad():
        for ours, theirs in zip(
            model.backbone(model.preprocess(images)).values(),
            expected.backbone(expected.preprocess(images)).values(),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        pooled, labels = torch.randn(5, 16, 14, 14), torch.zeros(5, dtype=torch.int64)
        ours, theirs = (m.roi_heads.mask_head(pooled, labels) for m in (model, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        ours, theirs = (m.roi_heads.box_head(pooled[..., :7, :7]) for m in (model, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_file_says_which_weights_are_standardised(tmp_path: Path) -> None:
    path = tmp_path / "ws.pth"
    write(path, FLAT, 2)
    keys = read_architecture(read_checkpoint(path)).keys
    assert {key: keys[key] for key in CONV} == dict.fromkeys(CONV, "WS")
    cfg = gn_detect.load_config(GN, SMALL)
    found = implied_keys(cfg, path)
    assert {key: found[key] for key in CONV} == dict.fromkeys(CONV, "WS")
    for keys in ([], [text.replace("WS", "StdConv") for text in ALL_WS]):
        with refusal("other-convolution", "ws.pth", "MODEL.RESNETS.CONV WS MODEL.FPN.CONV WS"):
            load_weights(detector(*keys), path)


def test_plain_convolutions_stay(tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    text = FLAT.replace("conv_cfg = dict(type='ConvWS')\n", "").replace("dict(type='ConvWS')", "None")
    state = write(path, text, 2)
    model = detector()
    assert not load_weights(model, path).converted
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with refusal("other-convolution", "MODEL.FPN.CONV ''"):
        load_weights(detector("MODEL.FPN.CONV", "WS"), path)


def test_only_the_parts_that_have_it(tmp_path: Path) -> None:
    path = tmp_path / "neck.pth"
    text = "model = dict(backbone=dict(conv_cfg=None), neck=dict(conv_cfg=dict(type='ConvWS', eps=0.5)))"
    state = write(path, text, 2)
    model = detector("MODEL.FPN.CONV", "WS")
    assert "8 standardised weights have the file's eps" in str(load_weights(model, path))
    weight = state["backbone.fpn_output3.weight"]
    flat = weight.flatten(1)
    expected = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 0.5)
    layer = model.backbone.fpn_output3
    assert isinstance(layer, WSConv2d)
    torch.testing.assert_close(layer.standardised_weight(), expected.view_as(weight))


WS = "conv_cfg=dict(type='ConvWS')"
UNKNOWN = {
    "conv_cfg = dict(type='ConvWS')": "is not clear which convolutions .* conv_cfg in it",
    "_base_ = 'x.py'\nconv_cfg = dict(type='ConvWS')\nmodel = dict(backbone=dict())": "is not clear which",
    f"model = dict(backbone=dict({WS}), rpn_head=dict({WS}))": "see model.rpn_head.conv_cfg in it",
    f"model = dict(backbone=dict({WS}), neck=dict(conv_cfg=other))": "see model.neck.conv_cfg in it",
    "model = dict(backbone=dict(conv_cfg=dict(type='ConvAWS')))": "type ConvAWS in its backbone",
}


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_cannot_be_told_is_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path / "ws.pth", text, 2)
    with pytest.raises(UserError, match=UNKNOWN[text]):
        load_weights(detector(), tmp_path / "ws.pth")


@pytest.mark.parametrize(("version", "text"), [(1, VARIABLES), (2, FLAT)])
def test_the_groups_of_the_config(version: int, text: str, tmp_path: Path) -> None:
    path = tmp_path / "ws.pth"
    write(path, text, version)
    checkpoint = read_checkpoint(path)
    groups = norms_of(checkpoint, translate(checkpoint).tensors).group_norm_groups
    model = detector()
    assert groups == {n: 4 for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    keys = read_architecture(checkpoint).keys
    assert (keys["MODEL.GN.NUM_GROUPS"], keys["MODEL.GN.MIN_CHANNELS_PER_GROUP"]) == (4, 1)
    other = detector("MODEL.GN.NUM_GROUPS", "2", *ALL_WS)
    with refusal("other-groups", "4 groups", "MODEL.GN.NUM_GROUPS 4"):
        load_weights(other, path)


def test_the_eps_of_the_config(tmp_path: Path) -> None:
    path, model = tmp_path / "gn.pth", detector(*ALL_WS)
    write(path, FLAT.replace("num_groups=4, type", "num_groups=4, eps=1e-3, type"), 2)
    load_weights(model, path)
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    assert {value for name, value in eps.items() if "bottom_up" in name} == {1e-5}
    assert {value for name, value in eps.items() if "bottom_up" not in name} == {1e-3}


def test_batch_norms_have_no_groups(tmp_path: Path) -> None:
    """A backbone of BatchNorms below a pyramid of group norms, each with its own norm_cfg."""
    group = "norm_cfg=dict(type='GN', num_groups=2)"
    text = f"model=dict(backbone=dict(norm_cfg=dict(type='BN')), neck=dict({group}))"
    tensors = {f"{name}.weight": torch.ones(4) for name in ("backbone.bn1", "neck.fpn_convs.0.gn")}
    torch.save({"meta": {"config": text}, "state_dict": tensors}, tmp_path / "m.pth")
    found = read_checkpoint(tmp_path / "m.pth").metadata
    assert found.group_norm_groups == {"neck.fpn_convs.0.gn": 2}
    assert found.group_norm_eps == {}


def test_our_own_file_of_it(tmp_path: Path) -> None:
    """It holds the record, also when its tensors are written for plain convolutions."""
    write(tmp_path / "ws.pth", FLAT, 2)
    model = detector(*ALL_WS)
    load_weights(model, tmp_path / "ws.pth")
    for suffix in (".pth", ".safetensors"):
        save_weights(tmp_path / f"own{suffix}", model.state_dict(), norm_settings(model))
        again = detector(*ALL_WS)
        load_weights(again, tmp_path / f"own{suffix}")
        with refusal("other-convolution", "--keep-norm"):
            load_weights(detector(), tmp_path / f"own{suffix}")
    rewrite_checkpoint(tmp_path / "own.pth", tmp_path / "plain.pth")
    plain, x = detector(), torch.randn(1, 3, 64, 64)
    load_weights(plain, tmp_path / "plain.pth")
    with torch.no_grad():
        for ours, folded in zip(model.backbone(x).values(), plain.backbone(x).values(), strict=True):
            torch.testing.assert_close(ours, folded, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("record", [["WS"], ["Other", 1e-5], ["WS", -1.0], "WS"])
def test_a_damaged_record_is_refused(record: object, tmp_path: Path) -> None:
    entries = {"weight_standardization": {"a": record}}
    save_weights(tmp_path / "m.pth", {"a.weight": torch.ones(2, 2, 1, 1)}, entries)
    with refusal("damaged-record", "weight_standardization"):
        read_checkpoint(tmp_path / "m.pth")


def test_later_texts_replace_former_ones() -> None:
    text = """
    norm_cfg = dict(type='BN', requires_grad=True)
    model = dict(backbone=dict(norm_cfg=norm_cfg, conv_cfg={'type': "ConvWS"}, out=(0, 1, 2)))
    norm_cfg = dict(type="GN", num_groups=8)  # conv_cfg=dict(type='Other')
    model = dict(backbone=dict(norm_cfg=norm_cfg, conv_cfg=None), note='model = dict(neck=1)')
    """
    sections = read_sections(text)
    norm = {"type": '"GN"', "requires_grad": "True", "num_groups": "8"}
    assert sections["model.backbone.norm_cfg"] == norm
    assert "model.backbone.conv_cfg" not in sections
    assert "model.neck" not in sections


MANY = "".join(f"k{i}=1," for i in range(30_000))
HOSTILE = {
    "open": "(" * 300_000,
    "nested": "a=dict(" * 60_000,
    "quotes": "'\\" * 200_000,
    "long string": "'''" + "a" * 300_000,
    "mixed": "[{" * 100_000 + "a=1,",
    "references": f"a=dict({MANY})\nm=dict({MANY.replace('1', 'a')})",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_text_takes_no_time(text: str) -> None:
    start = time.process_time()
    read_sections(text)
    assert time.process_time() - start < 5
