"""Cascade R-CNN: detectron2's numbers, and each rule by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from gn_detect.config import load_config
from gn_detect.engine import Predictor
from gn_detect.engine.predict_files import highest_scores
from gn_detect.export.run import ExportedPredictor
from gn_detect.export.write import export_detector
from gn_detect.modeling import MaskRCNN, build_model, paired_outputs
from gn_detect.structures import Target
from gn_detect.weights import save_weights
from tests.refusal import refusal

from . import cascade_case

CASCADE = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
STORED = json.loads(Path(__file__).with_name("cascade_detectron2.json").read_text())  # detectron2 0.6's
KEY = "MODEL.ROI_BOX_CASCADE_HEAD."


def the_case(**changes: Any) -> MaskRCNN:
    # In channels-last, sums have another order and single L1 terms another sign: 1.5e-3 in some gradients.
    keys = cascade_case.KEYS | {"MODEL.CHANNELS_LAST": False} | changes
    model = build_model(load_config("Base-RCNN-FPN.yaml").replace(keys))
    model.load_state_dict(
        cascade_case.values({name: tuple(v.shape) for name, v in model.state_dict().items()})
    )
    return model


@pytest.fixture
def targets() -> list[Target]:
    return [Target(*parts) for parts in cascade_case.objects()]


def test_detections_are_detectron2s() -> None:
    """Sums in another order move boxes by 1e-4 pixels and single pixels of masks."""
    model = the_case().eval()
    for found, stored in zip(model.detect(cascade_case.images()), STORED["detections"], strict=True):
        assert len(found) == stored["count"]
        first = found[:8]
        assert first.labels.tolist() == stored["labels"][:8]
        torch.testing.assert_close(first.scores, torch.tensor(stored["scores"]), rtol=0, atol=1e-4)
        torch.testing.assert_close(first.boxes, torch.tensor(stored["boxes"]), rtol=0, atol=0.01)
        assert first.masks is not None
        pixels = torch.tensor(stored["pixels"])
        assert ((first.masks.sum((1, 2)) - pixels).abs() <= 2 + pixels / 500).all()


def test_losses_and_gradients_are_detectron2s(targets: list[Target]) -> None:
    model = the_case()
    losses = model.losses(cascade_case.images(), targets)
    assert losses.keys() == STORED["losses"].keys()
    for name, value in STORED["losses"].items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name
    torch.stack(list(losses.values())).sum().backward()
    parameters = dict(model.named_parameters())
    for name, norm in STORED["gradient_norms"].items():
        gradient = parameters[name].grad
        assert gradient is not None
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name


def decode(deltas: Tensor, boxes: Tensor, weights: tuple[float, ...], size: tuple[int, int]) -> Tensor:
    """Move and scale boxes, and clip them: the formulas of R-CNN, in float64."""
    dx, dy, dw, dh = (deltas.double() / torch.tensor(weights, dtype=torch.float64)).unbind(1)
    x0, y0, x1, y1 = boxes.double().unbind(1)
    w, h = x1 - x0, y1 - y0
    x, y = x0 + w / 2 + dx * w, y0 + h / 2 + dy * h
    w, h = w * dw.exp(), h * dh.exp()
    height, width = size
    return torch.stack(
        [
            (x - w / 2).clamp(0, width),
            (y - h / 2).clamp(0, height),
            (x + w / 2).clamp(0, width),
            (y + h / 2).clamp(0, height),
        ],
        dim=1,
    )


def test_stages_step_by_step(targets: list[Target]) -> None:
    """Losses and the gradient of the features, written out for one image in float64 where boxes are meant."""
    weights = ((10.0, 10.0, 5.0, 5.0), (16.0, 16.0, 8.0, 8.0))
    keys = {f"{KEY}IOUS": [0.5, 0.2], f"{KEY}BBOX_REG_WEIGHTS": weights, "MODEL.MASK_ON": False}
    model, image, target = the_case(**keys), cascade_case.images()[0], targets[0]
    heads, size = model.roi_heads, (96, 128)
    features = {k: v.detach().requires_grad_() for k, v in model.backbone(model.preprocess([image])).items()}
    proposals = [p.detach() for p in model.proposal_generator.propose(features, [size])]
    losses = heads.losses(features, proposals, [target], [size])
    found = torch.autograd.grad(torch.stack(list(losses.values())).sum(), list(features.values())[:4])

    boxes = torch.cat([proposals[0], target.boxes]).double()  # the ground truth joins the first stage alone
    expected = [torch.zeros_like(x) for x in found]
    for stage, iou_threshold in enumerate((0.5, 0.2)):
        iou, nearest = box_iou(target.boxes.double(), boxes).max(dim=0)
        labels = torch.where(iou < iou_threshold, 3, target.labels[nearest])
        pooled = heads.box_pooler(heads.levels(features), [boxes.float()])
        logits, deltas = heads.box_predictor[stage](heads.box_head[stage](pooled))
        wanted = target.boxes.double()[nearest]
        (x0, y0, x1, y1), (u0, v0, u1, v1) = boxes.unbind(1), wanted.unbind(1)
        relative = [
            ((u0 + u1) - (x0 + x1)) / 2 / (x1 - x0),
            ((v0 + v1) - (y0 + y1)) / 2 / (y1 - y0),
            ((u1 - u0) / (x1 - x0)).log(),
            ((v1 - v0) / (y1 - y0)).log(),
        ]
        code = torch.stack(relative, dim=1) * torch.tensor(weights[stage])
        regression = (deltas - code)[labels < 3].abs().sum() / len(boxes)
        classification = F.cross_entropy(logits.double(), labels)
        assert (labels < 3).any()
        assert losses[f"loss_cls_stage{stage}"].item() == pytest.approx(classification.item(), rel=1e-4)
        assert losses[f"loss_box_reg_stage{stage}"].item() == pytest.approx(regression.item(), rel=1e-4)
        parts = torch.autograd.grad(classification + regression, list(features.values())[:4])
        expected = [total + part / 2 for total, part in zip(expected, parts, strict=True)]
        boxes = decode(deltas.detach(), boxes, weights[stage], size)
        boxes = boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_scores_are_the_mean_and_boxes_the_last_stages(targets: list[Target]) -> None:
    model = the_case(**{"MODEL.ROI_HEADS.NMS_THRESH_TEST": 1.0, "TEST.DETECTIONS_PER_IMAGE": 1000}).eval()
    image, size = cascade_case.images()[0], (96, 128)
    heads, classes = model.roi_heads, 3
    with torch.no_grad():
        features = model.backbone(model.preprocess([image]))
        (boxes,) = model.proposal_generator.propose(features, [size])
        (found,) = heads.detect(features, [boxes], [size])
        boxes, total = boxes.double(), torch.zeros(len(boxes), classes + 1, dtype=torch.float64)
        for stage, settings in enumerate(((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))):
            pooled = heads.box_pooler(heads.levels(features), [boxes.float()])
            logits, deltas = heads.box_predictor[stage](heads.box_head[stage](pooled))
            total += logits.double().softmax(dim=1) / 3
            boxes = decode(deltas, boxes, settings, size)
    row, label = (total[:, :classes] > 0.1).nonzero(as_tuple=True)
    score, order = total[row, label].sort(descending=True)
    assert len(found) == len(score) > 20
    torch.testing.assert_close(found.scores.double(), score, rtol=0, atol=1e-5)
    # Nearly equal scores may change places.
    distance = torch.cdist(found.boxes.double(), boxes[row[order]], p=torch.inf)
    assert distance.amin(dim=1).max() < 1e-2


@pytest.mark.parametrize("counts", [(2, 0), pytest.param((0, 0), marks=pytest.mark.slow)])
def test_boxes_that_become_empty_are_dropped_and_all_parameters_get_gradients(
    counts: tuple[int, int], small_model: Callable[..., MaskRCNN], targets: list[Target]
) -> None:
    """The second stage moves all boxes out of the image."""
    model = small_model({**CASCADE, "MODEL.ROI_BOX_HEAD.NUM_CONV": 1, "MODEL.ROI_BOX_HEAD.NORM": "GN"})
    with torch.no_grad():
        model.roi_heads.box_predictor[1].bbox_pred.bias[:2] = 1e5
    cut = [
        Target(t.boxes[:n], t.labels[:n], t.masks[:n])
        for t, n in zip(targets, counts, strict=True)
        if t.masks
    ]
    losses = model.losses(cascade_case.images(), cut)
    assert losses["loss_cls_stage1"] > 0
    assert losses["loss_cls_stage2"] == losses["loss_box_reg_stage2"] == 0
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    for found in model.eval().detect(cascade_case.images()):
        assert found.boxes.isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), pytest.param(float("nan"), marks=pytest.mark.slow)])
def test_a_stage_that_is_not_finite_ends_in_finite_detections(value: float) -> None:
    model = the_case().eval()
    with torch.no_grad():
        model.roi_heads.box_predictor[0].bbox_pred.bias[2] = value
    for found in model.detect(cascade_case.images()):
        assert found.boxes.isfinite().all()
        assert found.scores.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False}, ("CLS_AGNOSTIC_BBOX_REG", "True")),
        ({f"{KEY}IOUS": [0.5, 0.6]}, (f"{KEY}IOUS", "BBOX_REG_WEIGHTS", "3")),
        ({f"{KEY}IOUS": [0.4, 0.6, 0.7]}, ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "0.4")),
        ({"MODEL.ROI_HEADS.IOU_LABELS": [0, -1]}, ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0, 1]")),
    ],
)
def test_settings_that_make_no_cascade(
    changes: dict[str, Any], names: tuple[str, ...], small_config: Callable[..., Any]
) -> None:
    with refusal("conflicting-keys", *names):
        small_config(CASCADE | changes)


def test_the_highest_score_is_the_mean_of_all_stages() -> None:
    class Holder:
        model = the_case(**{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}).eval()

    with highest_scores(Holder()) as scores:  # type: ignore[arg-type]
        found = Holder.model.detect(cascade_case.images()[:1])[0]
    assert scores == pytest.approx([found.scores[0].item()], abs=1e-6)


def test_both_models_of_a_calibration_see_the_originals_boxes_in_each_stage() -> None:
    original, other = the_case().eval(), the_case().eval()
    with torch.no_grad():
        other.roi_heads.box_predictor[0].bbox_pred.bias += 1  # its own boxes would be others
    pairs = paired_outputs(original, other, cascade_case.images()[:1])
    logits = [(a, b) for a, b in pairs if a.shape[-1] == 4 and a.ndim == 2]
    assert len(logits) == 6  # class logits of three classes, and box deltas
    assert not torch.equal(*logits[1])
    for i in (0, 2, 3, 4, 5):
        torch.testing.assert_close(*logits[i], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.exhaustive)])
def test_an_exported_cascade_finds_the_same(suffix: str, tmp_path: Path) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    weights = tmp_path / "model.pth"
    cfg = load_config("Base-RCNN-FPN.yaml").replace(
        cascade_case.KEYS | {"MODEL.WEIGHTS": str(weights), "INPUT.MIN_SIZE_TEST": 96}
    )
    save_weights(weights, the_case().state_dict())
    predictor = Predictor(cfg)
    export_detector(predictor, tmp_path / f"model{suffix}")
    exported = ExportedPredictor(tmp_path / f"model{suffix}", trust=True)
    for image in cascade_case.images():
        pixels = image.permute(1, 2, 0).numpy()
        expected, found = predictor(pixels), exported(pixels)
        assert len(expected) == len(found) > 50
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=0.05)
