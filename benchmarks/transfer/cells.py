"""The units and cells of the study, in the order in which they answer most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

RATES = (0.0002, 0.0005, 0.00125, 0.003, 0.0075, 0.02)
"""Learning rates of one image; the third is the paper's, 0.02 for 16 images."""

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


REFERENCE, CONVERTED, MATCHED = "frozen BN", "GN, calibrated", "GN, matched"

WHOLE = (MATCHED, "GN, distilled", CONVERTED)
"""Arms with a converted GN everywhere; the main comparison is of the best one and frozen BN."""

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


def final(rates: Mapping[str, float], best: str | None) -> list[Cell]:
    """Return the cells of the final protocol, one source of each half in turn.

    The main comparison comes first: 450 iterations with 1 image, then 1350 and 150 iterations, then 2 images;
    then the other arms with 450 iterations and 1 image.

    Args:
        rates: the arms' learning rates, chosen on a development fold.
        best: the converted arm that did best there.
    """
    if best is None or REFERENCE not in rates:
        return []
    runs = list(product(SOURCES, ("A", "B")))
    found = [
        Cell(fold, source, arm, rates[arm], iterations, images)
        for iterations, images in ((MIDDLE, 1), (LONG, 1), (SHORT, 1), (MIDDLE, 2))
        for source, fold in runs
        for arm in (REFERENCE, best)
    ]
    others = [arm for arm in rates if arm not in (REFERENCE, best)]
    return found + [Cell(f, source, arm, rates[arm], MIDDLE) for source, f in runs for arm in others]


def stained(rates: Mapping[str, float], best: str | None) -> list[Cell]:
    """Return the cells of the transfer from fluorescence to stained images: five folds, three sources."""
    if best is None or REFERENCE not in rates:
        return []
    return [
        Cell(f"stained{fold}", source, arm, rates[arm], MIDDLE, seed=source)
        for source, fold, arm in product(SOURCES, range(1, 6), (REFERENCE, best))
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
