"""Our parts in detectron2's models, and detectron2's numbers by our evaluation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gn_detect import load_config
from gn_detect.engine import Predictor
from gn_detect.errors import UserError
from gn_detect.interop import detectron2 as partner
from gn_detect.layers import GroupNorm
from tests.refusal import refusal

pytest.importorskip("detectron2", reason="needs detectron2, which is not installed here")

SMALL = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 64,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV", 2,
    "MODEL.ROI_HEADS.NUM_CLASSES", 3,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
    "MODEL.RPN.PRE_NMS_TOPK_TEST", 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST", 50,
    "TEST.DETECTIONS_PER_IMAGE", 10,
]  # fmt: skip
FPN, C4 = "mask_rcnn_R_50_FPN_1x.yaml", "mask_rcnn_R_50_C4_1x.yaml"


def make_config(name: str = FPN, norm: str = "GN", *, depth: int = 18) -> Any:
    from detectron2 import model_zoo

    cfg = model_zoo.get_config(f"COCO-InstanceSegmentation/{name}")
    cfg.merge_from_list([*SMALL, "MODEL.RESNETS.NORM", norm])
    if depth >= 50:
        cfg.merge_from_list(["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256])
    if norm == "GN":
        cfg.merge_from_list(["MODEL.FPN.NORM", "GN", "MODEL.ROI_MASK_HEAD.NORM", "GN"])
    return cfg


def make_model(cfg: Any) -> Any:
    from detectron2.modeling import build_model

    torch.manual_seed(0)
    model = build_model(cfg).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name and name.endswith(("weight", "running_var")):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
                if name.endswith("conv3.norm.weight"):  # or the sums of residuals grow without bound
                    value.mul_(0.2)
            elif "norm" in name and name.endswith(("bias", "running_mean")):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def make_batches(count: int = 2) -> list[list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(2)
    return [
        [{"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=generator)}]
        for _ in range(count)
    ]


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_a_fused_model_is_the_same_function_with_one_call_for_norm_shortcut_and_relu(depth: int) -> None:
    model = make_model(make_config(depth=depth))
    fused = partner.fuse_relu(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    x = torch.randn(1, 3, 96, 128)
    for name, expected in model.backbone(x).items():
        torch.testing.assert_close(fused.backbone(x)[name], expected, rtol=1e-4, atol=1e-4)
    block = fused.backbone.bottom_up.res2[0]
    seen: list[Any] = []
    block.conv2.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1:]))
    fused.backbone(x)
    assert seen[0][1] == "relu"
    assert (seen[0][0] is None) == (depth == 50)
    assert isinstance(fused.roi_heads.mask_head.mask_fcn1.norm, GroupNorm)
    assert fused.roi_heads.mask_head.mask_fcn1.norm.activation == "relu"


def test_a_block_of_another_class_or_with_hooks_keeps_its_forward() -> None:
    model = make_model(make_config())
    block = model.backbone.bottom_up.res2[0]
    block.conv1.register_forward_hook(lambda *_: None)
    fused = partner.fuse_relu(model)
    blocks, before = fused.backbone.bottom_up.res2, model.backbone.bottom_up.res2
    assert type(blocks[0]).forward is type(before[0]).forward
    assert type(blocks[1]).forward is not type(before[1]).forward


def through_pickle(model: Any, folder: Path) -> Any:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


COPIES = {
    "pickle": through_pickle,
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "fused again": lambda model, _: partner.fuse_relu(model),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("depth", [18, 50])
def test_a_copy_of_a_fused_model_computes_with_its_own_weights(tmp_path: Path, depth: int, how: str) -> None:
    fused = partner.fuse_relu(make_model(make_config(depth=depth))).backbone.bottom_up
    copied = COPIES[how](fused, tmp_path)
    assert [type(module) for module in copied.modules()] == [type(module) for module in fused.modules()]
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(copied(x)["res2"], fused(x)["res2"])
    for parameter in fused.parameters():
        parameter.data.fill_(float("nan"))
    assert copied(x)["res2"].isfinite().all()


def test_a_replica_of_a_fused_block_computes_with_its_own_weights() -> None:
    """DataParallel makes replicas: the attributes of the module with other parameters."""
    block = partner.fuse_relu(make_model(make_config())).backbone.bottom_up.res2[0]
    replica = block._replicate_for_data_parallel()
    replica.conv1 = copy.deepcopy(block.conv1)
    torch.nn.init.zeros_(replica.conv1.weight)
    x = torch.randn(1, 64, 8, 8)
    assert not torch.allclose(replica(x), block(x))


@pytest.mark.parametrize(
    ("name", "norm"), [(FPN, "FrozenBN"), (FPN, "SyncBN"), (FPN, "BN"), (C4, "FrozenBN")]
)
def test_a_model_is_converted_and_calibrated_on_its_own_inputs(name: str, norm: str) -> None:
    model = make_model(make_config(name, norm, depth=50 if name == C4 else 18))
    converted, report = partner.convert(model, make_batches(3), steps=3, progress=False)
    left = [type(m).__name__ for m in converted.modules() if "BatchNorm" in type(m).__name__]
    assert not left
    assert sum(isinstance(m, GroupNorm) for m in converted.modules()) == len(report.layers)
    assert set(report.similarity) >= {"converted", "calibrated"}
    with torch.no_grad():
        assert len(converted(make_batches(1)[0])[0]["instances"]) == 10


def test_another_kind_of_model_is_not_calibrated() -> None:
    with pytest.raises(UserError, match="no GeneralizedRCNN"):
        partner.convert(nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32)), make_batches())


def test_a_deformable_convolution_is_converted_and_cannot_be_calibrated_on_a_cpu() -> None:
    cfg = make_config(depth=50, norm="FrozenBN")
    cfg.merge_from_list(["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]])
    model = make_model(cfg)
    converted, _ = partner.convert(model)
    assert isinstance(converted.backbone.bottom_up.res5[1].conv2.norm, GroupNorm)
    assert len(converted(make_batches()[0])[0]["instances"]) > 0
    with refusal("unconvertible-model", "res5.0.conv2", "GPU"):
        partner.convert(model, make_batches(), steps=1)


@pytest.mark.parametrize("ending", ["pth", "pkl"])
def test_checkpoints_go_both_ways(ending: str, tmp_path: Path) -> None:
    from detectron2.checkpoint import DetectionCheckpointer

    model, other = make_model(make_config()), make_model(make_config())
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    partner.save_checkpoint(model, tmp_path / f"ours.{ending}")
    DetectionCheckpointer(other).load(str(tmp_path / f"ours.{ending}"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    DetectionCheckpointer(model, str(tmp_path)).save("theirs")
    report = partner.load_checkpoint(other, tmp_path / "theirs.pth")
    assert len(report.matched) == len(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class _Recorded(nn.Module):
    """Runs the model once; later calls give the same outputs again."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.outputs: dict[int, Any] = {}

    def forward(self, batch: list[dict[str, Any]]) -> Any:
        key = batch[0]["image_id"]
        if key not in self.outputs:
            self.outputs[key] = self.model(batch)
        return self.outputs[key]


@pytest.mark.slow
def test_our_ap_is_that_of_its_own_evaluator_on_real_images(shared_dir: Path, tmp_path: Path) -> None:
    """The trained nuclei detector of the oracle, all 41 val images."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
    from detectron2.data.datasets import register_coco_instances
    from detectron2.engine import DefaultPredictor
    from detectron2.evaluation import COCOEvaluator, inference_on_dataset

    oracle, data = shared_dir / "oracles/dsb_r18_gn", shared_dir / "data/dsb2018"
    annotations, images = data / "annotations/instances_val.json", data / "images"
    cfg = get_cfg()
    cfg.merge_from_file(str(oracle / "config.yaml"))
    cfg.merge_from_list(
        ["MODEL.DEVICE", "cpu", "DATASETS.TEST", ["partner_val"], "DATALOADER.NUM_WORKERS", 0]
    )
    cfg.MODEL.WEIGHTS = str(oracle / "model_final.pth")
    register_coco_instances("partner_val", {}, str(annotations), str(images))
    try:
        predictor = DefaultPredictor(cfg)
        model = _Recorded(predictor.model)
        loader = build_detection_test_loader(cfg, "partner_val")
        evaluator = COCOEvaluator("partner_val", output_dir=str(tmp_path))
        theirs = inference_on_dataset(model, loader, evaluator)
        ours = partner.evaluate(model, loader, annotations)
    finally:
        DatasetCatalog.remove("partner_val")
        MetadataCatalog.remove("partner_val")
    for kind in ("bbox", "segm"):
        for key in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
            print(f"{kind} {key}: ours {ours[kind][key]:.4f}, detectron2's {theirs[kind][key]:.4f}")
            assert ours[kind][key] == pytest.approx(theirs[kind][key], abs=0.02, nan_ok=True)

    # The same weights in our model find the same.
    ids = [sample["file_name"] for batch in loader for sample in batch][:3]
    keys = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(oracle / "model_final.pth")]
    own = Predictor(load_config(oracle / "config.yaml", keys))
    for batch in list(loader)[:3]:
        expected = partner.as_detections(model(batch)[0]["instances"])
        found = own(batch[0]["file_name"])
        assert len(found) == len(expected)
        assert len(ids) == 3
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0.05)
