"""Learning rates, computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gn_detect.config import Config, load_config
from gn_detect.engine import learning_rate_factor
from gn_detect.engine.optimizer import set_learning_rate


def config(**solver: object) -> Config:
    keys = {
        "BASE_LR": 0.1,
        "MAX_ITER": 100,
        "STEPS": "(60, 80)",
        "WARMUP_ITERS": 10,
        "WARMUP_FACTOR": 0.1,
    } | solver
    return load_config(None, [str(item) for key, value in keys.items() for item in (f"SOLVER.{key}", value)])


@pytest.mark.parametrize(
    ("iteration", "factor"),
    [
        (0, 0.1),
        (1, 0.19),
        (5, 0.55),
        (9, 0.91),
        (10, 1.0),
        (59, 1.0),
        (60, 0.1),
        (79, 0.1),
        (80, 0.01),
        (99, 0.01),
    ],
)
def test_steps_after_linear_warm_up(iteration: int, factor: float) -> None:
    assert learning_rate_factor(config(), iteration) == pytest.approx(factor, rel=1e-12)


def test_constant_warm_up() -> None:
    cfg = config(WARMUP_METHOD="constant")
    assert [learning_rate_factor(cfg, i) for i in (0, 9, 10)] == [0.1, 0.1, 1.0]


def test_no_warm_up() -> None:
    assert learning_rate_factor(config(WARMUP_ITERS=0), 0) == 1.0


@pytest.mark.parametrize("iteration", [0, 4, 10, 50, 99])
def test_cosine_ends_at_its_end_and_warms_up_onto_the_curve(iteration: int) -> None:
    cfg = config(LR_SCHEDULER_NAME="WarmupCosineLR", BASE_LR_END=0.01)

    def curve(i: int) -> float:
        return 0.1 + 0.9 * (1 + math.cos(math.pi * i / 100)) / 2

    expected = curve(iteration) if iteration >= 10 else 0.1 + (curve(10) - 0.1) * iteration / 10
    assert learning_rate_factor(cfg, iteration) == pytest.approx(expected, rel=1e-12)


def test_warm_up_is_cut_to_the_length_of_the_run() -> None:
    """As in detectron2: the line then ends at the value after all steps."""
    cfg = config(WARMUP_ITERS=1000, STEPS="(200,)")
    assert learning_rate_factor(cfg, 50) == pytest.approx(0.55)


def test_each_group_keeps_its_own_rate() -> None:
    a, b = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    groups = [{"params": [a], "lr": 1.0, "initial_lr": 1.0}, {"params": [b], "lr": 2.0, "initial_lr": 2.0}]
    optimizer = torch.optim.SGD(groups)
    for factor in (0.5, 0.25):
        set_learning_rate(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == [factor, 2 * factor]
