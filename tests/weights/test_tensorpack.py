"""tensorpack's detectors: its forward pass, written down from the arrays of its file, and the model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gn_detect
from gn_detect.modeling import MaskRCNN
from gn_detect.weights import load_weights, read_architecture, read_checkpoint
from tests.refusal import refusal

from . import schemes

CONFIG = "tensorpack/mask_rcnn_R_50_FPN_2x_gn.yaml"
CASCADE = "tensorpack/cascade_mask_rcnn_R_101_FPN_9x_gn_scratch.yaml"
SMALL = [
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.GN.NUM_GROUPS", "4",
    "MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "16",
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "50",
]  # fmt: skip


def build(name: str, *keys: str) -> MaskRCNN:
    torch.manual_seed(1)
    model = gn_detect.build_model(gn_detect.load_config(name, [*SMALL, *keys])).eval()
    model.use_memory_format(torch.contiguous_format)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in (CONFIG, CASCADE):
        found[name] = tmp_path_factory.mktemp("tensorpack") / "m.npz"
        state = schemes.randomised(build(name), seed=3)
        # Scales near 1, biases of 0.2 and weights of 0.3, so that each of them shows.
        state = {
            k: v + 1 if k.endswith("norm.weight") else v * (6 if v.dim() > 1 else 4) for k, v in state.items()
        }
        np.savez(found[name], **schemes.arrays(schemes.tensorpack(state)))
    return found


class TensorFlow:
    """The operators of tensorpack's model, in float64, on the arrays of a file."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {n.removesuffix(":0"): torch.from_numpy(arrays[n]).double() for n in arrays.files}

    def conv(self, name: str, x: Tensor, stride: int = 1, same: bool = True) -> Tensor:
        weight = self.arrays[f"{name}/W"].permute(3, 2, 0, 1)
        return F.conv2d(x, weight, self.arrays.get(f"{name}/b"), stride, weight.shape[-1] // 2 if same else 0)

    def norm(self, name: str, x: Tensor, groups: int = 4) -> Tensor:
        parts = x.unflatten(1, (groups, -1))
        mean, var = parts.mean((2, 3, 4), keepdim=True), parts.var((2, 3, 4), keepdim=True, correction=0)
        x = ((parts - mean) / (var + 1e-5).sqrt()).flatten(1, 2)
        shape = (1, -1, 1, 1)
        return x * self.arrays[f"{name}/gamma"].view(shape) + self.arrays[f"{name}/beta"].view(shape)

    def fully(self, name: str, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.arrays[f"{name}/W"] + self.arrays[f"{name}/b"]


def crop_and_resize(image: Tensor, box: Tensor, side: int) -> Tensor:
    """Sample (C, H, W), padded symmetrically by a pixel, at side x side points of a box (4,)."""
    padded = F.pad(image[None], (1, 1, 1, 1), mode="replicate")[0]
    x0, y0, x1, y1 = box + 1
    points = [(torch.arange(side).double() + 0.5) * (b - a) / side + a - 0.5 for a, b in ((y0, y1), (x0, x1))]
    rows, columns = torch.meshgrid(*points, indexing="ij")
    inside = (rows >= 0) & (rows <= padded.shape[1] - 1) & (columns >= 0) & (columns <= padded.shape[2] - 1)
    top, left = rows.floor().clamp(0, padded.shape[1] - 2), columns.floor().clamp(0, padded.shape[2] - 2)
    v, u, i, j = rows - top, columns - left, top.long(), left.long()
    upper = padded[:, i, j] * (1 - u) + padded[:, i, j + 1] * u
    lower = padded[:, i + 1, j] * (1 - u) + padded[:, i + 1, j + 1] * u
    return (upper * (1 - v) + lower * v) * inside


def test_backbone_and_pyramid(files: dict[str, Path]) -> None:
    model = build(CONFIG)
    report = load_weights(model, files[CONFIG])
    assert (report.scheme, report.missing, report.unexpected) == ("tensorpack", [], [])
    theirs, x = TensorFlow(files[CONFIG]), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = model.backbone.bottom_up(x)
        pyramid = model.backbone(x)
    # "AlignPadding": three pixels above, two below, and one above the pooling.
    stem = theirs.norm(
        "conv0/gn", theirs.conv("conv0", F.pad(x.double(), (3, 2, 3, 2)), 2, same=False)
    ).relu()
    y = F.max_pool2d(F.pad(stem, (1, 0, 1, 0)), 3, 2)
    for stage, count in enumerate((3, 4, 6, 3)):
        for block in range(count):
            name, stride = f"group{stage}/block{block}", 2 if stage and not block else 1
            z = theirs.norm(f"{name}/conv1/gn", theirs.conv(f"{name}/conv1", y)).relu()
            if stride == 2:
                z = theirs.conv(f"{name}/conv2", F.pad(z, (1, 0, 1, 0)), 2, same=False)
            else:
                z = theirs.conv(f"{name}/conv2", z)
            z = theirs.norm(f"{name}/conv2/gn", z).relu()
            z = theirs.norm(f"{name}/conv3/gn", theirs.conv(f"{name}/conv3", z))
            if not block:
                y = theirs.norm(f"{name}/convshortcut/gn", theirs.conv(f"{name}/convshortcut", y, stride))
            y = (y + z).relu()
        torch.testing.assert_close(features[f"res{stage + 2}"].double(), y, rtol=1e-4, atol=1e-4)
    above: Tensor | float = 0.0
    for level in (5, 4, 3, 2):
        x = features[f"res{level}"].double()
        lateral = theirs.norm(f"fpn/gn_c{level}", theirs.conv(f"fpn/lateral_1x1_c{level}", x)) + above
        expected = theirs.norm(f"fpn/gn_p{level}", theirs.conv(f"fpn/posthoc_3x3_p{level}", lateral))
        torch.testing.assert_close(pyramid[f"p{level}"].double(), expected, rtol=1e-4, atol=1e-4)
        above = lateral.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(pyramid["p6"], pyramid["p5"][:, :, ::2, ::2])


@pytest.mark.parametrize("name", [CONFIG, CASCADE])
def test_heads(name: str, files: dict[str, Path]) -> None:
    """Bias, ReLU and norm in this order; the background is the first class there and the last here."""
    model, theirs = build(name), TensorFlow(files[name])
    load_weights(model, files[name])
    heads, is_cascade = model.roi_heads, name == CASCADE
    x = torch.randn(2, 16, 7, 7)
    for stage in range(3 if is_cascade else 1):
        box_head = heads.box_head[stage] if is_cascade else heads.box_head
        with torch.no_grad():
            logits, deltas = heads.predictors[stage](box_head(x))
        prefix = f"cascade_rcnn_stage{stage + 1}" if is_cascade else "fastrcnn"
        head, y = f"{prefix}/head" if is_cascade else prefix, x.double()
        for i in range(4):
            y = theirs.norm(f"{head}/gn{i}", theirs.conv(f"{head}/conv{i}", y).relu())
        y = theirs.fully(f"{head}/fc", y).relu()
        scores = theirs.fully(f"{prefix}/outputs/class", y)
        boxes = theirs.fully(f"{prefix}/outputs/box", y).view(2, -1, 4)
        expected = torch.cat([scores[:, 1:], scores[:, :1]], dim=1)
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
        boxes = boxes if is_cascade else boxes[:, 1:]
        torch.testing.assert_close(deltas.double().view(2, -1, 4), boxes, rtol=1e-4, atol=1e-4)
    x, labels = torch.randn(2, 16, 14, 14), torch.tensor([0, 79])
    with torch.no_grad():
        masks = heads.mask_head(x, labels)
    y = x.double()
    for i in range(4):
        y = theirs.norm(f"maskrcnn/gn{i}", theirs.conv(f"maskrcnn/fcn{i}", y).relu())
    kernel, up = theirs.arrays["maskrcnn/deconv/W"], torch.zeros(2, 16, 28, 28).double()
    for i, j in np.ndindex(2, 2):  # each cell of the input becomes 2 x 2
        up[:, :, i::2, j::2] = torch.einsum("nchw,oc->nohw", y, kernel[i, j])
    up = (up + theirs.arrays["maskrcnn/deconv/b"].view(1, -1, 1, 1)).relu()
    expected = theirs.conv("maskrcnn/conv", up)[torch.arange(2), labels]
    torch.testing.assert_close(masks.double(), expected, rtol=1e-4, atol=1e-4)


def test_pooling_and_rpn(files: dict[str, Path]) -> None:
    """Four samples in each cell, also at the border; boxes of 128 and 96 pixels are of levels 3 and 2."""
    model, theirs = build(CONFIG), TensorFlow(files[CONFIG])
    load_weights(model, files[CONFIG])
    levels = [torch.randn(1, 16, 64 // 2**i, 96 // 2**i) for i in range(4)]
    boxes = torch.tensor([[3.0, 7, 131, 135], [300, 170, 384, 256], [-6, -5, 90, 91]])
    pooled = model.roi_heads.box_pooler(levels, [boxes])
    for box, level, found in zip(boxes.double(), (1, 0, 0), pooled.double(), strict=True):
        sampled = crop_and_resize(levels[level][0].double(), box / 2 ** (level + 2), 14)
        torch.testing.assert_close(found, F.avg_pool2d(sampled, 2), rtol=1e-4, atol=1e-4)
    rpn = model.proposal_generator
    with torch.no_grad():
        (logits,), (deltas,) = rpn.rpn_head(levels[:1])
    hidden = theirs.conv("rpn/conv0", levels[0].double()).relu()
    expected = theirs.conv("rpn/class", hidden).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    expected = theirs.conv("rpn/box", hidden).permute(0, 2, 3, 1).reshape(1, -1, 4)
    torch.testing.assert_close(deltas.double(), expected, rtol=1e-4, atol=1e-4)
    anchors = rpn.anchor_generator([(3, 2)] * 5)[0].view(3, 2, 3, 4)
    wide = 32 / 0.5**0.5
    torch.testing.assert_close(
        anchors[1, 1, 0], torch.tensor([4 - wide / 2, 4 - wide / 4, 4 + wide / 2, 4 + wide / 4])
    )


def test_keys_come_from_the_tensors(files: dict[str, Path]) -> None:
    keys = read_architecture(read_checkpoint(files[CASCADE])).keys
    assert (keys["MODEL.CONV_STYLE"], keys["MODEL.ROI_HEADS.NAME"]) == ("tensorpack", "CascadeROIHeads")
    assert keys["MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO"] == 2


@pytest.mark.parametrize("for_training", [False, True])
def test_the_other_style_is_refused(files: dict[str, Path], for_training: bool) -> None:
    """Without the biases all tensors would fit."""
    with refusal("other-network", "MODEL.CONV_STYLE tensorpack"):
        load_weights(
            build(CONFIG, "MODEL.CONV_STYLE", "detectron2"), files[CONFIG], for_training=for_training
        )
