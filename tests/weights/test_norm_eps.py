"""The eps of each norm in a checkpoint: written, given to the model that loads it, and refused if broken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gn_detect import UserError, load_weights
from gn_detect.weights import NORM_EPS, norm_eps, read_checkpoint, save_weights


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4))


@pytest.mark.parametrize("ending", [".pth", ".pkl", ".safetensors"])
def test_from_one_model_to_another(tmp_path, ending: str) -> None:
    source, target, path = model(), model(), tmp_path / f"gn{ending}"
    source[1].eps, source[3].eps = 0.3, 1.7
    save_weights(path, source.state_dict(), norm_eps(source))
    report = load_weights(target, path)
    assert (target[1].eps, target[3].eps) == (0.3, 1.7)
    assert "2 norms have the file's eps: '1', '3'" in str(report)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(source(x), target(x))
    assert "eps" not in str(load_weights(target, path))


def test_the_usual_eps_is_not_written() -> None:
    assert norm_eps(model()) == {}


def test_norms_of_layers_that_start_afresh_keep_theirs(tmp_path) -> None:
    source, target, path = model(), model(), tmp_path / "gn.pth"
    source[1].eps = source[3].eps = 0.3
    tensors = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("3.")}
    save_weights(path, tensors, norm_eps(source))
    load_weights(target, path, for_training=True)
    assert (target[1].eps, target[3].eps) == (0.3, 1e-5)


@pytest.mark.parametrize("told", [{"1": 0.0}, {"1": float("inf")}, {"1": "0.3"}, [0.3], 0.3])
def test_what_is_no_eps_is_refused_and_changes_nothing(tmp_path, told: object) -> None:
    source, target, path = model(), model(), tmp_path / "gn.pth"
    with torch.no_grad():
        source[0].weight.add_(1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    save_weights(path, source.state_dict(), {NORM_EPS: told})
    with pytest.raises(UserError, match="'norm_eps' is not the eps of each norm"):
        load_weights(target, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert target[1].eps == 1e-5
    assert read_checkpoint(path).metadata[NORM_EPS] == told
