"""The cells of each study, from what the studies before it found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import cells as cell_lists
from .arms import ARMS
from .cells import (
    CONVERTED,
    HEADS_ALONE,
    MATCHED,
    MIDDLE,
    PRETRAINED_RATES,
    RATES,
    REFERENCE,
    SHORT,
    WHOLE,
    Cell,
)
from .pretrained import PRETRAINED

STUDIES = ("rates", "causes", "final", "stained", "pretrained-rates", "pretrained")

CAUSE_SEEDS = (1, 2, 3)

CAUSE_ARMS = (
    "frozen BN",
    "GN, matched",
    "GN, balanced",
    "GN, balanced, scaled gradients",
    "GN, matched, annealed",
    "GN in the backbone, matched",
    "GN in FPN and heads, matched",
    "GN, matched, relative eps",
    "GN, calibrated",
    "GN, calibrated, scaled gradients",
    "GN, calibrated, relative eps",
    "GN, calibrated, distilled",
    "GN, matched, one group",
    "GN, matched, 32 groups",
)
"""Those without a calibration first: they take less time."""

GRADIENT_FOLDS = ("small1", "young1")
GRADIENT_ARMS = ("frozen BN", "GN, matched", "GN, balanced", "GN, balanced, scaled gradients")

FIRST = (REFERENCE, *WHOLE)
"""Arms whose rates are sought first."""


def cells(study: str, results: Path) -> list[Cell]:
    """Return the cells of a study, those that answer most first.

    ``final`` and ``stained`` need the results of ``rates``, and ``pretrained`` those of ``pretrained-rates``;
    arms without are left out.
    """
    if study == "rates":
        return rate_cells()
    if study == "causes":
        return cause_cells()
    if study == "pretrained-rates":
        return pretrained_rate_cells()
    if study == "pretrained":
        return cell_lists.pretrained(chosen_rates(results / "pretrained-rates", pretrained_rate_cells()))
    rates = chosen_rates(results / "rates", rate_cells())
    best = best_converted(results / "rates", rates)
    if study == "final":
        return cell_lists.final(rates, best)
    return cell_lists.stained(rates, best)


def rate_cells() -> list[Cell]:
    """Return the grid of rates of all arms of the final protocol."""
    ordered = [*FIRST, *(arm for arm in ARMS if arm not in FIRST)]
    return cell_lists.development(ordered, RATES, "dev1")


def cause_cells() -> list[Cell]:
    """Return the arms of the search for causes at half the resolution, one seed after the other."""
    found = []
    for seed in CAUSE_SEEDS:
        for arm in CAUSE_ARMS:
            if seed == CAUSE_SEEDS[0]:
                found.append(Cell("small1", 1, arm, iterations=0))
            # The lower rates of the grid are too low to show anything in so few iterations.
            found += [Cell("small1", 1, arm, rate, cell_lists.START, seed=seed) for rate in RATES[3:]]
    return found


def pretrained_rate_cells() -> list[Cell]:
    """Return the grid of rates of all arms that start from ImageNet's backbone.

    After 150 iterations mask AP is below 3, with every arm and rate, so the grid has 450.
    """
    ordered = [MATCHED, REFERENCE, HEADS_ALONE, CONVERTED]
    ordered += [name for name in PRETRAINED if name not in ordered]
    return [Cell("imagenetdev1", 1, arm, rate, MIDDLE) for arm in ordered for rate in PRETRAINED_RATES]


def best_converted(results: Path, rates: Mapping[str, float]) -> str | None:
    """Return the converted arm with the highest AP on the development fold, None if none has a rate."""
    cells = [Cell("dev1", 1, arm, rates[arm], SHORT) for arm in WHOLE if arm in rates]
    if not cells:
        return None
    done = json.loads((results / f"{cells[0].unit}.json").read_text("utf-8"))
    return max(cells, key=lambda cell: float(done[cell.name]["AP"])).arm


def chosen_rates(results: Path, grid: Sequence[Cell]) -> dict[str, float]:
    """Return the rate with the highest AP on the development fold, of each arm whose next rates did worse."""
    path = results / f"{grid[0].unit}.json"
    done = json.loads(path.read_text("utf-8")) if path.exists() else {}
    rates = sorted({cell.rate for cell in grid if cell.iterations})
    found: dict[str, dict[float, float]] = {}
    for cell in grid:
        if cell.iterations and cell.name in done:
            found.setdefault(cell.arm, {})[cell.rate] = done[cell.name]["AP"]
    chosen = {}
    for arm, aps in found.items():
        best = rates.index(max(aps, key=lambda rate: aps[rate]))
        if aps.keys() >= {*rates[max(best - 1, 0) : best + 2]}:
            chosen[arm] = rates[best]
    return chosen
