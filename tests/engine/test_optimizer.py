"""Parameter groups, clipping and restoring."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gn_detect.config import Config, load_config
from gn_detect.engine import build_optimizer
from gn_detect.engine.optimizer import clip_gradients, restore_optimizer
from gn_detect.errors import UserError
from gn_detect.layers import make_norm


def config(*overrides: object) -> Config:
    return load_config(None, ["SOLVER.BASE_LR", "0.1", *map(str, overrides)])


class Net(nn.Module):
    """A convolution with each kind of norm after it, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.norms = nn.ModuleDict(
            {n: make_norm(n, 8, 4) for n in ("BN", "SyncBN", "FrozenBN", "GN", "GN1", "IN", "LN")}
        )
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)


def settings(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) by parameter name."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_norms_do_not_decay_by_default() -> None:
    model = Net()
    found = settings(build_optimizer(config(), model), model)
    assert found["conv.weight"] == found["conv.bias"] == (0.1, 1e-4)
    norms = {name: value for name, value in found.items() if name.startswith("norms.")}
    assert len(norms) == 12
    assert set(norms.values()) == {(0.1, 0.0)}
    assert not any(name.startswith(("frozen.", "norms.FrozenBN")) for name in found)


def test_groups_are_few() -> None:
    assert len(build_optimizer(config(), Net()).param_groups) == 2


def test_bias_options_apply_to_norms_too() -> None:
    model = Net()
    cfg = config(
        "SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.WEIGHT_DECAY_BIAS", 0.5, "SOLVER.WEIGHT_DECAY_NORM", 0.25
    )
    found = settings(build_optimizer(cfg, model), model)
    assert found["conv.weight"] == (0.1, 1e-4)
    assert found["conv.bias"] == found["norms.GN.bias"] == (0.2, 0.5)
    assert found["norms.GN.weight"] == (0.1, 0.25)


def test_shared_parameters_are_counted_once() -> None:
    layer = nn.Linear(2, 2)
    optimizer = build_optimizer(config(), nn.ModuleList([layer, layer]))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 2


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_steps_of_sgd_by_hand(nesterov: bool) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    cfg = config("SOLVER.NESTEROV", nesterov, "SOLVER.MOMENTUM", 0.5, "SOLVER.WEIGHT_DECAY", 0.2)
    optimizer = build_optimizer(cfg, model)
    weight, momentum = 1.0, 0.0
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        gradient = 1.0 + 0.2 * weight
        momentum = 0.5 * momentum + gradient
        weight -= 0.1 * (gradient + 0.5 * momentum if nesterov else momentum)
        assert model.weight.item() == pytest.approx(weight, rel=1e-6)


def test_adamw_is_chosen_by_name() -> None:
    optimizer = build_optimizer(config("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BETAS", "(0.8, 0.9)"), Net())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("value", [[1.0, -1.0], [0.5, 0.0]]),
        ("norm", [[0.6, -0.8], [0.5, 0.0]]),
        ("full_model", [[3 / 5.025, -4 / 5.025], [0.5 / 5.025, 0.0]]),
    ],
)
def test_clipping(kind: str, expected: list[list[float]]) -> None:
    """``value`` limits elements, ``norm`` each parameter, ``full_model`` all together."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, -4.0]), torch.tensor([0.5, 0.0])
    cfg = config("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind)
    clip_gradients(cfg, parameters)
    for parameter, values in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, torch.tensor(values), atol=1e-4, rtol=1e-4)


def test_no_clipping_by_default() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), 100.0)
    clip_gradients(config(), [parameter])
    assert float(parameter.grad) == 100.0


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_restored_optimizer_goes_on_as_before_with_the_configs_rates(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    cfg = config("SOLVER.OPTIMIZER", name)
    optimizer = build_optimizer(cfg, model)

    def step(net: nn.Module, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        net(torch.ones(1, 4, 5, 5)).square().sum().backward()
        opt.step()

    step(model, optimizer)
    twin = copy.deepcopy(model)
    other = build_optimizer(cfg, twin)
    restore_optimizer(other, optimizer.state_dict(), "file.pth")
    step(model, optimizer)
    step(twin, other)
    assert torch.equal(model.weight, twin.weight)
    slower = build_optimizer(cfg.replace({"SOLVER.BASE_LR": 0.01}), twin)
    restore_optimizer(slower, optimizer.state_dict(), "file.pth")
    assert {g["lr"] for g in slower.param_groups} == {0.01}


@pytest.mark.parametrize("other", [nn.Conv2d(4, 4, 1), nn.Linear(2, 2)])
def test_state_of_another_model_is_refused(other: nn.Module) -> None:
    model = nn.Conv2d(4, 4, 3)
    optimizer = build_optimizer(config(), model)
    model(torch.ones(1, 4, 3, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="file.pth"):
        restore_optimizer(build_optimizer(config(), other), optimizer.state_dict(), "file.pth")


def test_state_of_another_kind_of_optimizer_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(config(), model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="file.pth"):
        restore_optimizer(
            build_optimizer(config("SOLVER.OPTIMIZER", "AdamW"), model), optimizer.state_dict(), "file.pth"
        )


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_state_that_is_no_optimizers_is_refused(optimizer: str) -> None:
    model = nn.Linear(3, 2)
    states: list[object] = [
        5, [1], {"0": {}}, {0: 5}, {0: None}, {-1: {}}, {99: {}}, {True: {}}, {0: {"x": torch.zeros(2, 3)}},
        {0: {"momentum_buffer": torch.zeros(2)}}, {0: {"exp_avg": torch.zeros(2, 3)}},
        {0: {"momentum_buffer": torch.zeros(2, 3).to_sparse()}},
        {0: {"momentum_buffer": torch.zeros(2, 3, dtype=torch.complex64)}},
    ]  # fmt: skip
    for state in states:
        mine = build_optimizer(config("SOLVER.OPTIMIZER", optimizer), model)
        with pytest.raises(UserError, match="the optimiser state in file.pth belongs to other settings"):
            restore_optimizer(mine, {"state": state}, "file.pth")
