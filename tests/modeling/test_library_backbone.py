"""Networks of torchvision and timm as backbones: features, norms, freezing, refusals."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gn_detect.config import Config, load_config
from gn_detect.layers import FrozenBatchNorm2d, GroupNorm, make_norm
from gn_detect.modeling import build_model, find_library
from gn_detect.modeling.library_backbone import LibraryBackbone, build_library_backbone
from tests.refusal import refusal

pytest.importorskip("timm", reason="needs the extra 'timm'")

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def config(name: str, changes: dict[str, Any] | None = None) -> Config:
    """``torchvision/NAME`` or ``timm/NAME`` with an FPN, and groups of 8 channels or more."""
    library, _, model = name.partition("/")
    keys = {"MODEL.BACKBONE.NAME": f"build_{library}_fpn_backbone", "MODEL.BACKBONE.MODEL": model}
    keys |= {"MODEL.BACKBONE.FREEZE_AT": 0, "MODEL.GN.MIN_CHANNELS_PER_GROUP": 8, "MODEL.DEVICE": "cpu"}
    return load_config("Base-RCNN-FPN.yaml").replace(keys | (changes or {}))


def backbone(name: str, changes: dict[str, Any] | None = None) -> tuple[LibraryBackbone, dict[str, Any]]:
    torch.manual_seed(0)
    cfg = config(name, changes)
    gn = cfg.model.gn

    def norm(channels: int) -> nn.Module | None:
        return make_norm("GN", channels, gn.num_groups, gn.eps, gn.min_channels_per_group)

    return build_library_backbone(cfg, norm)


NETWORKS = {  # channels by the library's own documentation
    "torchvision/mobilenet_v3_small": (16, 24, 48, 576),
    "timm/resnet18d": (64, 128, 256, 512),
    "timm/regnetx_002": (24, 56, 152, 368),
    "timm/efficientnet_lite0": (24, 40, 112, 320),
    "timm/mobilenetv3_small_050": (8, 16, 24, 288),
    "timm/convnext_atto": (40, 80, 160, 320),
    "timm/ghostnet_050": (12, 20, 40, 80),
}


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/mobilenet_v3_small",
        "timm/mobilenetv3_small_050",
        "timm/convnext_atto",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("timm/resnet18d", "timm/regnetx_002", "timm/efficientnet_lite0", "timm/ghostnet_050")
        ),
    ],
)
def test_features_have_the_strides_and_all_parameters_are_trained(name: str) -> None:
    norm = "keep" if "convnext" in name else "GN"
    network, features = backbone(name, {"MODEL.BACKBONE.NORM": norm})
    assert features == dict(zip(STRIDES, zip(NETWORKS[name], STRIDES.values(), strict=True), strict=True))
    found = network(torch.randn(2, 3, 64, 160))
    shapes = {key: tuple(value.shape) for key, value in found.items()}
    wanted = {key: (2, channels, 64 // s, 160 // s) for key, (channels, s) in features.items()}
    assert shapes == wanted
    sum(value.square().mean() for value in found.values()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())  # DDP waits for each
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/resnest14d", "timm/resnet26d", "torchvision/regnet_y_400mf"])
def test_larger_networks_train_and_can_be_copied(name: str) -> None:
    network, features = backbone(name, {"MODEL.BACKBONE.NORM": "GN"})
    images = torch.randn(2, 3, 64, 96)
    found, again = network(images), copy.deepcopy(network)(images)
    assert [value.shape[1] for value in found.values()] == [channels for channels, _ in features.values()]
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_a_detector_trains_and_the_copy_of_an_average_computes_the_same() -> None:
    torch.manual_seed(0)
    keys = {"MODEL.BACKBONE.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": 32, "MODEL.ROI_BOX_HEAD.FC_DIM": 32}
    model = build_model(config("torchvision/mobilenet_v3_small", keys)).eval()
    assert model.size_divisibility == 32
    names = [name for name in model.state_dict() if name.startswith("backbone.bottom_up.")]
    assert "backbone.bottom_up.trunk.features.0.0.weight" in names
    assert not any("classifier" in name for name in names)
    copied = copy.deepcopy(model)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        first, second = model.backbone(images), copied.backbone(images)
    assert list(first) == ["p2", "p3", "p4", "p5", "p6"]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_plain_backbone_feeds_one_feature() -> None:
    keys = {
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res4"],
        "MODEL.RPN.IN_FEATURES": ["res4"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64, 128]],
    }
    model = build_model(config("timm/test_efficientnet", keys))
    assert any(name.startswith("backbone.trunk.blocks.") for name in model.state_dict())
    found = model.backbone(torch.randn(1, 3, 64, 96))
    assert {name: tuple(value.shape[-2:]) for name, value in found.items()} == {"res4": (4, 6)}
    with refusal("conflicting-keys", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"):
        config("timm/test_efficientnet", keys | {"MODEL.ROI_HEADS.NAME": "Res5ROIHeads"})


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/test_efficientnet"])
@pytest.mark.parametrize("norm", ["keep", "FrozenBN", "SyncBN", "GN"])
def test_each_norm_takes_the_places_and_names_of_the_batch_norms(name: str, norm: str) -> None:
    keys = {"MODEL.BACKBONE.FREEZE_AT": 2, "MODEL.BACKBONE.NORM": norm}
    kept, (network, _) = backbone(name)[0], backbone(name, keys)
    places = [key for key, module in kept.named_modules() if isinstance(module, nn.BatchNorm2d)]
    kinds = {
        "keep": nn.BatchNorm2d,
        "FrozenBN": FrozenBatchNorm2d,
        "SyncBN": nn.SyncBatchNorm,
        "GN": GroupNorm,
    }
    frozen_kind = GroupNorm if norm == "GN" else FrozenBatchNorm2d
    modules = dict(network.named_modules())
    found = {type_of(modules[place], (frozen_kind, kinds[norm])) for place in places}
    assert found == {frozen_kind, kinds[norm]}
    if norm != "GN":  # the same function, frozen or not
        network.load_state_dict(kept.state_dict(), strict=False)
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            first, second = kept.eval()(images), network.eval()(images)
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=1e-5, atol=1e-6)  # other order of sums


def type_of(module: nn.Module, kinds: tuple[type, ...]) -> type | None:
    return next((kind for kind in kinds if isinstance(module, kind)), None)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet18d"])
def test_freezing_follows_the_stages(name: str) -> None:
    """In ResNets, stage by stage, what our own backbone freezes."""
    frozen = {}
    for stage in (0, 1, 2, 5):
        with torch.device("meta"):
            network, _ = backbone(name, {"MODEL.BACKBONE.FREEZE_AT": stage})
        frozen[stage] = {key for key, p in network.named_parameters() if not p.requires_grad}
    assert not frozen[0]
    assert {key.split(".")[1] for key in frozen[1]} == {"conv1"}
    assert {key.split(".")[1] for key in frozen[2]} == {"conv1", "layer1"}
    assert {key.split(".")[1] for key in frozen[5]} == {"conv1", "layer1", "layer2", "layer3", "layer4"}


def test_drop_path_rate_reaches_the_network() -> None:
    keys = {"MODEL.BACKBONE.DROP_PATH_RATE": 0.5}
    with torch.device("meta"):
        timm, _ = backbone("timm/convnext_atto", keys)
        torchvision, _ = backbone("torchvision/efficientnet_b0", keys)
        plain, _ = backbone("torchvision/efficientnet_b0")
    assert max(module.drop_prob for module in timm.modules() if type(module).__name__ == "DropPath") == 0.5

    def rates(network: nn.Module) -> list[float]:
        return [float(m.p) for m in network.modules() if type(m).__name__ == "StochasticDepth"]

    assert 0.4 < max(rates(torchvision)) <= 0.5
    assert set(rates(plain)) == {0.0}  # and not torchvision's own 0.2
    with refusal("unfit-backbone", "vgg11", "MODEL.BACKBONE.DROP_PATH_RATE"), torch.device("meta"):
        backbone("torchvision/vgg11", keys)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    keys = {"MODEL.BACKBONE.NORM": "GN", "MODEL.BACKBONE.FREEZE_AT": 2}
    gradients = []
    for checkpointing in (False, True):
        network, _ = backbone(
            "timm/test_efficientnet", keys | {"MODEL.BACKBONE.ACTIVATION_CHECKPOINTING": checkpointing}
        )
        torch.manual_seed(1)
        sum(value.square().mean() for value in network(torch.randn(1, 3, 64, 96)).values()).backward()
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.requires_grad})
    assert gradients[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    key = "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING"
    with refusal("conflicting-keys", key, "torchvision"):
        config("torchvision/resnet18", {key: True})
    with refusal("conflicting-keys", key, "MODEL.BACKBONE.NORM"):
        backbone("timm/test_efficientnet", {key: True})


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("torchvision/vit_b_16", {}, ("vit_b_16", "cannot be a backbone")),  # one size of images
        ("torchvision/swin_t", {}, ("swin_t", "stride 4")),  # features (N, H, W, C)
        ("timm/test_vit", {}, ("test_vit",)),
        ("timm/convnext_atto", {"MODEL.BACKBONE.NORM": "GN"}, ("convnext_atto", "no BatchNorm", "keep")),
        ("timm/convnext_atto", {"MODEL.BACKBONE.FREEZE_AT": 1}, ("stride 2", "MODEL.BACKBONE.FREEZE_AT")),
    ],
)
def test_networks_that_do_not_fit_are_refused(
    name: str, keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refusal("unfit-backbone", *words), torch.device("meta"):
        backbone(name, keys)


def test_names_are_found_in_both_libraries_or_refused_with_near_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_library("mobilenet_v2") == ("torchvision", "mobilenet_v2")
    assert find_library("timm/resnet18") == ("timm", "resnet18")
    assert find_library("mobilenetv2_100.ra_in1k") == ("timm", "mobilenetv2_100.ra_in1k")
    with refusal("unknown-backbone", "mobilenet_v2"):
        find_library("mobilnet_v2")
    for name in ("torchvision/maskrcnn_resnet50_fpn", "timm/hf-hub:timm/resnet18", "keras/resnet18"):
        with refusal("unknown-backbone"):
            find_library(name)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    with refusal("missing-package", "gn-detect[timm]"):
        find_library("timm/resnet18")
    with refusal("unknown-backbone", "gn-detect[timm]"):
        find_library("mobilenetv2_100")
    with refusal("missing-package", "gn-detect[timm]"):
        build_model(config("timm/resnet18"))


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone"}, "MODEL.BACKBONE.MODEL"),
        ({"MODEL.BACKBONE.MODEL": "resnet18"}, "MODEL.BACKBONE.MODEL"),
        ({"MODEL.BACKBONE.NORM": "GN"}, "MODEL.BACKBONE.NORM"),
        ({"MODEL.BACKBONE.DROP_PATH_RATE": 0.1}, "MODEL.BACKBONE.DROP_PATH_RATE"),
    ],
)
def test_keys_without_their_network_are_refused(
    small_config: Callable[..., Config], keys: dict[str, Any], name: str
) -> None:
    with refusal("conflicting-keys", name):
        small_config(keys)
