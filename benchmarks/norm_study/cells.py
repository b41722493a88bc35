"""What the study consists of: one training for each task, norm, number of images per worker and seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["classifier", "detector"]

NORMS = ("BN", "FrozenBN", "GN", "GN1", "IN")
"""As the config's ``NORM`` keys name them; ``GN1`` is the paper's LN."""

BATCHES = (1, 2, 4, 8, 16)
"""Images per worker: over so many a norm may look."""

GROUPS = (2, 4, 8, 16)
"""Numbers of groups besides 1 (``GN1``), the default (``GN``) and one for each channel (``IN``)."""

GROUP_SIZES = (2, 4, 8, 16)
"""Channels in a group, the other half of the paper's table 3."""

GROUP_SEEDS = 2
"""Of the groups, at most; with a third the whole study would take two cores more than 8 hours."""


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        batch: images per worker. A classifier's update is of 16 images, whose other workers are simulated, a
            detector's of one worker.
        groups: of ``GN``; 0 for the task's default.
        group_size: channels in each group of ``GN`` instead; 0 for none.
    """

    task: Task
    norm: str
    batch: int
    seed: int
    groups: int = 0
    group_size: int = 0

    @property
    def name(self) -> str:
        """Its key in ``results.json``."""
        split = (
            f"_groups{self.groups}" if self.groups else f"_size{self.group_size}" if self.group_size else ""
        )
        return f"{self.task}_{self.norm}{split}_batch{self.batch}_seed{self.seed}"


def depends_on_batch(task: Task, norm: str) -> bool:
    """Whether the images per worker change anything but rounding.

    A classifier's update is of as many images whatever one worker holds, so only BN makes a difference; a
    detector's is of its one worker's.
    """
    return task == "detector" or norm == "BN"


def plan(tasks: list[Task], seeds: int) -> list[Cell]:
    """All cells, those that tell most first, so that an unfinished study still answers its first questions.

    Of every seed: BN and GN with any number of images per worker and every norm with 2. Then one seed after
    the other, so that no part of the tables waits for all seeds of another: the group study with 2 images per
    worker, which a group norm does not see, and the detectors of the other norms, which do not look at the
    batch either, with 1, 4, 8 and 16.
    """
    telling, rest = [], []
    for seed in range(1, seeds + 1):
        main = [
            Cell(task, norm, batch, seed)
            for task in tasks
            for batch in BATCHES
            for norm in NORMS
            if batch == 2 or depends_on_batch(task, norm)
        ]
        telling += [cell for cell in main if cell.norm in ("BN", "GN") or cell.batch == 2]
        if seed <= GROUP_SEEDS:
            rest += [Cell(task, "GN", 2, seed, groups=number) for task in tasks for number in GROUPS]
            rest += [Cell(task, "GN", 2, seed, group_size=size) for task in tasks for size in GROUP_SIZES]
        rest += [cell for cell in main if cell not in telling]
    return telling + rest


def quick_plan(tasks: list[Task]) -> list[Cell]:
    """A few, to see that everything works; their figures mean nothing."""
    return [
        Cell(task, norm, batch, 1)
        for task in tasks
        for norm in ("BN", "GN")
        for batch in (1, 2)
        if batch == 2 or depends_on_batch(task, norm)
    ]
