"""A detector with Weight Standardization: which convolutions have it, training, precision, export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gn_detect.config import Config
from gn_detect.engine import Predictor
from gn_detect.export.run import ExportedPredictor
from gn_detect.export.write import ExportableDetector, export_detector
from gn_detect.layers import WSConv2d
from gn_detect.modeling import MaskRCNN
from gn_detect.structures import Target
from gn_detect.weights import norm_settings, save_weights
from tests.refusal import refusal

SECTIONS = {
    "RESNETS": ("backbone.bottom_up.",),
    "FPN": ("backbone.fpn_",),
    "ROI_BOX_HEAD": ("roi_heads.box_head.",),
    "ROI_MASK_HEAD": ("roi_heads.mask_head.mask_fcn",),
}
ALL = {f"MODEL.{section}.CONV": "WS" for section in SECTIONS}
CONVS = {"MODEL.ROI_BOX_HEAD.NUM_CONV": 1, "MODEL.ROI_BOX_HEAD.NORM": "GN"}


def standardised(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, WSConv2d)]


@pytest.mark.parametrize("section", SECTIONS)
def test_each_key_is_about_its_part(section: str, small_model: Callable[..., MaskRCNN]) -> None:
    """mmdetection's conv_cfg: the stem as well, but not the RPN, the upsampling and the predictors."""
    model = small_model(CONVS | {f"MODEL.{section}.CONV": "StdConv"})
    plain = small_model(CONVS)
    inside = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Conv2d) and name.startswith(SECTIONS[section])
    ]
    assert standardised(model) == inside
    assert inside
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_the_res5_of_c4_has_it(small_model: Callable[..., MaskRCNN]) -> None:
    from gn_detect.config import load_config
    from gn_detect.modeling import build_model

    small = {
        "MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.CONV": "WS", "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8, "MODEL.RESNETS.STEM_OUT_CHANNELS": 8, "MODEL.GN.NUM_GROUPS": 4,
    }  # fmt: skip
    model = build_model(load_config("Base-RCNN-C4.yaml").replace(small))
    assert len(standardised(model)) == 53
    assert "roi_heads.res5.0.shortcut" in standardised(model)


def test_cascades_have_it_in_each_stage(small_model: Callable[..., MaskRCNN]) -> None:
    keys = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
    names = standardised(small_model(CONVS | keys | {"MODEL.ROI_BOX_HEAD.CONV": "WS"}))
    assert names == [f"roi_heads.box_head.{stage}.conv1" for stage in range(3)]


def test_an_unknown_kind_is_refused(small_config: Callable[..., Config]) -> None:
    with refusal("unsupported-value", "MODEL.RESNETS.CONV", "WS"):
        small_config({"MODEL.RESNETS.CONV": "Deform"})


def losses_and_gradients(model: MaskRCNN, target: Target, images: list[Tensor]) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    losses = model.train().losses(images, [target])
    torch.stack(list(losses.values())).sum().backward()
    return [losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}]


def test_all_weights_learn_and_checkpointing_changes_nothing(
    small_model: Callable[..., MaskRCNN], make_images: Callable[..., list[Tensor]], target: Target
) -> None:
    images = make_images((96, 128))
    plain = losses_and_gradients(small_model(CONVS | ALL), target, images)
    key = {"MODEL.BACKBONE.ACTIVATION_CHECKPOINTING": True}
    again = losses_and_gradients(small_model(CONVS | ALL | key), target, images)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    model = small_model(CONVS | ALL)
    assert plain[1].keys() == dict(model.named_parameters()).keys()
    for name in standardised(model):
        gradient, weight = plain[1][f"{name}.weight"].flatten(1), model.get_submodule(name).weight.flatten(1)
        assert gradient.abs().max() > 0
        # The result depends neither on a filter's mean nor, but for eps, on its length.
        assert gradient.mean(1).abs().max() < 1e-4 * gradient.abs().max()
        along = (gradient * weight).sum(1).abs()
        assert bool((along < 0.05 * gradient.norm(dim=1) * weight.norm(dim=1) + 1e-8).all()), name


def test_evaluation_sees_each_step(
    small_model: Callable[..., MaskRCNN], make_images: Callable[..., list[Tensor]], target: Target
) -> None:
    images, model = make_images((96, 128)), small_model(CONVS | ALL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        x = model.preprocess(images)
        with torch.no_grad():
            training = model.train().backbone(x)["p3"]
            kept = [model.eval().backbone(x)["p3"] for _ in range(2)]
        torch.testing.assert_close(kept[0], training, rtol=1e-5, atol=1e-5)
        assert torch.equal(kept[0], kept[1])
        losses_and_gradients(model, target, images)
        optimizer.step()


def test_folded_convolutions_compute_the_same(
    small_model: Callable[..., MaskRCNN], make_images: Callable[..., list[Tensor]]
) -> None:
    model = small_model(CONVS | ALL).eval()
    exported = ExportableDetector(model).eval()
    assert standardised(exported) == []
    assert standardised(model) != []
    image = make_images((96, 128))[0]
    with torch.no_grad():
        found = exported(image[None], torch.tensor([96, 128]))
        expected = model.detect([image], paste=False)[0]
    torch.testing.assert_close(found[1], expected.scores)


@pytest.mark.slow
def test_a_compiled_backbone_has_the_same_gradients(small_model: Callable[..., MaskRCNN]) -> None:
    model, x = small_model(CONVS | ALL).train(), torch.randn(1, 3, 64, 96)
    found = []
    for compiled in (False, True):
        model.zero_grad()
        if compiled:
            model.backbone.compile(backend="aot_eager", fullgraph=True)
        sum(feature[..., ::2].tanh().sum() for feature in model.backbone(x).values()).backward()
        found.append({n: p.grad for n, p in model.backbone.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.exhaustive)])
def test_an_exported_detector_finds_the_same(
    suffix: str,
    small_config: Callable[..., Config],
    small_model: Callable[..., MaskRCNN],
    make_images: Callable[..., list[Tensor]],
    tmp_path: Path,
) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model = small_model(CONVS | ALL)
    save_weights(tmp_path / "model.pth", model.state_dict(), norm_settings(model))
    keys = {"MODEL.WEIGHTS": str(tmp_path / "model.pth"), "INPUT.MIN_SIZE_TEST": 96}
    predictor = Predictor(small_config(CONVS | ALL | keys))
    export_detector(predictor, tmp_path / f"model{suffix}")
    exported = ExportedPredictor(tmp_path / f"model{suffix}", trust=True)
    pixels = make_images((96, 128))[0].permute(1, 2, 0).numpy()
    expected, found = predictor(pixels), exported(pixels)
    assert len(expected) == len(found) > 20
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0.05)
