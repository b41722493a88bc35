"""The units and cells of the study, in the order in which they answer most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

RATES = (0.00125, 0.003, 0.0075, 0.02)
"""Learning rates of one image, from the paper's (0.02 for 16 images) to a rate at which frozen BN fails."""

PRETRAINED_RATES = (0.003, 0.0075, 0.02, 0.00125)
"""The same in the order in which they are tried."""

START, SHORT, MIDDLE, LONG = 60, 150, 450, 1350
"""Iterations; the first for the search for causes of a slow start."""


@dataclass(frozen=True)
class Cell:
    """One fine-tuning, or with 0 iterations the test of its start.

    Attributes:
        fold: names training and test images, see :mod:`.data`.
        source: seed of the source, which is trained on the fold's training images.
        arm: of :mod:`.arms`.
        rate: learning rate for each image of a batch.
        seed: of the fine-tuning.
    """

    fold: str
    source: int
    arm: str
    rate: float = 0.0
    iterations: int = SHORT
    images: int = 1
    seed: int = 1

    @property
    def unit(self) -> str:
        """Name of the file of results: all cells of one source."""
        return f"{self.fold}-source{self.source}"

    @property
    def name(self) -> str:
        """Its key there."""
        if not self.iterations:
            return f"{self.arm}, start"
        plural = "" if self.images == 1 else "s"
        return (
            f"{self.arm}, rate {self.rate:g}, {self.iterations} iterations, {self.images} image{plural}, "
            f"seed {self.seed}"
        )


REFERENCE, CONVERTED = "frozen BN", "GN, calibrated"
"""The two arms of the main comparison."""

MATCHED = "GN, matched"

HEADS_ALONE = "frozen BN, GN in FPN and heads"
"""With the heads of the second, and the backbone of the first."""

SOURCES = (1, 2, 3)


def development(arms: Sequence[str], rates: Sequence[float], fold: str) -> list[Cell]:
    """Return the cells of arms on a development fold: each arm's start, then its rates."""
    found = []
    for arm in arms:
        found.append(Cell(fold, 1, arm, iterations=0))
        found += [Cell(fold, 1, arm, rate) for rate in rates]
    return found


def final(arms: Sequence[str], rates: Mapping[str, float]) -> list[Cell]:
    """Return the cells of the final protocol, one source of each half in turn.

    All arms with 450 iterations and 1 image; then the two of the main comparison with 150 and 1350
    iterations, and with 2 images.

    Args:
        rates: the arms' learning rates, chosen on development folds.
    """
    cells: list[Cell] = []
    if not {REFERENCE, CONVERTED} <= rates.keys():
        return cells
    for source, fold in product(SOURCES, ("A", "B")):
        cells += [Cell(fold, source, arm, rates[arm], MIDDLE) for arm in arms]
        for arm in (REFERENCE, CONVERTED):
            cells.append(Cell(fold, source, arm, rates[arm], SHORT))
            cells.append(Cell(fold, source, arm, rates[arm], MIDDLE, images=2))
        cells += [Cell(fold, source, arm, rates[arm], LONG) for arm in (REFERENCE, CONVERTED)]
    return cells


def stained(rates: Mapping[str, float]) -> list[Cell]:
    """Return the cells of the transfer from fluorescence to stained images: five folds, three sources."""
    return [
        Cell(f"stained{fold}", source, arm, rates[arm], MIDDLE, seed=source)
        for source, fold, arm in product(SOURCES, range(1, 6), (REFERENCE, CONVERTED))
    ]


def pretrained(rates: Mapping[str, float]) -> list[Cell]:
    """Return the cells of fine-tunings from ImageNet's backbone: the paper's comparison, then the other arms.

    Args:
        rates: the arms' learning rates, in the order of the arms.
    """
    main = [arm for arm in (REFERENCE, HEADS_ALONE, MATCHED) if arm in rates]
    others = [arm for arm in rates if arm not in main]
    runs = list(product(SOURCES, ("imagenetA", "imagenetB")))
    found = [Cell(f, 1, arm, rates[arm], MIDDLE, seed=s) for s, f in runs for arm in main]
    found += [Cell(f, 1, arm, rates[arm], MIDDLE, seed=s) for s, f in runs for arm in others]
    for iterations, images in ((LONG, 1), (SHORT, 1), (MIDDLE, 2)):
        found += [
            Cell(f, 1, arm, rates[arm], iterations, images, seed=s)
            for s, f in runs
            for arm in main
            if arm != HEADS_ALONE
        ]
    return found
