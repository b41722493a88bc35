"""``TEST.LOSS_IMAGES``: the losses on test sets, beside AP, and without any effect on the training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from gn_detect.config import Config
from gn_detect.data import build_loss_loader, build_test_loader
from gn_detect.engine import evaluate, train
from gn_detect.evaluation import losses as losses_module
from gn_detect.evaluation import mean_losses
from gn_detect.modeling import build_model
from gn_detect.modeling.mask_rcnn import MaskRCNN
from gn_detect.report import write_report
from gn_detect.weights import read_checkpoint

NAMES = ["total_loss", "loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_on(cfg: Config, model: MaskRCNN) -> dict[str, float]:
    _, dataset = build_test_loader(cfg, cfg.datasets.test[0])
    return mean_losses(model, build_loss_loader(cfg, dataset))


def test_a_run_writes_them_beside_ap_and_trains_the_same(tiny_config: Config, tmp_path: Path) -> None:
    """With a moving average, and BatchNorm in the backbone; evaluating the checkpoint gives the same."""
    found = {}
    for images in (0, 2):
        cfg = tiny_config.replace(
            {
                "TEST.LOSS_IMAGES": images,
                "TEST.EVAL_PERIOD": 2,
                "SOLVER.MAX_ITER": 4,
                "SOLVER.EMA.ENABLED": True,
                "MODEL.RESNETS.NORM": "BN",
                "OUTPUT_DIR": str(tmp_path / str(images)),
            }
        )
        found[images] = train(cfg), read_checkpoint(tmp_path / str(images) / "model_final.pth")
    (without, plain), (results, checkpoint) = found[0], found[2]
    assert all(torch.equal(value, checkpoint.tensors[name]) for name, value in plain.tensors.items())
    assert "validation" not in without
    assert list(results["validation"]) == NAMES
    assert results["bbox"] == pytest.approx(without["bbox"], nan_ok=True)
    assert results["validation"] == json.loads((tmp_path / "2/results.json").read_text())["validation"]
    lines = [line for line in lines_of(tmp_path / "2") if "segm/AP" in line]
    assert [line["iteration"] for line in lines] == [1, 3]
    assert lines[0]["validation/total_loss"] != lines[1]["validation/total_loss"]
    assert {name: lines[1][f"validation/{name}"] for name in NAMES} == results["validation"]
    weights = {"MODEL.WEIGHTS": str(tmp_path / "2/model_final.pth"), "OUTPUT_DIR": str(tmp_path / "again")}
    assert evaluate(cfg.replace(weights))["validation"] == results["validation"]

    page = write_report(tmp_path / "2", pictures=0).read_text()
    assert re.search("<li[^>]*>total loss</li><li[^>]*>validation/total loss</li>", page)


# All anchors and RoIs count, so that no choice is random.
ALL = {
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 10_000,
    "MODEL.RPN.POSITIVE_FRACTION": 1.0,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1000,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
}


def test_they_are_the_training_losses_of_each_image(tiny_config: Config) -> None:
    cfg = tiny_config.replace({**ALL, "TEST.LOSS_IMAGES": 99})
    torch.manual_seed(0)
    model = build_model(cfg).train()
    _, dataset = build_test_loader(cfg, "tiny_test")
    loader = build_loss_loader(cfg, dataset)
    samples = [sample for batch in loader for sample in batch]
    assert [sample.image_id for sample in samples] == [1, 2, 3]
    assert [tuple(sample.image.shape) for sample in samples] == [(3, 64, 80)] * 3
    for index, sample in enumerate(samples):
        assert torch.equal(sample.target.boxes, torch.from_numpy(dataset.read(index).boxes).float())
    with torch.no_grad():
        each = [model.losses([sample.image], [sample.target]) for sample in samples]
    expected = {name: sum(float(losses[name]) for losses in each) / 3 for name in NAMES[1:]}
    found = mean_losses(model, loader)
    assert found == pytest.approx({"total_loss": sum(expected.values()), **expected}, rel=1e-4)


def test_everything_stays_and_nothing_else_counts(tiny_config: Config) -> None:
    """Random numbers before, augmentation and the batch of a test are of no matter."""
    cfg = tiny_config.replace({"TEST.LOSS_IMAGES": 2, "MODEL.RESNETS.NORM": "BN"})
    model = build_model(cfg).train()
    model.backbone.bottom_up.stem.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    first = losses_on(cfg, model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(5)
    others = {"TEST.IMS_PER_BATCH": 3, "INPUT.RANDOM_FLIP": "vertical", "INPUT.CROP.ENABLED": True}
    assert losses_on(cfg.replace({**others, "SEED": 7, "DATALOADER.NUM_WORKERS": 1}), model) == first
    norm = next(m for m in model.modules() if isinstance(m, _BatchNorm))
    norm.running_mean += 1
    assert losses_on(cfg, model) != first  # of the running statistics


def test_the_processes_share_the_images(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one after the other: together they give the numbers of one, to the bit."""
    cfg = tiny_config.replace({"TEST.LOSS_IMAGES": 3})
    model = build_model(cfg).train()
    _, dataset = build_test_loader(cfg, "tiny_test")
    alone = mean_losses(model, build_loss_loader(cfg, dataset))
    sent: list[Any] = []
    monkeypatch.setattr(losses_module, "world_size", lambda: 2)
    for rank in (1, 0):
        monkeypatch.setattr(losses_module, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(losses_module, "gather", lambda rows: (sent.append(rows), sent)[1])
        together = mean_losses(model, build_loss_loader(cfg, dataset, rank=rank, world_size=2))
    assert [len(rows) for rows in sent] == [1, 2]
    assert together == alone


def test_some_images_and_those_without_objects(tiny_config: Config, tmp_path: Path) -> None:
    entry = tiny_config.datasets.registered["tiny_test"]
    content = json.loads(Path(entry.annotations).read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
    file = tmp_path / "some.json"

    def chosen(count: int, filtered: bool) -> list[int]:
        file.write_text(json.dumps(content))
        register = {"some": {"ANNOTATIONS": str(file), "IMAGES": entry.images}}
        keys = {"DATASETS.REGISTER": register, "DATALOADER.FILTER_EMPTY_ANNOTATIONS": filtered}
        cfg = tiny_config.replace({**keys, "DATASETS.TEST": ["some"], "TEST.LOSS_IMAGES": count})
        _, dataset = build_test_loader(cfg, "some")
        loader = build_loss_loader(cfg, dataset)
        found = mean_losses(build_model(cfg), loader)
        assert set(found) == (set(NAMES) if len(loader) else set())
        return [sample.image_id for (sample,) in loader]

    assert chosen(9, True) == [1, 3]
    assert chosen(1, True) == [1]
    assert chosen(9, False) == [1, 2, 3]
    assert chosen(2, False) == [1, 3]  # spread over all
    content["annotations"] = []
    assert chosen(9, True) == []
