"""Losses and gradients that are not finite: the black box, its replay, and going on without the step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gn_detect.cli import main
from gn_detect.config import Config
from gn_detect.engine import divergence, replay, train
from gn_detect.engine import trainer as trainer_module
from gn_detect.errors import UserError
from gn_detect.modeling.mask_head import MaskHead
from gn_detect.structures import Sample
from tests.engine.chaos import differences


@pytest.fixture
def spoiled_config(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The mask head overflows on image 4, and only there."""
    real_step, real_forward = trainer_module.train_step, MaskHead.forward
    images: list[int] = []

    def step(cfg: Config, model: torch.nn.Module, batch: list[Sample], state: object) -> object:
        images[:] = [sample.image_id for sample in batch]
        return real_step(cfg, model, batch, state)  # type: ignore[arg-type]

    def examine(cfg: Config, model: object, batch: list[Sample], *rest: object) -> object:
        images[:] = [sample.image_id for sample in batch]
        return real_examine(cfg, model, batch, *rest)  # type: ignore[arg-type]

    def forward(self: MaskHead, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return real_forward(self, x / (0.0 if 4 in images else 1.0), labels)

    real_examine = divergence.examine
    monkeypatch.setattr(trainer_module, "train_step", step)
    monkeypatch.setattr(divergence, "examine", examine)
    monkeypatch.setattr(MaskHead, "forward", forward)
    keys = {"DATASETS.TEST": [], "SOLVER.LOG_PERIOD": 3, "SOLVER.CHECKPOINT_PERIOD": 1}
    return tiny_config.replace(keys)


def test_training_stops_and_the_black_box_repeats_the_step(
    spoiled_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"diverged at iteration \d: .*loss_mask nan.*mask_head") as caught:
        train(spoiled_config)
    message = str(caught.value)
    assert "\n" not in message
    folder = Path(message.rpartition("gn-detect replay ")[2].partition(" ")[0])
    report = json.loads((folder / "report.json").read_text())
    assert 4 in [image["image_id"] for image in report["images"]]
    assert all(image["boxes"] for image in report["images"])
    assert report["findings"]["0"]["losses"]["loss_mask"] == "nan"
    assert report["findings"]["0"]["output"].startswith("roi_heads.mask_head")
    findings = replay(folder)
    assert findings[0].output == report["findings"]["0"]["output"]
    assert findings[0].gradient is not None
    assert main(["replay", str(folder)]) == 0
    assert "loss_mask nan" in capsys.readouterr().out
    assert main(["replay", "--json", str(folder)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["0"]["losses"]["loss_mask"] is None
    assert printed["0"]["output"] == findings[0].output
    here = str(Path(spoiled_config.output_dir).parent).encode()
    assert [path for path in folder.iterdir() if here in path.read_bytes()] == [], "it is passed on"
    # What was saved before is untouched, and finite.
    last = (Path(spoiled_config.output_dir) / "last_checkpoint").read_text()
    saved = torch.load(Path(spoiled_config.output_dir) / last, weights_only=True)
    kept = torch.load(folder / "state.pth", weights_only=True)
    assert differences(kept["model"], saved["model"]) == []
    assert saved["iteration"] == kept["iteration"] - 1


def test_replay_refuses_another_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="state.pth"):
        replay(tmp_path)


@pytest.mark.parametrize("norm", [pytest.param("GN", marks=pytest.mark.slow), "BN"])
def test_skipped_step_changes_nothing_and_training_goes_on(spoiled_config: Config, norm: str) -> None:
    """Nor the running statistics of BatchNorm, which the forward pass has changed by then."""
    norms = {f"MODEL.{part}.NORM": norm for part in ("RESNETS", "FPN", "ROI_MASK_HEAD")}
    cfg = spoiled_config.replace({"SOLVER.NON_FINITE": "skip", **norms})
    train(cfg)
    folder = Path(cfg.output_dir)
    skipped = [int(path.name.rpartition("_")[2]) for path in (folder / "black_box").iterdir()]
    assert skipped
    names = [f"model_{i:07d}.pth" if i < 5 else "model_final.pth" for i in range(6)]
    weights = [torch.load(folder / name, weights_only=True)["model"] for name in names]
    for iteration in range(1, 6):
        unchanged = differences(weights[iteration], weights[iteration - 1]) == []
        assert unchanged == (iteration in skipped)
    for name in (folder / "black_box").iterdir():
        findings = json.loads((name / "report.json").read_text())["findings"]
        assert all(found["weight"] is None and "mask_head" in found["output"] for found in findings.values())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(value is not None for line in lines for value in line.values())


def test_gradient_that_is_not_finite_is_found(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is fine, and its gradient is not: the root of zero."""
    real = MaskHead.forward

    def forward(self: MaskHead, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return real(self, x + (x * 0).abs().sqrt(), labels)

    monkeypatch.setattr(MaskHead, "forward", forward)
    with pytest.raises(UserError, match="diverged at iteration 0: .*first gradient that is not finite"):
        train(tiny_config.replace({"DATASETS.TEST": []}))
