"""Loading checkpoints into models: what fits, what is refused, what fine-tuning may skip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gn_detect.errors import Code
from gn_detect.weights import load_weights, read_checkpoint, save_weights
from tests.refusal import refusal


class Predictor(nn.Module):
    """The names of a detector's predictor layers, without the detector."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.bbox_pred = nn.Linear(width, 4 * num_classes)


class Heads(nn.Module):
    """``roi_heads`` with or without a mask head."""

    def __init__(self, num_classes: int, width: int, mask: bool) -> None:
        super().__init__()
        self.box_predictor = Predictor(num_classes, width)
        if mask:
            self.mask_head = nn.ModuleDict({"predictor": nn.Conv2d(width, num_classes, 1)})


class Detector(nn.Module):
    """A handful of layers with detectron2's names."""

    def __init__(self, num_classes: int = 3, width: int = 8, norm: str = "GN", mask: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.ModuleDict(
            {
                "conv": nn.Conv2d(3, width, 3, bias=False),
                "norm": nn.GroupNorm(4, width) if norm == "GN" else nn.BatchNorm2d(width),
                "conv2": nn.Conv2d(width, width, 1),
            }
        )
        self.roi_heads = Heads(num_classes, width, mask)


def randomised(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_weights(path, tensors)
    return path


@pytest.mark.parametrize("for_training", [True, False])
def test_a_checkpoint_of_the_same_model_loads_whole(tmp_path: Path, for_training: bool) -> None:
    model, state = Detector(), randomised(Detector())
    report = load_weights(model, write(tmp_path / "m.pth", state), for_training=for_training)
    assert set(report.matched) == set(state)
    assert not (report.missing)
    assert not (report.unexpected)
    assert not (report.mismatched)
    assert not (report.ignored)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert str(report) == f"loaded {len(state)} of {len(state)} tensors from {tmp_path / 'm.pth'}"


def test_half_precision_is_cast_to_the_models_type(tmp_path: Path) -> None:
    model, state = Detector(), randomised(Detector())
    load_weights(model, write(tmp_path / "m.pth", {name: t.half() for name, t in state.items()}))
    weight = model.state_dict()["backbone.conv.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["backbone.conv.weight"].half().float())


def test_a_checkpoint_in_memory_is_accepted(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write(tmp_path / "m.pth", randomised(Detector())))
    assert load_weights(Detector(), checkpoint).missing == []


def test_buffers_that_change_no_result_may_be_on_one_side(tmp_path: Path) -> None:
    model, state = Detector(norm="BN"), randomised(Detector(norm="BN"))
    del state["backbone.norm.num_batches_tracked"]
    state["pixel_mean"] = torch.zeros(3, 1, 1)
    state["pixel_std"] = torch.ones(3, 1, 1)
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    report = load_weights(model, write(tmp_path / "m.pth", state))
    assert not (report.missing)
    assert not (report.unexpected)
    assert len(report.ignored) == 4


def test_other_classes_are_refused_in_evaluation_with_the_number_to_set(tmp_path: Path) -> None:
    path = write(tmp_path / "m.pth", randomised(Detector(num_classes=80)))
    with refusal(
        "num-classes-differ", "cls_score.weight is (81, 8)", "(4, 8)", "MODEL.ROI_HEADS.NUM_CLASSES to 80"
    ):
        load_weights(Detector(num_classes=3), path)


def test_an_agnostic_box_head_is_told_from_other_classes(tmp_path: Path) -> None:
    state = randomised(Detector(num_classes=3))
    state["roi_heads.box_predictor.bbox_pred.weight"] = torch.ones(4, 8)
    state["roi_heads.box_predictor.bbox_pred.bias"] = torch.ones(4)
    with refusal("num-classes-differ", "bbox_pred.weight is (4, 8)", "CLS_AGNOSTIC_BBOX_REG"):
        load_weights(Detector(num_classes=3), write(tmp_path / "m.pth", state))


def test_other_classes_start_afresh_in_training(tmp_path: Path) -> None:
    model, state = Detector(num_classes=3), randomised(Detector(num_classes=80))
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, write(tmp_path / "m.pth", state), for_training=True)
    skipped = {mismatch.name for mismatch in report.mismatched}
    assert skipped == {name for name in fresh if name.startswith("roi_heads")}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in skipped else state[name])
    assert "6 start afresh" in str(report)
    assert "(81, 8)" in str(report)


@pytest.mark.parametrize("for_training", [True, False])
@pytest.mark.parametrize(
    ("other", "code", "named"),
    [
        (Detector(width=16), "other-network", "backbone.conv.weight is (16, 3, 3, 3)"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), "other-network", "'0.weight'"),
        (Detector(norm="BN"), "other-norm", "backbone.norm"),
    ],
)
def test_another_architecture_is_refused(
    tmp_path: Path, other: nn.Module, code: Code, named: str, for_training: bool
) -> None:
    model = Detector()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with refusal(code, named) as caught:
        load_weights(model, write(tmp_path / "m.pth", randomised(other)), for_training=for_training)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "m.pth") in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_group_norm_does_not_become_batch_norm(tmp_path: Path) -> None:
    path = write(tmp_path / "m.pth", randomised(Detector(norm="GN")))
    with refusal("other-norm", "backbone.norm"):
        load_weights(Detector(norm="BN"), path, for_training=True)


def test_the_backbone_alone_is_a_starting_point_but_not_a_detector(tmp_path: Path) -> None:
    state = {name: t for name, t in randomised(Detector()).items() if name.startswith("backbone")}
    path = write(tmp_path / "m.pth", {**state, "stem.fc.weight": torch.ones(2)})
    report = load_weights(Detector(), path, for_training=True)
    assert len(report.matched) == len(state)
    assert report.left_out == ["stem.fc.weight"]
    assert "1 are of no use to a detector: 'stem.fc.weight'" in str(report)
    assert not report.unexpected
    assert "6 not in the file, start afresh: 'roi_heads" in str(report)
    with refusal("other-network", "6 of the model's 11", "'roi_heads"):
        load_weights(Detector(), path)


def test_a_mask_model_evaluates_without_its_mask_head_but_not_without_a_layer(tmp_path: Path) -> None:
    state = randomised(Detector(mask=True))
    report = load_weights(Detector(mask=False), write(tmp_path / "m.pth", state))
    assert all(name.startswith("roi_heads.mask_head") for name in report.unexpected)
    path = write(tmp_path / "n.pth", {**state, "backbone.conv3.weight": torch.ones(1)})
    with refusal("other-network", "1 tensors", "'backbone.conv3.weight'"):
        load_weights(Detector(mask=True), path)


def test_a_linear_layer_takes_a_1x1_convolution(tmp_path: Path) -> None:
    """And a number takes an array of one; the report says so. Other shapes of as many values are refused."""
    model, state = Detector(norm="BN"), randomised(Detector(norm="BN"))
    weight = state["roi_heads.box_predictor.cls_score.weight"]
    state["roi_heads.box_predictor.cls_score.weight"] = weight[:, :, None, None]
    state["backbone.norm.num_batches_tracked"] = torch.tensor([3])
    report = load_weights(model, write(tmp_path / "m.pth", state))
    assert set(report.reshaped) == {
        "roi_heads.box_predictor.cls_score.weight",
        "backbone.norm.num_batches_tracked",
    }
    assert set(report.matched) == set(state)
    assert "2 reshaped: 'backbone.norm" in str(report)
    assert torch.equal(model.state_dict()["roi_heads.box_predictor.cls_score.weight"], weight)
    state["backbone.conv2.weight"] = state["backbone.conv2.weight"].reshape(8, 1, 8, 1)
    with refusal("other-network", "backbone.conv2.weight is (8, 1, 8, 1)"):
        load_weights(Detector(norm="BN"), write(tmp_path / "m.pth", state))


def test_as_many_other_classes_start_afresh(tmp_path: Path) -> None:
    state = randomised(Detector())
    save_weights(tmp_path / "m.pth", state, {"class_names": ["cat", "dog", "cow"]})
    for names, afresh in (
        (["cat", "dog", "cow"], False),
        (["dog", "cat", "cow"], True),
        (["a", "b", "c"], True),
    ):
        model = Detector()
        report = load_weights(model, tmp_path / "m.pth", for_training=True, class_names=names)
        assert len(report.mismatched) == (6 if afresh else 0)
        assert ("6 start afresh, made for other classes" in str(report)) == afresh
        weight = model.state_dict()["roi_heads.box_predictor.cls_score.weight"]
        assert torch.equal(weight, state["roi_heads.box_predictor.cls_score.weight"]) != afresh
        assert torch.equal(model.state_dict()["backbone.conv.weight"], state["backbone.conv.weight"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_8_bits_are_numbers_or_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    state = randomised(Detector())
    state["backbone.conv2.bias"] = state["backbone.conv2.bias"].to(dtype)
    model = Detector()
    load_weights(model, write(tmp_path / "m.pth", state))
    assert torch.equal(model.state_dict()["backbone.conv2.bias"], state["backbone.conv2.bias"].float())
    state["backbone.conv2.bias"] = torch.full_like(state["backbone.conv2.bias"].float(), torch.nan).to(dtype)
    with refusal("not-finite", "'backbone.conv2.bias'"):
        load_weights(Detector(), write(tmp_path / "m.pth", state))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = randomised(Detector())
    state["backbone.conv2.bias"][3] = float("nan")
    with refusal("not-finite", "'backbone.conv2.bias'"):
        load_weights(Detector(), write(tmp_path / "m.pth", state))


def test_detectron2s_checkpoint_fits_its_configuration(shared_dir: Path) -> None:
    from gn_detect.config import load_config
    from gn_detect.modeling import build_model

    oracle = shared_dir / "oracles" / "dsb_r18_gn"
    model = build_model(load_config(oracle / "config.yaml"))
    report = load_weights(model, oracle / "model_final.pth")
    assert not (report.missing)
    assert not (report.unexpected)
    assert not (report.mismatched)
    assert len(report.matched) == 124


def test_a_cifar_network_is_no_detector(shared_dir: Path) -> None:
    from gn_detect.config import load_config
    from gn_detect.modeling import build_model

    model = build_model(load_config(shared_dir / "oracles" / "dsb_r18_gn" / "config.yaml"))
    file = shared_dir / "weights" / "resnet20_cifar10_gn_bn" / "resnet20_cifar10_gn_bs32.pth"
    with refusal("other-network", "backbone.bottom_up.stem.conv1.weight"):
        load_weights(model, file, for_training=True)
