"""Weights of torchvision's and timm's classifiers in a detector: loading, conversion, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import gn_detect
from gn_detect import convert_checkpoint
from gn_detect.cli import main
from gn_detect.config import Config, load_config
from gn_detect.engine import Predictor
from gn_detect.engine.starting_weights import read_starting_weights
from gn_detect.modeling import MaskRCNN, build_model
from gn_detect.weights import implied_keys, load_weights, read_checkpoint, save_weights
from tests.refusal import refusal

timm = pytest.importorskip("timm", reason="needs the extra 'timm'")

MOBILENET = "mobilenet_v2_imagenet/mobilenet_v2_features_torchvision_keys.pth"
EFFICIENTNET = "efficientnet_lite0_imagenet/efficientnet-lite0-57934424.pth"
TINY = "timm/test_efficientnet"


def keys_of(name: str, weights: Path | str = "", norm: str = "GN", **others: Any) -> dict[str, Any]:
    library, _, model = name.partition("/")
    keys = {"NAME": f"build_{library}_fpn_backbone", "MODEL": model, "NORM": norm, "FREEZE_AT": 0}
    groups = {"MODEL.GN.NUM_GROUPS": 32, "MODEL.GN.MIN_CHANNELS_PER_GROUP": 16}
    backbone = {f"MODEL.BACKBONE.{key}": value for key, value in keys.items()}
    return backbone | groups | {"MODEL.WEIGHTS": str(weights), "MODEL.DEVICE": "cpu"} | others


def started(name: str, weights: Path, norm: str) -> tuple[MaskRCNN, Any]:
    """A detector as a training starts it, in evaluation mode, and the report of its weights."""
    cfg = load_config("Base-RCNN-FPN.yaml").replace(keys_of(name, weights, norm))
    cfg = cfg.replace(implied_keys(cfg, weights))
    model = build_model(cfg)
    checkpoint, _ = read_starting_weights(cfg)
    report = load_weights(model, checkpoint, for_training=True, config=cfg)
    return model.eval(), report


def features(model: MaskRCNN, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        found: dict[str, Tensor] = model.backbone.bottom_up(images)  # type: ignore[union-attr,operator]
    return found


def smooth_images(seed: int = 0) -> Tensor:
    """(2, 3, 128, 160): noise of several scales, about as large as normalised photos."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, 3, 128 // s, 160 // s, generator=generator) for s in (1, 4, 16)]
    return sum(F.interpolate(part, (128, 160), mode="bilinear") for part in parts) / 2


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of timm's smallest EfficientNet with statistics of BatchNorm, as timm stores it."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", pretrained=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("classifier") / "model.safetensors"
    save_weights(path, model.state_dict())
    return path


def test_weights_of_torchvision_give_its_features_and_are_converted_while_loading(shared_dir: Path) -> None:
    weights = shared_dir / "weights" / MOBILENET
    original, report = started("torchvision/mobilenet_v2", weights, "keep")
    assert all(".fpn_" in n or not n.startswith("backbone.") for n in report.missing)
    network = torchvision.models.mobilenet_v2(weights=None)
    network.load_state_dict(read_checkpoint(weights).tensors, strict=False)
    images = smooth_images()
    before = features(original, images)
    with torch.no_grad():
        assert torch.equal(network.eval().features(images), before["res5"])
    converted, _ = started("torchvision/mobilenet_v2", weights, "GN")
    after = features(converted, images)
    # The first stages are near; the error grows with depth, and gn-detect convert --images reduces it. With
    # BatchNorm's weights in place of the matched ones the correlation at stride 4 is below 0.6.
    assert correlation(before["res2"], after["res2"]) > 0.8
    with refusal("other-input", "MODEL.PIXEL_MEAN", "INPUT.FORMAT"):
        cfg = load_config("Base-RCNN-FPN.yaml").replace(keys_of("torchvision/mobilenet_v2", weights))
        load_weights(converted, read_starting_weights(cfg)[0], for_training=True, config=cfg)
    with refusal("other-network", "backbone"):  # timm's has other names
        started("timm/mobilenetv2_100", weights, "keep")


def efficientnet_lite(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """EfficientNet-Lite0 from efficientnet_lite_pytorch's tensors, up to the last block.

    Each convolution pads as TensorFlow's "same", each norm has an eps of 1e-3, and ReLU6 follows all but the
    last of a block.
    """

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = tensors[f"{name}.weight"]
        size = weight.shape[-1]
        padding = [max((-(-side // stride) - 1) * stride + size - side, 0) for side in x.shape[:1:-1]]
        x = F.pad(x, [value for p in padding for value in (p // 2, p - p // 2)])
        return F.conv2d(x, weight, None, stride, groups=x.shape[1] // weight.shape[1])

    def norm(name: str, x: Tensor) -> Tensor:
        values = (tensors[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values, eps=1e-3)

    x = F.relu6(norm("_bn0", conv("_conv_stem", x, 2)))
    for index in range(sum(1 for name in tensors if name.endswith("._project_conv.weight"))):
        block, y = f"_blocks.{index}", x
        if f"{block}._expand_conv.weight" in tensors:
            y = F.relu6(norm(f"{block}._bn0", conv(f"{block}._expand_conv", y)))
        stride = 2 if index in (1, 3, 5, 11) else 1
        y = F.relu6(norm(f"{block}._bn1", conv(f"{block}._depthwise_conv", y, stride)))
        y = norm(f"{block}._bn2", conv(f"{block}._project_conv", y))
        x = x + y if stride == 1 and x.shape[1] == y.shape[1] else y
    return x


def test_names_of_efficientnet_lite_pytorch_fit_timms_tf_network(shared_dir: Path) -> None:
    weights = shared_dir / "weights" / EFFICIENTNET
    model, report = started("timm/tf_efficientnet_lite0", weights, "FrozenBN")
    assert {name.split(".")[0] for name in report.left_out} == {"_conv_head", "_bn1", "_fc"}
    images = smooth_images()
    with torch.no_grad():
        wanted = efficientnet_lite(read_checkpoint(weights).tensors, images)
    torch.testing.assert_close(features(model, images)["res5"], wanted, rtol=1e-4, atol=1e-4)
    with refusal("other-network", "tf_efficientnet_lite0"):  # other padding and eps
        started("timm/efficientnet_lite0", weights, "FrozenBN")


def test_a_converted_classifier_loads_as_it_is(classifier: Path, tmp_path: Path) -> None:
    """The file of ``gn-detect convert``, with the eps and the groups of its norms."""
    target = tmp_path / "gn.pth"
    report = convert_checkpoint(TINY, target, weights=classifier)
    assert f"--backbone {TINY} --weights {target}" in str(report)
    loaded, _ = started(TINY, target, "GN")
    at_once, _ = started(TINY, classifier, "GN")
    images = smooth_images()
    first, second = features(loaded, images), features(at_once, images)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with refusal("other-norm", "MODEL.BACKBONE.NORM"):
        started(TINY, target, "keep")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: tuple[Path, Path], classifier: Path) -> Path:
    """The folder of a run without a config, from a classifier's weights, stopped and resumed."""
    folder = tmp_path_factory.mktemp("run")
    words = ["train"]
    for part, file in zip(("train", "val"), tiny_data, strict=True):
        words += [f"--{part}-json", str(file), f"--{part}-images", str(file.parent / "images")]
    words += ["--backbone", TINY, "--weights", str(classifier)]
    keys = {
        "SOLVER.MAX_ITER": 4,
        "SOLVER.LOG_PERIOD": 1,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SOLVER.WARMUP_ITERS": 1,
        "SOLVER.EMA.ENABLED": True,
        "TEST.EVAL_PERIOD": 0,
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
        "MODEL.DEVICE": "cpu",
        "VIS.NUM_IMAGES": 0,
        "SEED": 1,
    }
    whole = [*words, *(str(word) for pair in keys.items() for word in pair)]
    assert main([*whole, "OUTPUT_DIR", str(folder / "whole")]) == 0
    assert main([*whole, "OUTPUT_DIR", str(folder / "parts"), "SOLVER.MAX_ITER", "2"]) == 0
    again = ["train", "--config-file", str(folder / "parts" / "config.yaml"), "--resume"]
    assert main([*again, "SOLVER.MAX_ITER", "4"]) == 0
    return folder


def test_a_run_is_configured_trained_and_resumed(run: Path) -> None:
    cfg = load_config(run / "whole" / "config.yaml")
    assert (cfg.model.backbone.name, cfg.model.backbone.model) == (
        "build_timm_fpn_backbone",
        "test_efficientnet",
    )
    assert (cfg.model.backbone.norm, cfg.model.fpn.norm, cfg.model.roi_box_head.norm) == ("GN", "GN", "GN")
    assert cfg.input.format == "RGB"
    weights = read_checkpoint(run / "whole" / "model_final.pth").tensors
    parts = read_checkpoint(run / "parts" / "model_final.pth").tensors
    assert not any(name.endswith("running_var") for name in weights)
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert weights.keys() == parts.keys()
    rows = [json.loads(line) for line in (run / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "total_loss" in row]) == 4


def test_a_checkpoint_is_used_without_its_config(
    run: Path, tiny_data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = tmp_path / "alone.pth"
    best.write_bytes((run / "whole" / "model_final.pth").read_bytes())
    predictor = Predictor.from_pretrained(best)
    assert predictor(torch.zeros(3, 64, 80, dtype=torch.uint8)) is not None
    val = ["--val-json", str(tiny_data[1]), "--val-images", str(tiny_data[1].parent / "images")]
    assert main(["eval", str(best), *val, "--json", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["results"]["bbox"]["AP"]
    (results,) = (run / "whole").glob("results.json")
    assert found == json.loads(results.read_text())["bbox"]["AP"]
    # As a starting point for other training, its network is known, too.
    _, recipe = gn_detect.engine.autoconfig.choose_config(
        tiny_data[0], tiny_data[0].parent / "images", ["MODEL.WEIGHTS", str(best)]
    )
    assert recipe.keys["MODEL.BACKBONE.MODEL"] == "test_efficientnet"
    assert "Mask R-CNN test_efficientnet-FPN with GN" in recipe.reasons["model"]


def test_a_detector_of_batch_norms_is_converted_by_its_own_config(
    tiny_config: Config, classifier: Path, tmp_path: Path
) -> None:
    from gn_detect import train

    keys = keys_of(TINY, classifier, "FrozenBN", **{"SOLVER.MAX_ITER": 1, "DATASETS.TEST": []})
    cfg = tiny_config.replace(keys)
    train(cfg.replace(implied_keys(cfg, classifier)))
    original = Path(cfg.output_dir) / "model_final.pth"
    report = convert_checkpoint(original, tmp_path / "gn.pth")
    assert any("trunk." in layer.name for layer in report.layers)
    converted = Predictor.from_pretrained(tmp_path / "gn.pth")  # by the config that it holds
    assert converted.cfg.model.backbone.norm == "GN"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_export_finds_what_the_model_finds(run: Path, tiny_data: tuple[Path, Path], suffix: str) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    target = run / f"model.{suffix}"
    images = str(tiny_data[1].parent / "images")
    weights = str(run / "whole" / "model_final.pth")
    assert main(["export", weights, "--output", str(target), "--check", images]) == 0
    assert target.is_file()
