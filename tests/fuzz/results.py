"""Seeded damage to COCO result files, and to the ground truth that they are compared with."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

from gn_detect.errors import UserError
from gn_detect.evaluation import evaluate_results
from gn_detect.evaluation.backends import BACKENDS, choose_backend
from tests.fuzz.annotations import Content, mutate, write_base
from tests.fuzz.damage import damage_text, damage_tree, dumps, junk, remove, replace_file
from tests.fuzz.limits import Case
from tests.fuzz.trial import Tally


def prepare_results(folder: Path) -> Case:
    """Damaged result files through the evaluation of boxes and of masks, by each backend in turn."""
    base = write_base(folder)
    found = detections_of(base)
    backends = [name for name in BACKENDS if _is_installed(name)]

    def case(seed: int, tally: Tally) -> None:
        chance = random.Random(seed)
        annotations, results = folder / "annotations.json", folder / "results.json"
        for path in (annotations, results):
            remove(path)
        annotations.write_bytes(dumps(base))
        kind = _write(results, found, chance)
        if chance.random() < 0.1:
            text = mutate(base, seed)[1]
            annotations.write_bytes(
                text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            )
        backend = backends[seed % len(backends)]
        tally.cases += 1
        label = f"results {seed} ({kind}, {backend})"
        outcomes = [
            tally.attempt(f"{label}, {iou_type}", evaluate_results, annotations, results, iou_type, backend)
            for iou_type in ("bbox", "segm")
        ]
        tally.refused += any(isinstance(outcome, UserError) for outcome in outcomes)
        tally.passed += all(isinstance(outcome, dict) for outcome in outcomes)
        for outcome in outcomes:
            if isinstance(outcome, dict) and not all(
                value != value or 0 <= value <= 100.001 for value in outcome.values()
            ):
                tally.failures.append(f"{label}: wrong success: {outcome}")

    return case


def _is_installed(backend: str) -> bool:
    try:
        return choose_backend(backend) == backend
    except UserError:
        return False


def detections_of(content: Content) -> list[dict[str, Any]]:
    """One for each object, a little aside."""
    found = []
    for number, entry in enumerate(content["annotations"]):
        x, y, width, height = entry["bbox"]
        found.append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": [x + number % 3, y, width, height],
                "score": 0.9 - 0.05 * number,
                "segmentation": copy.deepcopy(entry["segmentation"]),
            }
        )
    return found


def _write(path: Path, found: list[dict[str, Any]], chance: random.Random) -> str:
    """Damaged; returns how."""
    kind = chance.random()
    if kind < 0.06:
        return replace_file(path, chance)
    if kind < 0.25:
        path.write_bytes(damage_text(json.dumps(found).encode(), chance))
        return "text"
    found = copy.deepcopy(found)
    if kind < 0.5:
        path.write_bytes(dumps(damage_tree(found, chance)))
        return "tree"
    name = chance.choice(list(KINDS))
    KINDS[name](found, chance)
    path.write_bytes(dumps(found))
    return name


def _entry(key: str, *values: Any) -> Any:
    """Other values at one key of one detection, or of all."""

    def change(found: list[dict[str, Any]], chance: random.Random) -> None:
        value = chance.choice(values)
        for entry in found if chance.random() < 0.3 else [chance.choice(found)]:
            entry[key] = copy.deepcopy(value)

    return change


def _mask(change: Any) -> Any:
    def apply(found: list[dict[str, Any]], chance: random.Random) -> None:
        change([e["segmentation"] for e in found if isinstance(e["segmentation"], dict)], chance)

    return apply


def _many(found: list[dict[str, Any]], chance: random.Random) -> None:
    found *= chance.choice([200, 2000])


def _of_other_data(found: list[dict[str, Any]], chance: random.Random) -> None:
    for entry in found:
        entry["image_id"] += chance.choice([1, 1000])


def _as_annotations(found: list[dict[str, Any]], chance: random.Random) -> None:
    for number, entry in enumerate(found):
        del entry["score"]
        entry |= {"id": number, "iscrowd": 0, "area": 9}


def _counts(masks: list[dict[str, Any]], chance: random.Random) -> None:
    text = [m for m in masks if isinstance(m["counts"], str)]
    chance.choice(text)["counts"] = chance.choice(
        [
            "1M2",
            "1M2" * 5000,
            "0" * 10,
            "oooooooo0",
            "P" * 2000,
            "0n",
            "é",
            "\0",
            "1" * 100_000,
            "_o_o_o0",
            "nnnnn0",
        ]
    )


def _size(masks: list[dict[str, Any]], chance: random.Random) -> None:
    chance.choice(masks)["size"] = chance.choice(
        [
            [10**9, 10**9],
            [-5, 80],
            [64, float("inf")],
            ["64", "80"],
            [64.5, 80],
            [0, 0],
            64,
            None,
            [64, 80, 3],
            [2**70, 1],
            [10**400, 1],
        ]
    )


def _runs(masks: list[dict[str, Any]], chance: random.Random) -> None:
    lists = [m for m in masks if isinstance(m["counts"], list)]
    chance.choice(lists)["counts"] = chance.choice(
        [
            [2**40, -(2**40)],
            [5120],
            ["5120"],
            [5120.0],
            [2**64],
            [None],
            [[5120]],
            [0] * 10**6,
            [float("nan")],
            {"a": 1},
        ]
    )


_LONG = [[0, 0, 1e6, 1e6] * 5000]
_ZIGZAG = [[value for i in range(2000) for value in (0 if i % 2 else 9e5, i)]]

KINDS: dict[str, Any] = {
    "score": _entry(
        "score", "0.5", "x", None, float("nan"), float("inf"), -1, 7, 10**400, [], {}, True, 1e308
    ),
    "image": _entry("image_id", "11", 11.0, 11.5, None, -1, 999, [], {}, True, "\n\x1b[2J", 10**400),
    "category": _entry("category_id", "3", 3.0, 0, None, -1, 99, [], {}, False, 10**400),
    "box": _entry(
        "bbox",
        ["1", "2", "3", "4"],
        [1, 2, -3, 4],
        [1, 2, 3],
        [0] * 5,
        [10**400] * 4,
        [float("nan")] * 4,
        "1234",
        None,
        {},
        [[1], [2], [3], [4]],
        [1e300] * 4,
        [0, 0, 0, 0],
        {"x": 1},
    ),  # fmt: skip
    "polygon": _entry(
        "segmentation",
        [1, 2, 30, 2, 30, 40],
        [[[1, 2], [30, 2], [30, 40]]],
        [["1", "2", "30", "2", "30", "40"]],
        [[]],
        [[1, 2]],
        [[1, 2, 3, 4, 5, 6, 7]],
        _LONG,
        _ZIGZAG,
        [[float("nan")] * 6],
        [[10**400] * 6],
        [[1e5] * 8],
        [[None] * 6],
        [[[[[1]]]]],
        "x",
        5,
        None,
        [[True] * 6],
    ),  # fmt: skip
    "counts": _mask(_counts),
    "size": _mask(_size),
    "runs": _mask(_runs),
    "no-box": lambda found, chance: [entry.pop("bbox") for entry in found] and None,
    "no-mask": lambda found, chance: [entry.pop("segmentation") for entry in found] and None,
    "entry": lambda found, chance: found.insert(chance.randrange(len(found)), junk(chance)),
    "many": _many,
    "other-data": _of_other_data,
    "annotations": _as_annotations,
}
"""Each is one that a tool, or an accident, has led to."""
