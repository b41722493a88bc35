"""Test-time augmentation: the views of an image, the merge of boxes, the mean of masks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gn_detect.config import Config, load_config
from gn_detect.engine import Predictor, evaluate
from gn_detect.engine.augmented import AugmentedDetector
from gn_detect.export.write import export_detector
from gn_detect.modeling import MaskRCNN, build_model
from gn_detect.structures import Detections
from gn_detect.weights import save_weights
from tests.refusal import refusal

AUG = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": [64, 80], "TEST.AUG.MAX_SIZE": 120}


class Scripted:
    """In place of a model: returns what a test says, and keeps the images that it gets."""

    has_masks = True

    def __init__(self, model: MaskRCNN, found: list[Detections], masks: list[Tensor]) -> None:
        self.roi_heads, self.found, self.masks = model.roi_heads, found, masks
        self.batches: list[list[Tensor]] = []
        self.boxes: list[Tensor] = []

    def find(self, images: list[Tensor], masks: bool) -> list[Detections]:
        assert not masks
        self.batches.append(images)
        return [self.found.pop(0) for _ in images]

    def segment(self, images: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> list[Tensor]:
        self.boxes += boxes
        return [self.masks.pop(0) for _ in images]


@pytest.fixture
def make(tiny_config: Config) -> Callable[..., MaskRCNN]:
    """``make({"KEY": value})``: a tiny model in evaluation mode whose detections are many."""

    def build(changes: dict | None = None) -> MaskRCNN:
        torch.manual_seed(3)
        return build_model(
            tiny_config.replace({"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.3} | (changes or {}))
        ).eval()

    return build


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels))


def test_merge_and_mean_by_hand(tiny_config: Config, make: Callable[..., MaskRCNN]) -> None:
    """The file has 40 x 50 pixels and the image 80 x 100, so one pixel of the file is 1.6 of the view."""
    cfg = tiny_config.replace(AUG | {"TEST.AUG.MIN_SIZES": [64]})
    plain, mirrored = torch.rand(2, 8, 8), torch.rand(2, 8, 8)
    model = Scripted(
        make(),
        [
            found([[16, 16, 48, 48], [0, 0, 16, 16]], [0.9, 1e-9], [1, 0]),
            # 80 - x in the view: the same object, and one of another class that reaches out of the image
            found([[33, 16, 64, 48], [64, 32, 81, 66]], [0.8, 0.7], [1, 0]),
        ],
        [plain, mirrored],
    )
    image = torch.arange(3 * 80 * 100).view(3, 80, 100).to(torch.uint8)
    (result,) = AugmentedDetector(model, cfg).detect([image], [(40, 50)], paste=False)

    views = model.batches[0]
    assert [tuple(view.shape) for view in views] == [(3, 64, 80)] * 2
    resized = np.asarray(
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((80, 64), Image.Resampling.BILINEAR)
    )
    assert np.array_equal(views[0].permute(1, 2, 0), resized)
    assert torch.equal(views[1], views[0].flip(2))
    torch.testing.assert_close(result.boxes, torch.tensor([[10.0, 10, 30, 30], [0, 20, 10, 40]]))
    assert result.labels.tolist() == [1, 0]
    assert result.scores.tolist() == pytest.approx([0.9, 0.7])
    torch.testing.assert_close(result.masks, (plain + mirrored.flip(2)) / 2)
    torch.testing.assert_close(model.boxes[0], result.boxes * 1.6)
    torch.testing.assert_close(model.boxes[1][0], torch.tensor([32.0, 16, 64, 48]))


def test_three_images_at_a_time_and_the_limit(tiny_config: Config, make: Callable[..., MaskRCNN]) -> None:
    cfg = tiny_config.replace(AUG | {"TEST.DETECTIONS_PER_IMAGE": 3})
    boxes = [[[9.0 * i, 0, 9.0 * i + 8, 8]] for i in range(4)]
    model = Scripted(make(), [found(box, [0.5], [0]) for box in boxes], [torch.rand(3, 4, 4)] * 4)
    (result,) = AugmentedDetector(model, cfg).detect([torch.zeros(3, 64, 80, dtype=torch.uint8)])
    assert [len(batch) for batch in model.batches] == [3, 1]
    assert [tuple(view.shape[1:]) for batch in model.batches for view in batch] == [(64, 80)] * 2 + [
        (80, 100)
    ] * 2
    assert len(result) == 3


@pytest.mark.parametrize("cascade", [False, True])
def test_one_view_changes_nothing(tiny_config: Config, make: Callable[..., MaskRCNN], cascade: bool) -> None:
    """A second NMS of the same boxes keeps all of them, and the mean of one mask is the mask."""
    heads = {"MODEL.ROI_HEADS.NAME": "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
    model = make(heads if cascade else {})
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    cfg = tiny_config.replace(AUG | {"TEST.AUG.MIN_SIZES": [64], "TEST.AUG.FLIP": False})
    (expected,), (result,) = model.detect([image]), AugmentedDetector(model, cfg).detect([image])
    assert len(result) > 5
    for name in ("boxes", "scores", "labels", "masks"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name


def test_the_mirror_image_gives_the_mirrored_result(
    tiny_config: Config, make: Callable[..., MaskRCNN]
) -> None:
    model, cfg = make(), tiny_config.replace(AUG)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    detector = AugmentedDetector(model, cfg)
    (one,), (other,) = detector.detect([image]), detector.detect([image.flip(2)])
    assert len(one) == len(other) > 5
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-5)
    mirrored = other.boxes * torch.tensor([-1.0, 1, -1, 1]) + torch.tensor([96.0, 0, 96, 0])
    torch.testing.assert_close(one.boxes[:5], mirrored[:5, [2, 1, 0, 3]], rtol=0, atol=1e-3)
    assert one.masks is not None and other.masks is not None
    assert (one.masks[:5] != other.masks[:5].flip(2)).float().mean() < 0.001


def test_evaluation_gives_both_and_predict_takes_it(
    tiny_config: Config, make: Callable[..., MaskRCNN], tmp_path: Path
) -> None:
    save_weights(tmp_path / "model.pth", make().state_dict())
    cfg = tiny_config.replace(AUG | {"MODEL.WEIGHTS": str(tmp_path / "model.pth")})
    results = evaluate(cfg)
    assert list(results) == ["bbox", "segm", "diagnosis", "bbox_TTA", "segm_TTA"]
    stored = {}
    for folder in ("inference", "inference_TTA"):
        entries = json.loads(
            (tmp_path / "run" / folder / "tiny_test/coco_instances_results.json").read_text()
        )
        stored[folder] = [entry["score"] for entry in entries if entry["image_id"] == 1]
    assert stored["inference"] != stored["inference_TTA"]
    picture = Path(cfg.datasets.registered["tiny_test"].images) / "001.png"
    predictor = Predictor(cfg)
    assert predictor(picture).scores.tolist() == pytest.approx(stored["inference_TTA"])
    with refusal("unsupported-value", "TEST.AUG.ENABLED"):
        export_detector(predictor, tmp_path / "model.pt2")


def test_training_evaluates_augmented_at_its_end(tiny_config: Config, tmp_path: Path) -> None:
    from gn_detect.engine import train

    results = train(tiny_config.replace(AUG | {"SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 1}))
    assert "segm_TTA" in results
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evaluated = {line["iteration"]: "bbox_TTA/AP" in line for line in lines if "bbox/AP" in line}
    assert evaluated == {0: False, 1: True}
    assert load_config(tmp_path / "run/config.yaml").test.aug.enabled
