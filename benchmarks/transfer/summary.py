"""Means and intervals of all results, for the tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from . import plan
from .arms import ARMS
from .cells import CONVERTED, HEADS_ALONE, LONG, MATCHED, MIDDLE, REFERENCE, SHORT, Cell
from .data import annotations_of, folds, slides_of
from .intervals import Difference, Images, Pair, difference
from .matches import Matches, count_objects
from .pretrained import PRETRAINED

SETTINGS = ((SHORT, 1), (MIDDLE, 1), (MIDDLE, 2), (LONG, 1))
"""Iterations and images of the final protocol."""

Records = dict[Cell, dict[str, Any]]


def summarise(data: Path, results: Path) -> dict[str, Any]:
    """Return the rows of each table as JSON values."""
    known = folds(data)
    tests: dict[str, Images] = {}

    def images(cells: Sequence[Cell]) -> dict[str, Images]:
        for fold in {cell.fold for cell in cells} - tests.keys():
            truth = annotations_of(data, known[fold].test)
            # Its place, so that other results do not change a fold's resampling.
            tests[fold] = Images(count_objects(truth), slides_of(truth), list(known).index(fold))
        return tests

    def compare(done: Records, first: list[Cell], second: list[Cell]) -> dict[str, Any] | None:
        return as_json(pair_up(done, first, second), images([*first, *second]))

    done = {study: read(results, study) for study in plan.STUDIES}
    return {
        "rates": rate_rows(done["rates"]),
        "pretrained-rates": rate_rows(done["pretrained-rates"]),
        "causes": cause_rows(done["causes"], compare),
        **{
            study: [
                row
                for iterations, count in SETTINGS
                for row in setting_rows(done[study], iterations, count, compare)
            ]
            for study in ("final", "pretrained")
        },
        "stained": setting_rows(done["stained"], MIDDLE, 1, compare),
        "rates-best": best_rows(done["rates"], compare),
        "pretrained-best": best_rows(done["pretrained-rates"], compare),
    }


def read(results: Path, study: str) -> Records:
    """Return the records of a study's cells that are done."""
    found: Records = {}
    files: dict[str, Any] = {}
    for cell in plan.cells(study, results):
        path = results / study / f"{cell.unit}.json"
        if cell.unit not in files:
            files[cell.unit] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if cell.name in files[cell.unit]:
            found[cell] = files[cell.unit][cell.name]
    return found


def pair_up(done: Records, first: Sequence[Cell], second: Sequence[Cell]) -> list[Pair]:
    """Return the pairs of runs with one fold, source and seed."""
    other = {(cell.fold, cell.source, cell.seed): cell for cell in second}
    pairs = []
    for cell in first:
        key = (cell.fold, cell.source, cell.seed)
        if key in other:
            texts = (done[cell]["matches"], done[other[key]]["matches"])
            pairs.append(Pair(cell.fold, str(cell.source), *map(read_matches, texts)))
    return pairs


@cache
def read_matches(text: str) -> Matches:
    """Return the matches of a record, the same object each time: intervals keep what they computed of it."""
    return Matches.from_text(text)


def as_json(pairs: Sequence[Pair], tests: dict[str, Images]) -> dict[str, Any] | None:
    """Return a difference as JSON values, None without pairs."""
    if not pairs:
        return None
    found: Difference = difference(pairs, tests)
    values = {key: round(getattr(found, key), 2) for key in ("value", "low", "high")}
    return {**values, "pairs": found.pairs, "over": found.over}


def rate_rows(done: Records) -> list[dict[str, Any]]:
    """Return each arm's AP by rate."""
    rows = []
    for arm in dict.fromkeys(cell.arm for cell in done):
        own = {cell: record["AP"] for cell, record in done.items() if cell.arm == arm}
        start = next((ap for cell, ap in own.items() if not cell.iterations), None)
        rows.append({"arm": arm, "start": start, "AP": {c.rate: ap for c, ap in own.items() if c.iterations}})
    return rows


def best_rows(done: Records, compare: Any) -> list[dict[str, Any]]:
    """Return each arm at its best rate on the development fold, next to frozen BN and a rescaled GN."""
    best: dict[str, Cell] = {}
    for cell, record in done.items():
        if cell.iterations and (cell.arm not in best or record["AP"] > done[best[cell.arm]]["AP"]):
            best[cell.arm] = cell
    rows = []
    for arm, cell in best.items():
        row: dict[str, Any] = {"arm": arm, "rate": cell.rate, "AP": [done[cell]["AP"]]}
        row["loss"] = done[cell]["losses"][-1]
        for name in (REFERENCE, CONVERTED):
            if arm != name and name in best:
                row[f"against {name}"] = compare(done, [best[name]], [cell])
        rows.append(row)
    return rows


def cause_rows(done: Records, compare: Any) -> list[dict[str, Any]]:
    """Return each arm at each rate, next to the arms of the main comparison at the same rate."""
    groups: dict[tuple[str, float], list[Cell]] = {}
    for cell in done:
        if cell.iterations:
            groups.setdefault((cell.arm, cell.rate), []).append(cell)
    rows = []
    for (arm, rate), cells in groups.items():
        start = next((r["AP"] for c, r in done.items() if c.arm == arm and not c.iterations), None)
        row: dict[str, Any] = {"arm": arm, "rate": rate, "start": start}
        row["loss"] = round(fmean(fmean(done[cell]["losses"]) for cell in cells), 3)
        row["AP"] = [done[cell]["AP"] for cell in cells]
        for name in (REFERENCE, CONVERTED):
            if arm != name:
                row[f"against {name}"] = compare(done, groups.get((name, rate), []), cells)
        rows.append(row)
    return rows


def setting_rows(done: Records, iterations: int, images: int, compare: Any) -> list[dict[str, Any]]:
    """Return each arm's AP with one schedule, and its difference to frozen BN."""
    own = {
        arm: [c for c in done if (c.arm, c.iterations, c.images) == (arm, iterations, images)]
        for arm in dict.fromkeys([*ARMS, *PRETRAINED])
    }
    rows = []
    for arm, cells in own.items():
        if cells:
            row: dict[str, Any] = {"arm": arm, "iterations": iterations, "images": images}
            row |= {"rate": cells[0].rate, "AP": [done[cell]["AP"] for cell in cells]}
            if arm != REFERENCE:
                row[f"against {REFERENCE}"] = compare(done, own[REFERENCE], cells)
            if arm in (MATCHED, CONVERTED):
                row[f"against {HEADS_ALONE}"] = compare(done, own[HEADS_ALONE], cells)
            rows.append(row)
    return rows


def in_words(found: dict[str, Any]) -> str:
    """Return the summary as lines."""
    lines = []
    for study, rows in found.items():
        lines += [f"{study}:", *(f"  {json.dumps(row)}" for row in rows)]
    return "\n".join(lines)
