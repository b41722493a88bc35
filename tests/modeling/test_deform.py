"""Detectors with deformable convolutions: detectron2's numbers, refusals, conversion, compilation, export."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gn_detect import convert_norm
from gn_detect.config import Config, load_config
from gn_detect.convert import calibrate
from gn_detect.engine import Predictor
from gn_detect.export.run import ExportedPredictor
from gn_detect.export.write import export_detector
from gn_detect.layers import GroupNorm
from gn_detect.modeling import MaskRCNN, build_model, paired_outputs
from gn_detect.structures import Target
from gn_detect.weights import load_weights, save_weights
from tests.refusal import refusal

from . import cascade_case, deform_case

# detectron2 0.6's. Its own operator has neither gradients nor factors nor several groups on a CPU: there its
# blocks ran with torchvision's, which its own calls for the rest.
STORED = json.loads(Path(__file__).with_name("deform_detectron2.json").read_text())
DEFORM = "MODEL.RESNETS.DEFORM_ON_PER_STAGE"


@cache
def case(name: str) -> Config:
    # In channels-last, sums have another order.
    return load_config("Base-RCNN-FPN.yaml").replace(
        deform_case.CASES[name] | {"MODEL.CHANNELS_LAST": False, "INPUT.MIN_SIZE_TEST": 96}
    )


def make(cfg: Config) -> MaskRCNN:
    model = build_model(cfg)
    model.load_state_dict(deform_case.values({n: tuple(v.shape) for n, v in model.state_dict().items()}))
    return model


@pytest.mark.parametrize("name", deform_case.CASES)
def test_detections_are_detectron2s(name: str) -> None:
    model = make(case(name)).eval()
    for found, stored in zip(model.detect(cascade_case.images()), STORED[name]["detections"], strict=True):
        assert len(found) == stored["count"]
        first = found[:8]
        assert first.labels.tolist() == stored["labels"]
        torch.testing.assert_close(first.scores, torch.tensor(stored["scores"]), rtol=0, atol=1e-4)
        torch.testing.assert_close(first.boxes, torch.tensor(stored["boxes"]), rtol=0, atol=0.01)
        assert first.masks is not None
        pixels = torch.tensor(stored["pixels"])
        assert ((first.masks.sum((1, 2)) - pixels).abs() <= 2 + pixels / 500).all()


@pytest.mark.parametrize("name", deform_case.CASES)
def test_losses_and_gradients_are_detectron2s(name: str) -> None:
    """Not the gradients of the cascade, up to 9e-3 off: weights that are rounded once move them as much."""
    model = make(case(name))
    losses = model.losses(cascade_case.images(), [Target(*parts) for parts in cascade_case.objects()])
    assert losses.keys() == STORED[name]["losses"].keys()
    for loss, value in STORED[name]["losses"].items():
        assert losses[loss].item() == pytest.approx(value, rel=1e-4), loss
    torch.stack(list(losses.values())).sum().backward()
    parameters = dict(model.named_parameters())
    assert all(p.grad is not None for p in parameters.values() if p.requires_grad)
    for parameter, norm in STORED[name].get("gradient_norms", {}).items():
        gradient = parameters[parameter].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), parameter


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}, (DEFORM, "bottlenecks")),
        ({"MODEL.RESNETS.DEFORM_NUM_GROUPS": 3}, ("DEFORM_NUM_GROUPS", "16", "res3")),
        (
            {"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone", "MODEL.BACKBONE.MODEL": "resnet50"},
            (DEFORM, "build_timm_fpn_backbone"),
        ),
    ],
)
def test_settings_that_have_no_deformable_convolution(
    changes: dict[str, Any], names: tuple[str, ...]
) -> None:
    with refusal("conflicting-keys", *names):
        case("R-50").replace(changes)


def test_the_heads_of_c4_have_none() -> None:
    cfg = load_config("Base-RCNN-C4.yaml", [DEFORM, "[False, True, True, False]"])
    assert cfg.model.resnets.deform_on_per_stage[2]
    with refusal("conflicting-keys", DEFORM, "Res5ROIHeads"):
        cfg.replace({DEFORM: [False, False, False, True]})


def test_offsets_of_frozen_stages_are_frozen() -> None:
    body = build_model(case("modulated").replace({"MODEL.BACKBONE.FREEZE_AT": 3})).backbone.bottom_up
    offsets = {n: p.requires_grad for n, p in body.named_parameters() if "conv2_offset" in n}
    assert len(offsets) == 2 * 13
    assert all(trained != name.startswith("res3.") for name, trained in offsets.items())


def test_weights_without_offsets_begin_with_them_at_zero(tmp_path: Path) -> None:
    """A classifier has none, and is no other network for that; an evaluation needs them all."""
    cfg = case("R-50").replace({"MODEL.RESNETS.NORM": "GN", "MODEL.GN.NUM_GROUPS": 4})
    plain = build_model(cfg.replace({DEFORM: [False] * 4}))
    save_weights(tmp_path / "plain.pth", plain.state_dict())
    model = build_model(cfg)
    report = load_weights(model, tmp_path / "plain.pth", for_training=True)
    assert len(report.missing) == 2 * 13
    images = cascade_case.images()
    for one, other in zip(model.eval().detect(images), plain.eval().detect(images), strict=True):
        torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=1e-3)
    with refusal("other-network", "conv2_offset"):
        load_weights(model, tmp_path / "plain.pth")


@pytest.mark.slow
def test_conversion_and_calibration_to_group_norm() -> None:
    """The norms of deformable convolutions are converted, and all weights are calibrated."""
    torch.manual_seed(0)
    original = make(case("R-50")).eval()
    converted, report = convert_norm(original, num_groups=4, min_channels_per_group=1)
    name = "backbone.bottom_up.res4.2.conv2.norm"
    assert name in {layer.name for layer in report.layers}
    assert isinstance(converted.get_submodule(name), GroupNorm)
    before = copy.deepcopy(converted.state_dict())
    batches = [[image] for image in cascade_case.images()] * 2
    calibrate(original, converted, batches, 3, outputs=paired_outputs, report=report, progress=False)
    after = converted.state_dict()
    for changed in (f"{name}.weight", name.replace("norm", "weight"), name.replace(".norm", "_offset.bias")):
        assert not torch.equal(before[changed], after[changed]), changed


@pytest.mark.slow
def test_a_compiled_backbone_has_one_graph_and_the_same_gradients() -> None:
    model = make(case("modulated"))
    x = model.preprocess(cascade_case.images())

    def run(backbone: Callable[..., dict[str, Tensor]]) -> list[Tensor]:
        features = backbone(x)
        total = torch.stack([value.square().mean() for value in features.values()]).sum()
        trained = [p for p in model.backbone.parameters() if p.requires_grad]
        return [*features.values(), *torch.autograd.grad(total, trained)]

    expected = run(model.backbone)
    found = run(torch.compile(model.backbone, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".pt2", "R-50"), pytest.param(".onnx", "modulated", marks=pytest.mark.exhaustive)],
)
def test_an_exported_detector_finds_the_same(suffix: str, name: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    weights = tmp_path / "model.pth"
    cfg = case(name).replace({"MODEL.WEIGHTS": str(weights)})
    save_weights(weights, make(cfg).state_dict())
    predictor = Predictor(cfg)
    export_detector(predictor, tmp_path / f"model{suffix}")
    exported = ExportedPredictor(tmp_path / f"model{suffix}", trust=True)
    for image in cascade_case.images():
        pixels = image.permute(1, 2, 0).numpy()
        expected, found = predictor(pixels), exported(pixels)
        assert len(expected) == len(found) > 50
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0.05)
