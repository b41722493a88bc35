"""The whole detector: every architecture trains and detects; batches do not change what is found."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from gn_detect.layers import FrozenBatchNorm2d, is_norm
from gn_detect.modeling import mask_rcnn
from gn_detect.structures import Detections

C4 = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 0,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64, 128]],
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 12,
}
BOTTLENECK = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
}
DC5 = BOTTLENECK | {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RPN.IN_FEATURES": ["res5"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64, 128]],
}
CASCADE = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
ARCHITECTURES = {
    "R-18-FPN": {},
    "R-34-FPN 4conv1fc": {
        "MODEL.RESNETS.DEPTH": 34,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
        "MODEL.ROI_BOX_HEAD.NORM": "GN",
    },
    "R-50-FPN stride in 1x1": BOTTLENECK | {"MODEL.RESNETS.STRIDE_IN_1X1": True},
    "X-50-FPN": BOTTLENECK
    | {
        "MODEL.RESNETS.NUM_GROUPS": 8,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    },
    "C4": BOTTLENECK | C4,
    "DC5": DC5,
    "X-50-DC5 deformable": DC5
    | {
        "MODEL.RESNETS.NUM_GROUPS": 8,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, True, True],
        "MODEL.RESNETS.DEFORM_MODULATED": True,
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": 2,
    },
    "class-agnostic": {
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
    },
    "Faster R-CNN": {"MODEL.MASK_ON": False},
    "cascade": CASCADE,
    "DC5 cascade of two stages": DC5
    | CASCADE
    | {
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": [0.5, 0.6],
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": [[10, 10, 5, 5], [20, 20, 10, 10]],
    },
    "FPN avg, two RPN convolutions": {"MODEL.FPN.FUSE_TYPE": "avg", "MODEL.RPN.CONV_DIMS": [-1, -1]},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_and_detects(
    name: str, small_model, make_images, target, empty_target
) -> None:
    model = small_model(ARCHITECTURES[name])
    images = make_images((96, 128), (96, 96))
    losses = model(images, [target, empty_target])
    stages = {"cascade": 3, "DC5 cascade of two stages": 2}.get(name, 0)
    endings = [f"_stage{k}" for k in range(stages)] or [""]
    expected = {"loss_rpn_cls", "loss_rpn_loc"}
    expected |= {f"{loss}{ending}" for loss in ("loss_cls", "loss_box_reg") for ending in endings}
    assert set(losses) == (expected | {"loss_mask"} if model.has_masks else expected)
    assert all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without

    model.eval()
    detections = model.detect(images, [(192, 256), (50, 50)])
    for found, (height, width) in zip(detections, [(192, 256), (50, 50)], strict=True):
        assert 0 < len(found) <= 100
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 2] <= width).all()
        assert (found.boxes[:, 3] <= height).all()
        assert (found.scores.diff() <= 0).all()
        assert found.labels.max() < 3
        assert (found.masks is not None) == model.has_masks
        if model.has_masks:
            assert found.masks.shape == (len(found), height, width)
            assert found.masks.dtype == torch.bool


def test_a_batch_without_objects_reaches_every_parameter(small_model, make_images, empty_target) -> None:
    """Data-parallel training waits for a gradient of each parameter in each step."""
    model = small_model()
    losses = model(make_images((96, 128), (96, 96)), [empty_target, empty_target])
    sum(losses.values()).backward()
    assert losses["loss_mask"] == 0
    assert losses["loss_box_reg"] == 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN", "GN1", "IN", "LN"])
def test_norm_keys_choose_the_layers(norm: str, small_model, make_images, empty_target) -> None:
    model = small_model(
        {
            "MODEL.RESNETS.NORM": norm,
            "MODEL.FPN.NORM": norm,
            "MODEL.ROI_MASK_HEAD.NORM": norm,
            "MODEL.ROI_BOX_HEAD.NORM": norm,
            "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
            "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
        }
    )
    for part in (
        model.backbone.bottom_up,
        model.backbone.fpn_output2,
        model.roi_heads.box_head,
        model.roi_heads.mask_head,
    ):
        norms = [m for m in part.modules() if is_norm(m)]
        assert norms
        assert len({type(m) for m in norms}) == 1
    groups = {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {"GN": {32}, "GN1": {1}}.get(norm, groups)
    assert bool(groups) == (norm in ("GN", "GN1", "IN"))
    losses = model(make_images((64, 64)), [empty_target])
    assert torch.isfinite(sum(losses.values()))


def test_group_size_and_eps_come_from_the_config(small_model) -> None:
    model = small_model({"MODEL.GN.NUM_GROUPS": 16, "MODEL.GN.EPS": 1e-3})
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.eps) for m in norms} == {(16, 1e-3)}


def test_a_convolution_has_a_bias_where_it_has_no_norm(small_model) -> None:
    model = small_model({"MODEL.FPN.NORM": ""})
    assert model.backbone.fpn_output2.bias is not None
    assert model.backbone.fpn_output2.norm is None
    assert model.roi_heads.mask_head.mask_fcn1.bias is None
    assert model.backbone.bottom_up.stem.conv1.bias is None


@pytest.mark.parametrize(("freeze_at", "first_trained"), [(0, "stem"), (1, "res2"), (2, "res3"), (5, None)])
def test_freeze_at(freeze_at: int, first_trained: str | None, small_model) -> None:
    model = small_model({"MODEL.BACKBONE.FREEZE_AT": freeze_at, "MODEL.RESNETS.NORM": "BN"})
    stages = ["stem", "res2", "res3", "res4", "res5"]
    for i, name in enumerate(stages):
        stage = getattr(model.backbone.bottom_up, name)
        trained = {p.requires_grad for p in stage.parameters()}
        assert trained == {i >= freeze_at}
        assert any(isinstance(m, FrozenBatchNorm2d) for m in stage.modules()) == (i < freeze_at)
    assert (stages[freeze_at] if freeze_at < 5 else None) == first_trained


def test_detections_do_not_depend_on_batch_mates(small_model, make_images) -> None:
    """GN statistics see padding, so images of other padded sizes go through the network apart."""
    model = small_model().eval()
    images = make_images((96, 128), (128, 96), (90, 120), (64, 64))
    together = model.detect(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = model.detect([image])
        torch.testing.assert_close(found.boxes, alone.boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.scores, alone.scores, rtol=0, atol=1e-5)
        assert torch.equal(found.labels, alone.labels)
        assert (found.masks != alone.masks).float().mean() < 1e-4


@pytest.mark.parametrize("name", ["R-18-FPN", "C4", "class-agnostic"])
def test_an_image_without_proposals_or_a_diverged_model_finds_nothing(
    name: str, small_model, make_images
) -> None:
    images = make_images((96, 128), (96, 96))
    model = small_model(ARCHITECTURES[name] | {"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 10000}).eval()
    assert [len(found) for found in model.detect(images)] == [0, 0]
    model = small_model(ARCHITECTURES[name]).eval()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    found = model.detect(images)[0]
    assert len(found) == 0
    assert found.masks.shape == (0, 96, 128)


def test_detections_are_where_their_masks_were_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU, where the GPU has no memory for masks of a large image; so that they can be indexed."""
    found = Detections(
        torch.tensor([[1.0, 2, 9, 8]] * 2), torch.rand(2), torch.zeros(2).long(), torch.rand(2, 4, 4)
    )
    monkeypatch.setattr(mask_rcnn, "paste_masks", lambda *_: torch.zeros(2, 20, 20, device="meta"))
    moved = mask_rcnn.rescale(found, (10, 10), (20, 20))
    assert {x.device.type for x in (moved.boxes, moved.scores, moved.labels, moved.masks)} == {"meta"}


def test_memory_formats_agree(small_model, make_images, target) -> None:
    images, targets = make_images((96, 128)), [target]
    values = []
    for channels_last in (True, False):
        model = small_model({"MODEL.CHANNELS_LAST": channels_last})
        assert model.backbone.bottom_up.stem.conv1.weight.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        torch.manual_seed(1)
        values.append(sum(model(images, targets).values()).item())
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("R-18-FPN", "C4", "X-50-FPN") else pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_a_model_takes_another_memory_format_and_its_own_again(name: str, small_model, make_images, target):
    """Inside it is bit for bit the model that was built so; parameters and gradients stay where they were."""
    images, targets = make_images((96, 128)), [target]
    other = small_model(ARCHITECTURES[name] | {"MODEL.CHANNELS_LAST": False}).eval()
    model = small_model(ARCHITECTURES[name] | {"MODEL.CHANNELS_LAST": True})
    other.load_state_dict(model.state_dict())
    sum(model(images, targets).values()).backward()
    model.eval()
    before = [
        (p, p.stride(), p.grad, None if p.grad is None else p.grad.data_ptr()) for p in model.parameters()
    ]
    with model.in_memory_format(torch.contiguous_format):
        found, expected = model.detect(images)[0], other.detect(images)[0]
        features, wanted = (m.backbone(m.preprocess(images)) for m in (model, other))
    assert len(found) > 0
    assert torch.equal(found.boxes, expected.boxes)
    assert all(torch.equal(features[key], wanted[key]) for key in wanted)
    for parameter, (same, stride, grad, place) in zip(model.parameters(), before, strict=True):
        assert parameter is same
        assert parameter.stride() == stride
        assert parameter.grad is grad
        assert grad is None or grad.data_ptr() == place


def test_float_and_uint8_images_are_the_same(small_model, make_images) -> None:
    model = small_model().eval()
    images = make_images((64, 64))
    assert torch.equal(model.preprocess(images), model.preprocess([i.float() for i in images]))


def test_channels_must_fit_the_groups(small_model) -> None:
    with pytest.raises(
        Exception, match="40 channels cannot be split into 32 groups; set MODEL.GN.NUM_GROUPS"
    ):
        small_model({"MODEL.FPN.OUT_CHANNELS": 40})


@pytest.mark.parametrize(("name", "channels_last"), [("R-18-FPN", False), ("C4", True)])
def test_a_whole_detector_is_saved_and_copied(
    name: str, channels_last: bool, small_model, make_images
) -> None:
    """``torch.save`` uses protocol 2, in which PyTorch's own ``memory_format`` cannot be pickled."""
    keys = {"MODEL.CHANNELS_LAST": channels_last, "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING": True}
    model = small_model(ARCHITECTURES[name] | keys).eval()
    images = make_images((96, 128))
    expected = model.detect(images)[0]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [torch.load(file, weights_only=False), copy.deepcopy(model)]
    copies += [pickle.loads(pickle.dumps(model, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)]
    for found in copies:
        assert found.memory_format == (torch.channels_last if channels_last else torch.contiguous_format)
        detections = found.detect(images)[0]
        assert torch.equal(detections.boxes, expected.boxes)
        assert torch.equal(detections.scores, expected.scores)
