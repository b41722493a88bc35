"""BatchNorm's eps from the names of a state dict: that of the library's own code, or a warning."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from gn_detect.convert import convert_norm, convert_state_dict
from gn_detect.convert.library_eps import library_eps


def norms_of(model: nn.Module) -> dict[str, float]:
    """Return the eps by name."""
    kinds = (nn.modules.batchnorm._BatchNorm, torchvision.ops.FrozenBatchNorm2d)
    return {name: m.eps for name, m in model.named_modules() if isinstance(m, kinds)}


def built(name: str) -> nn.Module:
    module = torchvision.models.get_model_builder(name).__module__
    headed = any(part in module for part in ("detection", "segmentation"))
    options = {"weights_backbone": None} if headed else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNets compute with tensors
        return torchvision.models.get_model(name, weights=None, **options)


TORCHVISION = [
    "resnet18", "resnext50_32x4d", "wide_resnet50_2", "vgg11_bn", "densenet121", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_b4", "efficientnet_b5",
    "efficientnet_b7", "efficientnet_v2_s", "efficientnet_v2_m", "googlenet", "inception_v3",
    "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_x_400mf", "regnet_y_400mf", "maxvit_t", "s3d", "r3d_18",
    "mc3_18", "r2plus1d_18", "fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn", "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large",
]  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_models_have_the_eps_of_its_code(name: str) -> None:
    model = built(name)
    for prefix in ("", "module._orig_mod."):
        expected = {prefix + norm: eps for norm, eps in norms_of(model).items()}
        assert library_eps([prefix + key for key in model.state_dict()], expected) == expected


TIMM = [
    "resnet18",
    "resnet50d",
    "seresnet50",
    "res2net50_26w_4s",
    "regnetx_002",
    "inception_v3",
    "densenet121",
]


@pytest.mark.parametrize("name", TIMM)
def test_timms_models_have_the_eps_of_its_code(name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    with torch.device("meta"):
        model = timm.create_model(name)
    expected = norms_of(model)
    assert library_eps(list(model.state_dict()), expected) == expected


def test_names_of_two_eps_give_a_warning() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    tensors = timm.create_model("efficientnet_b0").state_dict()
    assert tensors.keys() == timm.create_model("tf_efficientnet_b0").state_dict().keys()
    report = convert_state_dict(tensors)[1]
    (warning,) = [text for text in report.warnings if "eps" in text and "49 BatchNorms" in text]
    assert "1e-05" in warning
    assert "0.001" in warning
    assert "--eps 0.001" in warning
    assert "'bn1'" in warning
    assert {layer.eps for layer in report.layers} == {1e-5}
    for eps in (1e-5, 1e-3):
        report = convert_state_dict(tensors, eps=eps)[1]
        assert {layer.eps for layer in report.layers} == {eps}
        assert not any("--eps" in text for text in report.warnings)


def norm(name: str) -> list[str]:
    return [f"{name}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]


OTHERS = {
    "Ultralytics": (["model.0.conv.weight"], ["model.0.bn", "model.2.cv1.bn", "model.22.cv2.0.0.bn"], 1e-3),
    "Ultralytics, unwrapped": ([], ["0.bn", "2.m.0.cv1.bn", "2.cv1.bn", "10.m.0.attn.qkv.bn"], 1e-3),
    "YOLOX": (
        ["backbone.backbone.stem.conv.conv.weight"],
        ["backbone.backbone.stem.conv.bn", "backbone.lateral_conv0.bn", "head.stems.0.bn"],
        1e-3,
    ),
    "efficientnet_pytorch": (
        ["_conv_stem.weight", "_blocks.0._depthwise_conv.weight"],
        ["_bn0", "_blocks.0._bn1", "_blocks.15._bn2", "_bn1"],
        1e-3,
    ),
    "detectron2": (
        ["backbone.bottom_up.stem.conv1.weight"],
        ["backbone.bottom_up.stem.conv1.norm", "backbone.fpn_lateral2.norm", "roi_heads.box_head.conv1.norm"],
        1e-5,
    ),
    "detectron2's backbone": (["res2.0.conv1.weight"], ["stem.conv1.norm", "res2.0.conv1.norm"], 1e-5),
    "mmdetection": (
        ["backbone.layer1.0.conv1.weight"],
        ["backbone.bn1", "backbone.layer1.0.bn1", "neck.lateral_convs.0.bn", "roi_head.mask_head.convs.0.bn"],
        1e-5,
    ),
    "CIFAR's ResNets": (["layer1.0.conv1.weight"], ["bn1", "layer1.0.bn1", "layer3.2.bn2"], 1e-5),
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", OTHERS)
def test_other_libraries_have_the_eps_of_their_code(name: str, prefix: str) -> None:
    convs, norms, eps = OTHERS[name]
    norms = [prefix + owner for owner in norms]
    names = [prefix + conv for conv in convs] + [tensor for owner in norms for tensor in norm(owner)]
    assert library_eps(names, norms) == dict.fromkeys(norms, eps)


@pytest.mark.parametrize(
    "names",
    [
        ["conv1.weight", *norm("bn1")],
        ["features.0.weight", *norm("features.1")],
        ["conv_stem.weight", *norm("bn1"), *norm("blocks.0.0.bn1")],
        ["layer1.0.conv1.weight", *norm("layer1.0.norm1")],
        ["model.0.conv.weight", *norm("model.0.bn")],
        [*norm("backbone.stem.conv.bn")],
    ],
)
def test_common_names_identify_no_library(names: list[str]) -> None:
    owners = [name.removesuffix(".running_var") for name in names if name.endswith(".running_var")]
    assert library_eps(names, owners) == {}


def test_a_library_inside_a_model_of_ones_own() -> None:
    """The backbone is known, and the other norms are not."""
    model = nn.Module()
    model.encoder, model.decoder = torchvision.models.mobilenet_v3_small(), nn.BatchNorm2d(16)
    report = convert_state_dict(model.state_dict())[1]
    eps = {layer.name: layer.eps for layer in report.layers}
    assert eps.pop("decoder") == 1e-5
    assert set(eps.values()) == {1e-3}
    assert any("eps of 1 BatchNorms, such as 'decoder'" in text for text in report.warnings)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "googlenet"])
def test_the_weights_are_those_of_the_model(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(1e-4, 1e-2)
            module.running_mean.normal_(std=0.1)
    expected, _ = convert_norm(model)
    tensors, report = convert_state_dict(model.state_dict())
    assert all(torch.equal(tensors[key], value) for key, value in expected.state_dict().items())
    assert not any("eps of" in text for text in report.warnings)
