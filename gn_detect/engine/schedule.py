"""The learning rate as a function of the iteration alone: there is no state to save or to restore."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..config import Config


def learning_rate_factor(cfg: Config, iteration: int) -> float:
    """What ``SOLVER.BASE_LR`` is multiplied by at an iteration, counted from 0; detectron2's numbers.

    Warm-up goes over ``WARMUP_ITERS`` iterations (at most ``MAX_ITER``) from ``WARMUP_FACTOR`` in a straight
    line to the schedule's value at its end, or stays at ``WARMUP_FACTOR`` where the method is ``constant``.
    """
    solver = cfg.solver
    warmup = min(solver.warmup_iters, solver.max_iter)
    if iteration >= warmup:
        return _schedule(cfg, iteration)
    if solver.warmup_method == "constant":
        return solver.warmup_factor
    return solver.warmup_factor + (_schedule(cfg, warmup) - solver.warmup_factor) * iteration / warmup


def _schedule(cfg: Config, iteration: int) -> float:
    """The factor without warm-up: steps, or half a cosine from 1 to ``BASE_LR_END / BASE_LR``."""
    solver = cfg.solver
    if solver.lr_scheduler_name == "WarmupMultiStepLR":
        return solver.gamma ** bisect_right(solver.steps, iteration)
    end = solver.base_lr_end / solver.base_lr
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * iteration / solver.max_iter))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate becomes its ``initial_lr`` times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
