"""A ResNet-20 that tells how many quarter turns a window of a COCO photo was turned (Gidaris et al. 2018).

The label costs nothing, so that a few dozen photos give as many real, labelled crops as are wanted.
"""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.conversion import crops, models
from gn_detect.layers import make_norm

from .cells import Cell

UPDATE = 16
"""Images in one update of the weights, of 16 workers to one."""

GROUPS = 8
"""Of ``GN`` by default: the first stage has 16 channels."""

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 1e-4
UPDATES, QUICK_UPDATES = 1500, 40
TRAIN_WINDOWS, VAL_WINDOWS = 4000, 1000
SIZE = 32


def error_of(cell: Cell, shared: Path, quick: bool) -> dict[str, float]:
    """Train and measure: ``{"error": ...}``, the percentage of val windows of which the turn is not found."""
    torch.manual_seed(cell.seed)
    model = models.CifarResNet(20, norm=partial(_norm, cell), classes=4)
    folder = shared / "data" / "coco80"
    images = _windows(folder, "train", TRAIN_WINDOWS)
    _train(model, images, cell, QUICK_UPDATES if quick else UPDATES)
    model.eval()
    unseen = _windows(folder, "val", VAL_WINDOWS)
    wrong = 0
    with torch.no_grad():
        for turns in range(4):
            found = torch.cat(
                [model(part).argmax(1) for part in torch.rot90(unseen, turns, (2, 3)).split(64)]
            )
            wrong += int((found != turns).sum())
    return {"error": 100 * wrong / (4 * len(unseen))}


class BatchNormOfWorkers(nn.BatchNorm2d):
    """BatchNorm as several workers compute it, each on its own ``batch`` images, all in one pass.

    (N, C, H, W) holds the images of the first worker, then those of the second, and so on. The running
    statistics are the first worker's, as DistributedDataParallel keeps them.
    """

    def __init__(self, channels: int, batch: int) -> None:
        super().__init__(channels)
        self.batch = batch

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        channels, pixels = input.shape[1], input.shape[2:]
        workers = len(input) // self.batch
        # Every worker's channels become channels of their own.
        apart = input.view(workers, self.batch, channels, *pixels).transpose(0, 1)
        mean, var = self.running_mean.repeat(workers), self.running_var.repeat(workers)
        weight, bias = self.weight.repeat(workers), self.bias.repeat(workers)
        apart = apart.reshape(self.batch, -1, *pixels)
        apart = F.batch_norm(apart, mean, var, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean[:channels])
        self.running_var.copy_(var[:channels])
        return apart.view(self.batch, workers, channels, *pixels).transpose(0, 1).reshape(input.shape)


def _norm(cell: Cell, channels: int) -> nn.Module:
    if cell.norm == "BN":
        return BatchNormOfWorkers(channels, cell.batch)
    groups = channels // cell.group_size if cell.group_size else min(cell.groups or GROUPS, channels)
    norm = make_norm(cell.norm, channels, groups)
    assert norm is not None
    return norm


def _train(model: nn.Module, images: Tensor, cell: Cell, updates: int) -> None:
    generator = torch.Generator().manual_seed(cell.seed)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * update / updates))
        chosen = images[torch.randint(len(images), (UPDATE,), generator=generator)]
        labels = torch.randperm(UPDATE, generator=generator) % 4
        batch = torch.stack(
            [torch.rot90(image, turns, (1, 2)) for image, turns in zip(chosen, labels.tolist(), strict=True)]
        )
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()


@cache
def _windows(folder: Path, part: str, count: int) -> Tensor:
    """Normalised windows of the photos; cutting them takes as long as some trainings."""
    return (crops.windows(crops.Photos(folder, part), SIZE, count).float() / 255 - 0.45) / 0.25
