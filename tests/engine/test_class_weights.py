"""CLASS_WEIGHTS: the loss by hand, and the numbers that auto becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gn_detect.config import Config, load_config
from gn_detect.engine import train
from gn_detect.engine.run import prepare
from gn_detect.modeling import make_model
from tests.refusal import refusal

KEY = "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS"


def test_each_roi_counts_by_its_class(tiny_config: Config) -> None:
    model = make_model(tiny_config.replace({KEY: [0.5, 3.0]}))
    predictor = model.roi_heads.box_predictor
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(6, 1)
    losses = predictor.losses(logits, torch.zeros(6, 8), boxes, boxes, labels)
    each = F.cross_entropy(logits, labels, reduction="none")
    expected = (each * torch.tensor([0.5, 3.0, 1.0, 1.0, 3.0, 0.5])).sum() / 6
    assert losses["loss_cls"] == pytest.approx(float(expected))
    assert not any("class_weights" in name for name in model.state_dict())
    with refusal("conflicting-keys", KEY, "2"):
        tiny_config.replace({KEY: [1.0]})


def test_auto_follows_the_objects_and_a_run_keeps_the_numbers(tiny_config: Config, tmp_path: Path) -> None:
    """Nine bars for each square: weights of 1 to 3, whose mean over the objects is 1."""
    source = Path(tiny_config.datasets.registered["tiny_train"].annotations)
    content = json.loads(source.read_text())
    squares = [a for a in content["annotations"] if a["category_id"] == 3]
    bars = [a for a in content["annotations"] if a["category_id"] == 7]
    many = [{**bar, "id": 1000 + i} for i, bar in enumerate(bars * 9)]
    content["annotations"] = [*squares, *many]
    path = tmp_path / "many.json"
    path.write_text(json.dumps(content))
    entries = {name: dict(entry) for name, entry in tiny_config.datasets.registered.items()}
    entries["tiny_train"]["annotations"] = str(path)
    cfg = tiny_config.replace(
        {"DATASETS.REGISTER": entries, "DATASETS.TEST": [], KEY: "auto", "SOLVER.MAX_ITER": 1}
    )
    weights = prepare(cfg, False).cfg.model.roi_box_head.class_weights
    assert weights[0] == pytest.approx(3 * weights[1], abs=1e-3)
    assert (weights[0] + 9 * weights[1]) / 10 == pytest.approx(1, abs=1e-3)
    train(cfg)
    saved = load_config(Path(cfg.output_dir) / "config.yaml").model.roi_box_head.class_weights
    assert saved == weights
    train(cfg.replace({"SOLVER.MAX_ITER": 2}), resume=True)
