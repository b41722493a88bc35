"""Names and classes of other libraries: every value arrives where it belongs."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torchvision

import gn_detect
from gn_detect.weights import implied_keys, load_weights, read_checkpoint, save_weights, translate
from gn_detect.weights.names.resnet import COCO_IDS
from tests.refusal import refusal

from . import schemes

SMALL = [
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.GN.NUM_GROUPS", "4",
    "MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "",
]  # fmt: skip
GN = "GN/mask_rcnn_R_50_FPN_2x_gn.yaml"
FROZEN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"


def config(name: str, *keys: str) -> gn_detect.Config:
    return gn_detect.load_config(name, [*SMALL, *keys])


def model_of(cfg: gn_detect.Config) -> torch.nn.Module:
    torch.manual_seed(1)
    return gn_detect.build_model(cfg)


def assert_loaded(model: torch.nn.Module, state: schemes.State, report: gn_detect.weights.LoadReport) -> None:
    assert not report.missing
    assert not report.unexpected
    assert not report.mismatched
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", [GN, FROZEN, C4])
def test_detectron(name: str, tmp_path: Path) -> None:
    cfg = config(name)
    model = model_of(cfg)
    state = schemes.with_affine_norms(schemes.randomised(model))
    blobs = schemes.arrays(schemes.as_detectron(state))
    blobs |= {"conv1_w_momentum": blobs["conv1_w"], "pred_w": blobs["conv1_w"]}
    schemes.write_pickle(tmp_path / "m.pkl", {"blobs": blobs, "cfg": "MODEL: {}"})
    report = load_weights(model, tmp_path / "m.pkl", config=cfg)
    assert_loaded(model, state, report)
    assert report.scheme == "Detectron"
    assert "pred_w" in report.left_out
    assert any("background moved" in change for change in report.converted)


RGB = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"]
RGB += ["MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]", "MODEL.RESNETS.STRIDE_IN_1X1", "False"]
"""Keys for ResNets of torchvision."""


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", [GN, FROZEN, C4])
def test_mmdetection(name: str, version: int, tmp_path: Path) -> None:
    cfg = config(name, *([] if name == GN else RGB))
    model = model_of(cfg)
    state = schemes.randomised(model)
    theirs = schemes.mmdetection(state, version, "gn" if name == GN else "bn")
    theirs["ema_backbone_conv1_weight"] = theirs["backbone.conv1.weight"]
    torch.save({"meta": {"epoch": 24}, "state_dict": theirs, "optimizer": {}}, tmp_path / "m.pth")
    report = load_weights(model, tmp_path / "m.pth", config=cfg)
    assert_loaded(model, state, report)
    assert report.scheme == "mmdetection"
    assert bool(report.converted) == (version == 1)


def test_input_that_mmdetection_states(tmp_path: Path) -> None:
    cfg = config(GN)
    theirs = schemes.mmdetection(schemes.randomised(model_of(cfg)))
    text = "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)"
    torch.save({"meta": {"config": text}, "state_dict": theirs}, tmp_path / "m.pth")
    with refusal("other-input", "INPUT.FORMAT RGB MODEL.PIXEL_MEAN '[123.675"):
        load_weights(model_of(cfg), tmp_path / "m.pth", config=cfg)


@pytest.mark.parametrize(("norm", "order"), [("bn", "RGB"), ("gn", "BGR")])
def test_backbone_of_timm_or_mmdetection(norm: str, order: str, tmp_path: Path) -> None:
    """Timm calls its group norms bn, and takes RGB; mmdetection's copies of Detectron's are gn and BGR."""
    cfg = config(GN)
    model = model_of(cfg)
    state = schemes.backbone_of(schemes.randomised(model))
    theirs = schemes.torchvision_backbone(state, norm) | {
        "fc.weight": torch.ones(3, 4),
        "fc.bias": torch.ones(3),
    }
    torch.save(theirs, tmp_path / "m.pth")
    keys = implied_keys(cfg, tmp_path / "m.pth")
    assert keys.get("INPUT.FORMAT", "BGR") == order
    if keys:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with refusal("other-input", "--fix-config", "INPUT.FORMAT RGB"):
            load_weights(model, tmp_path / "m.pth", for_training=True, config=cfg)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
    report = load_weights(model, tmp_path / "m.pth", for_training=True, config=cfg.replace(keys))
    assert set(report.matched) == set(state)
    assert set(report.left_out) == {"fc.weight", "fc.bias"}
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_timms_own_model() -> None:
    """Real names of timm, and the same features."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    original = timm.create_model("resnet50_gn", features_only=False).eval()
    cfg = gn_detect.load_config(
        GN, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.CHANNELS_LAST", "False"]
    )
    model = model_of(cfg).eval()
    checkpoint = gn_detect.weights.Checkpoint(dict(original.state_dict()))
    load_weights(model, checkpoint, for_training=True)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = original.forward_features(image)
        found = model.backbone.bottom_up(image)["res5"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_torchvisions_own_detectors(version: int) -> None:
    """Real names of torchvision; features, RPN, boxes and masks agree layer by layer."""
    torch.manual_seed(0)
    builders = torchvision.models.detection
    build = builders.maskrcnn_resnet50_fpn if version == 1 else builders.maskrcnn_resnet50_fpn_v2
    original = build(weights=None, weights_backbone=None, num_classes=91).eval()
    for name, module in list(original.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            if version == 1:  # as torchvision builds the model for its published weights
                frozen = torchvision.ops.FrozenBatchNorm2d(module.num_features, eps=0.0)
                frozen.load_state_dict(module.state_dict())
                original.set_submodule(name, frozen)
    keys = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]", "MODEL.DEVICE", "cpu"]
    keys += ["MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]", "MODEL.RESNETS.STRIDE_IN_1X1", "False"]
    keys += ["MODEL.WEIGHTS", "", "MODEL.CHANNELS_LAST", "False"]
    if version == 2:
        for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
            keys += [f"MODEL.{part}.NORM", "BN"]
        keys += ["MODEL.ROI_BOX_HEAD.NUM_CONV", "4", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"]
        keys += ["MODEL.RPN.CONV_DIMS", "[-1, -1]", "MODEL.BACKBONE.FREEZE_AT", "0"]
    cfg = gn_detect.load_config(FROZEN, keys)
    model = model_of(cfg).eval()
    report = load_weights(model, gn_detect.weights.Checkpoint(dict(original.state_dict())), config=cfg)
    assert not report.missing
    assert not report.unexpected
    image, regions = torch.randn(1, 3, 64, 96), torch.randn(3, 256, 7, 7)
    labels = torch.tensor([0, 11, 79])  # contiguous; COCO's 1, 13 and 90
    with torch.no_grad():
        expected = original.backbone(image)
        found = model.backbone(image)
        for theirs, ours in zip(expected.values(), found.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        logits, _ = original.rpn.head(list(expected.values()))
        ours, _ = model.proposal_generator.rpn_head(list(expected.values()))
        torch.testing.assert_close(ours[0], logits[0].permute(0, 2, 3, 1).flatten(1), rtol=1e-4, atol=1e-4)
        scores, boxes = original.roi_heads.box_predictor(original.roi_heads.box_head(regions))
        our_scores, our_boxes = model.roi_heads.box_predictor(model.roi_heads.box_head(regions))
        torch.testing.assert_close(our_scores, scores[:, [*COCO_IDS, 0]], rtol=1e-4, atol=1e-4)
        boxes = boxes.view(3, 91, 4)[:, COCO_IDS].flatten(1)
        torch.testing.assert_close(our_boxes, boxes, rtol=1e-4, atol=1e-4)
        masks = original.roi_heads.mask_predictor(original.roi_heads.mask_head(regions))
        masks = masks[range(3), [1, 13, 90]]
        torch.testing.assert_close(model.roi_heads.mask_head(regions, labels), masks, rtol=1e-4, atol=1e-4)


def test_faster_rcnn_of_torchvision() -> None:
    """The same without masks; other classes than COCO's 91 ids keep their order."""
    torch.manual_seed(0)
    original = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4
    )
    cfg = gn_detect.load_config(
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", "3", *RGB],
    )
    model = model_of(cfg)
    theirs = dict(original.state_dict())
    report = load_weights(model, gn_detect.weights.Checkpoint(theirs), config=cfg)
    assert not report.missing
    assert not report.unexpected
    assert not report.mismatched
    ours = model.state_dict()["roi_heads.box_predictor.cls_score.bias"]
    assert torch.equal(ours, theirs["roi_heads.box_predictor.cls_score.bias"][[1, 2, 3, 0]])


@pytest.mark.parametrize("library", ["Detectron", "mmdetection"])
def test_90_categories_of_another_dataset(library: str, tmp_path: Path) -> None:
    """With the background 91, which only torchvision's detectors of COCO have for 80 categories."""
    cfg = config(GN, "MODEL.ROI_HEADS.NUM_CLASSES", "90")
    model = model_of(cfg)
    state = schemes.randomised(model)
    if library == "Detectron":
        schemes.write_pickle(tmp_path / "m.pkl", {"blobs": schemes.arrays(schemes.as_detectron(state))})
    else:
        torch.save({"state_dict": schemes.mmdetection(state, 1)}, tmp_path / "m.pkl")
    assert_loaded(model, state, load_weights(model, tmp_path / "m.pkl"))


def test_backbone_alone_in_detectron2s_names(tmp_path: Path) -> None:
    """detectron2's copy of torchvision's R-50: no prefix, and the author says that it takes RGB."""
    cfg = config(FROZEN)
    model = model_of(cfg)
    state = schemes.backbone_of(schemes.randomised(model))
    plain = {name.removeprefix("backbone.bottom_up."): tensor for name, tensor in state.items()}
    content = {"model": schemes.arrays(plain), "__author__": "torchvision", "matching_heuristics": True}
    schemes.write_pickle(tmp_path / "R-50.pkl", content)
    keys = implied_keys(cfg, tmp_path / "R-50.pkl")
    assert keys["INPUT.FORMAT"] == "RGB"
    assert keys["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    report = load_weights(model, tmp_path / "R-50.pkl", for_training=True, config=cfg.replace(keys))
    assert set(report.matched) == set(state)


@pytest.mark.parametrize("whole", [True, False])
def test_resnext_has_its_own_deviation(whole: bool, tmp_path: Path) -> None:
    """In detectron2's copies; Detectron's have the deviation in their first convolution."""
    cfg = config(FROZEN, "MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "1")
    model = model_of(cfg)
    state = schemes.backbone_of(schemes.randomised(model))
    state = state if whole else schemes.with_affine_norms(state)
    schemes.write_pickle(tmp_path / "X.pkl", schemes.arrays(schemes.as_detectron(state, whole_norms=whole)))
    keys = implied_keys(cfg, tmp_path / "X.pkl")
    deviation = {"MODEL.PIXEL_STD": [57.375, 57.12, 58.395]} if whole else {}
    assert keys == deviation | {"MODEL.RESNETS.STRIDE_IN_1X1": False}
    report = load_weights(model, tmp_path / "X.pkl", for_training=True, config=cfg.replace(keys))
    assert set(report.matched) == set(state)
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_backbone_that_matches_in_part_is_an_error(tmp_path: Path) -> None:
    cfg = config(GN)
    model = model_of(cfg)
    blobs = schemes.as_detectron(schemes.backbone_of(schemes.randomised(model)))
    part = {name: tensor for name, tensor in blobs.items() if not name.startswith("res5")}
    schemes.write_pickle(tmp_path / "m.pkl", schemes.arrays(part))
    with refusal("other-network", "129 of the backbone's 159", "'backbone.bottom_up.res5"):
        load_weights(model, tmp_path / "m.pkl", for_training=True, config=cfg)


def test_our_own_file_remembers_its_input(tmp_path: Path) -> None:
    cfg = config(GN, "MODEL.PIXEL_STD", "[57.375, 57.12, 58.395]")
    model = model_of(cfg)
    entries = {"input": gn_detect.weights.InputConvention.of_config(cfg).as_metadata()}
    for ending in ("pth", "pkl", "safetensors"):
        path = tmp_path / f"m.{ending}"
        save_weights(path, model.state_dict(), entries)
        load_weights(model, path, config=cfg)
        with refusal("other-input", "PIXEL_STD"):
            load_weights(model, path, config=config(GN))


def test_formats_hold_the_same_and_a_version(tmp_path: Path) -> None:
    model = model_of(config(FROZEN))
    state = model.state_dict()
    for ending in ("pth", "pkl", "safetensors"):
        path = tmp_path / f"m.{ending}"
        save_weights(path, state, {"class_names": ["a"]})
        found = read_checkpoint(path)
        assert found.metadata.to_dict() == {"class_names": ["a"]}
        assert set(found.tensors) == set(state)
        for name, tensor in state.items():
            assert torch.equal(found.tensors[name], tensor)
            assert found.tensors[name].shape == tensor.shape
    content = pickle.loads((tmp_path / "m.pkl").read_bytes())
    assert content["__author__"] == "gn_detect"
    assert content["format_version"] == 1
    assert "matching_heuristics" not in content
    content = {"model": {"w": torch.ones(1)}, "__author__": "gn_detect", "format_version": 9}
    torch.save(content, tmp_path / "9.pth")
    with refusal("newer-file", "version 9"):
        read_checkpoint(tmp_path / "9.pth")


def test_names_that_fit_stay(tmp_path: Path) -> None:
    """load_weights also serves other people's modules."""
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), tmp_path / "m.pth")
    report = load_weights(torchvision.models.resnet18(), tmp_path / "m.pth")
    assert report.scheme == "detectron2"
    assert not report.missing


def test_real_resnets_are_recognised(shared_dir: Path) -> None:
    """CIFAR's have other shapes, but torchvision's names; they mean RGB."""
    path = next((shared_dir / "weights" / "resnet_cifar10_bn").glob("resnet20*"))
    found = translate(read_checkpoint(path))
    assert found.scheme == "torchvision"
    assert found.convention.format == "RGB"
    assert {"backbone.bottom_up.res2.0.conv1.weight", "backbone.bottom_up.stem.conv1.weight"} <= set(
        found.tensors
    )


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [
        ("fasterrcnn_resnet50_fpn", 91, True),
        ("fasterrcnn_resnet50_fpn", 3, False),
        ("fasterrcnn_resnet50_fpn_v2", 91, False),
        ("fasterrcnn_mobilenet_v3_large_fpn", 91, False),
        ("maskrcnn_resnet50_fpn", 91, True),
        ("retinanet_resnet50_fpn", 91, True),
        ("retinanet_resnet50_fpn_v2", 91, False),
        ("fcos_resnet50_fpn", 91, False),
    ],
)
def test_published_detectors_with_a_resnet_alone_have_eps_0(name: str, classes: int, expected: bool) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    checkpoint = gn_detect.weights.Checkpoint(model.state_dict())
    assert gn_detect.weights.computes_with_eps_0(checkpoint) == expected
