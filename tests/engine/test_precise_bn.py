"""PreciseBN: statistics over batches with fixed weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gn_detect.config import Config
from gn_detect.engine import train
from gn_detect.engine.precise_bn import recompute_statistics
from gn_detect.weights import read_checkpoint

BN = {"MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "BN", "TEST.PRECISE_BN.ENABLED": True}
STATISTICS = ("running_mean", "running_var")


def test_means_over_batches_of_several_sizes() -> None:
    """The statistics are those of all values together; momentum and norms that are not trained stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.BatchNorm2d(4))
    model[3].eval()
    batches = [torch.randn(n, 3, 5, side) * n + side for n, side in ((1, 7), (4, 3), (2, 6))]
    recompute_statistics(model, model, batches)
    values = torch.cat([model[0](batch).transpose(0, 1).flatten(1) for batch in batches], dim=1).double()
    torch.testing.assert_close(model[1].running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model[1].running_var.double(), values.var(1, correction=0), rtol=1e-5, atol=1e-6
    )
    assert model[1].momentum == 0.3
    assert model[3].running_mean.tolist() == [0] * 4
    assert not model[1]._forward_hooks


def statistics_of(folder: Path, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    tensors = read_checkpoint(folder / name).tensors
    return {key: value for key, value in tensors.items() if key.endswith(STATISTICS)}


def test_a_run_has_them_and_a_resumed_one_the_same(tiny_config: Config, tmp_path: Path) -> None:
    cfg = tiny_config.replace(
        BN
        | {"TEST.PRECISE_BN.NUM_ITER": 2, "SOLVER.MAX_ITER": 3, "TEST.EVAL_PERIOD": 2}
        | {"DATASETS.TEST": [], "MODEL.MASK_ON": False}
    )
    whole = cfg.replace({"OUTPUT_DIR": str(tmp_path / "whole"), "SOLVER.CHECKPOINT_PERIOD": 2})
    plain = whole.replace({"OUTPUT_DIR": str(tmp_path / "plain"), "TEST.PRECISE_BN.ENABLED": False})
    train(whole)
    train(plain)
    first, last = statistics_of(tmp_path / "whole", "model_0000001.pth"), statistics_of(tmp_path / "whole")
    other = statistics_of(tmp_path / "plain")
    assert first.keys() == last.keys() == other.keys()
    assert len(first) > 20
    assert all(not torch.equal(last[key], other[key]) for key in last)
    weights = [read_checkpoint(tmp_path / run / "model_final.pth").tensors for run in ("whole", "plain")]
    for key, value in weights[0].items():  # training itself is the same
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(value, weights[1][key]), key

    (tmp_path / "whole/model_final.pth").unlink()
    (tmp_path / "whole/last_checkpoint").write_text("model_0000001.pth")
    train(whole, resume=True)
    again = statistics_of(tmp_path / "whole")
    for key, value in last.items():
        assert torch.equal(again[key], value), key


def test_without_batch_norm_there_is_nothing_to_do(
    tiny_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="gn_detect"):
        train(
            tiny_config.replace({"TEST.PRECISE_BN.ENABLED": True, "SOLVER.MAX_ITER": 1, "DATASETS.TEST": []})
        )
    assert "TEST.PRECISE_BN has nothing to do" in caplog.text
