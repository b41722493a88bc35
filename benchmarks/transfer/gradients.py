"""Measure how fast a start can learn: its loss after one step along the mean gradient of some images.

A fine-tuning's AP differs from run to run by a point. The loss after one step is exact: all arms see the same
images, with the same random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gn_detect.engine.run import Run, prepare
from gn_detect.engine.step import seed_iteration
from gn_detect.layers import is_norm
from gn_detect.structures import Sample

from .arms import Arm
from .cells import Cell
from .training import Place, remedies, schedule_keys, start_weights

IMAGES = 16
STEPS = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Lengths of the step as learning rates. With a momentum of 0.9 an image's gradient counts ten times."""


def measure(place: Place, source: int, name: str, arm: Arm, seed: int) -> dict[str, Any]:
    """Return the loss on other images before and after steps, and the gradient's parts.

    ``seed`` draws both sets of images. ``noise`` is the mean square of the single images' gradients over the
    square of their mean: 1 if all agree, the number of images if they are independent. ``parts`` are the
    shares of the square, by kind of parameter.
    """
    weights = start_weights(place, source, arm.conversion)
    keys = schedule_keys(1, 0.005, 1000, seed) | arm.config_keys() | {"MODEL.WEIGHTS": str(weights)}
    run = prepare(place.config(place.fold.train, keys), False)
    batches = iter(run.loader)
    seen, others = ([next(batches) for _ in range(IMAGES)] for _ in range(2))
    trained: list[Tensor] = [p for p in run.model.parameters() if p.requires_grad]
    squares = 0.0
    total = [torch.zeros_like(p) for p in trained]
    with remedies(run, arm, place, Cell(place.name, source, name)) as forward:
        for number, batch in enumerate(seen):
            run.state.optimizer.zero_grad()
            loss(run, batch, number, forward).backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
            squares += sum(float(g.square().sum()) for g in gradients) / IMAGES
            torch._foreach_add_(total, gradients, alpha=1 / IMAGES)
    before = mean_loss(run, others)
    after = {}
    with torch.no_grad():
        for step in STEPS:
            torch._foreach_add_(trained, total, alpha=-step)
            after[f"{step}"] = mean_loss(run, others)
            torch._foreach_add_(trained, total, alpha=step)
    whole = sum(float(g.square().sum()) for g in total)
    parts: dict[str, float] = {}
    position = {p: i for i, p in enumerate(trained)}
    for module_name, module in run.model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter in position:
                kind = part_of(module_name, module)
                share = float(total[position[parameter]].square().sum()) / whole
                parts[kind] = parts.get(kind, 0.0) + share
    return {
        "before": before,
        "after": after,
        "square": round(whole, 4),
        "noise": round(squares / whole, 2),
        "parts": {kind: round(share, 3) for kind, share in parts.items()},
    }


def part_of(name: str, module: nn.Module) -> str:
    """Return the part of the detector that a module belongs to, norms apart."""
    part = "backbone" if ".bottom_up." in name else "FPN" if "fpn" in name else "heads"
    return f"{part}, norms" if is_norm(module) else part


def loss(run: Run, batch: Sequence[Sample], number: int, forward: Any = None) -> Tensor:
    """Return the sum of the losses, with random numbers that depend on ``number`` alone."""
    seed_iteration(1, number, 0)
    images, targets = [sample.image for sample in batch], [sample.target for sample in batch]
    return torch.stack(list((forward or run.model)(images, targets).values())).sum()


@torch.no_grad()
def mean_loss(run: Run, batches: Sequence[Sequence[Sample]]) -> float:
    """Return the mean loss of some batches."""
    found = [float(loss(run, batch, number)) for number, batch in enumerate(batches)]
    return round(sum(found) / len(found), 4)
