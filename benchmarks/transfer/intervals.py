"""Intervals of a paired difference over slides, sources and seeds.

A run's AP depends on the images that it is tested on, on its source and on its seed. Two arms share all
three: of each pair of runs the difference counts. Slides are many, and AP is no mean over them, so they are
resampled. Sources are few, and a bootstrap over three of them is too narrow, so their part follows Student's
t: the variances of the mean over the resamples and over the sources are added (with Welch and Satterthwaite's
degrees of freedom). A source's seeds are averaged first, as they share the source.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .matches import Matches

RESAMPLES = 400  # for a variance, not for quantiles: 400 give it to 7%
QUANTILE = 0.975


@dataclass(frozen=True, eq=False)
class Images:
    """Images that runs are tested on.

    Attributes:
        objects: (I,) objects in each image.
        slide: (I,) number of each image's slide.
        seed: of the resamples; other images need another one.
    """

    objects: np.ndarray
    slide: np.ndarray
    seed: int = 0

    def resamples(self, count: int) -> np.ndarray:
        """Return how often each image counts when slides are drawn with replacement, (count, I)."""
        number = int(self.slide.max()) + 1
        random = np.random.default_rng(self.seed)
        drawn = random.multinomial(number, np.full(number, 1 / number), size=count)
        return drawn[:, self.slide].astype(float)


@dataclass(frozen=True)
class Pair:
    """Two runs of one source and seed; ``fold`` names their test set."""

    fold: str
    source: str
    first: Matches
    second: Matches


@dataclass(frozen=True)
class Difference:
    """The mean difference of AP, second minus first, and its 95% interval; ``over`` says over what."""

    value: float
    low: float
    high: float
    pairs: int
    over: str

    @property
    def decided(self) -> bool:
        """Return whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def difference(pairs: Sequence[Pair], tests: dict[str, Images], resamples: int = RESAMPLES) -> Difference:
    """Return the difference of two arms. Folds weigh alike, and within a fold its sources.

    With one source alone the seeds take the sources' part: the interval then holds for this source only.
    """
    folds: dict[str, list[Pair]] = {}
    for pair in pairs:
        folds.setdefault(pair.fold, []).append(pair)
    units = {pair.source for pair in pairs}
    over = "slides"
    if len(units) > 1:
        over += ", sources"
    elif len(pairs) > 1:
        over += ", seeds"
    values: list[list[float]] = []
    samples: np.ndarray = np.zeros(resamples)
    for fold, members in sorted(folds.items()):
        test = tests[fold]
        by_unit: dict[str, list[Pair]] = {}
        for position, pair in enumerate(members):
            by_unit.setdefault(pair.source if len(units) > 1 else str(position), []).append(pair)
        values.append([float(np.mean([_gain(p, test) for p in group])) for group in by_unit.values()])
        for group in by_unit.values():
            part = len(folds) * len(by_unit) * len(group)
            for pair in group:
                first, second = (resampled(m, test, resamples) for m in (pair.first, pair.second))
                samples += (second - first) / part
    value = float(np.mean([np.mean(found) for found in values]))
    return _interval(value, float(samples.var(ddof=1)), values, len(pairs), over)


@cache
def resampled(matches: Matches, images: Images, count: int) -> np.ndarray:
    """Return AP on resampled slides, (count,); all runs on these images have the same resamples."""
    return np.array([matches.average_precision(images.objects, w) for w in images.resamples(count)])


def _gain(pair: Pair, test: Images) -> float:
    return pair.second.average_precision(test.objects) - pair.first.average_precision(test.objects)


def _interval(
    value: float, by_slides: float, values: Sequence[Sequence[float]], pairs: int, over: str
) -> Difference:
    freedom = sum(len(found) - 1 for found in values)
    by_units = 0.0
    if freedom > 0:
        pooled = sum(float(np.var(found, ddof=1)) * (len(found) - 1) for found in values if len(found) > 1)
        by_units = pooled / freedom * sum(1 / len(found) for found in values) / len(values) ** 2
    total = by_slides + by_units
    # The resamples' variance counts as known.
    degrees = math.inf if by_units == 0 else freedom * (total / by_units) ** 2
    half = student_quantile(degrees) * math.sqrt(total)
    return Difference(value, value - half, value + half, pairs, over)


def student_quantile(degrees: float) -> float:
    """Return the 97.5% quantile of Student's t, for any number of degrees of freedom.

    SciPy is no dependency here: the distribution function is integrated with Simpson's rule, and the quantile
    found by halving.
    """
    if degrees > 1e6:
        return 1.959963984540054
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(
        degrees * math.pi
    )

    def below(t: float) -> float:
        # With t = sqrt(n) tan(a) the density becomes constant * sqrt(n) * cos(a)^(n - 1): bounded, smooth.
        angles = np.linspace(0.0, math.atan(t / math.sqrt(degrees)), 2001)
        heights = np.cos(angles) ** (degrees - 1)
        weights = np.ones(len(angles))
        weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
        step = angles[1] - angles[0]
        return 0.5 + constant * math.sqrt(degrees) * float(weights @ heights) * step / 3

    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < QUANTILE else (low, middle)
    return high
