"""The cost of errors, computed by hand; score thresholds and calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gn_detect.evaluation import (
    ERRORS,
    Evaluators,
    diagnose,
    evaluate_results,
    prepare_detections,
    prepare_ground_truth,
)
from gn_detect.evaluation.diagnosis import best_threshold, calibration
from tests.evaluation.synthetic import make_detection, random_data

A, B = 1, 2
HALF = 100 * 51 / 101  # AP of a perfect half of the recall: COCO averages over 101 recalls
PLACE, OTHER, FAR = [0, 0, 40, 40], [60, 60, 40, 40], [100, 0, 40, 40]
NEAR = [0, 20, 40, 40]  # an IoU of 1/3 with PLACE

Object = tuple[int, list[int]]
Found = tuple[int, list[int], float]


def find_errors(
    objects: list[Object], found: list[Found], kind: str = "bbox", crowd: tuple[int, ...] = ()
) -> dict[str, dict[str, Any]]:
    """Return the errors of one image."""
    entries = [make_detection(1, category, box, score) for category, box, score in found]
    annotations = [
        {**make_detection(1, category, box, 0), "id": i, "area": 1600, "iscrowd": int(i in crowd)}
        for i, (category, box) in enumerate(objects, start=1)
    ]
    truth = {
        "images": [{"id": 1, "height": 120, "width": 160}],
        "categories": [{"id": A, "name": "a"}, {"id": B, "name": "b"}],
        "annotations": annotations,
    }
    return diagnosis_of(truth, entries, kind)["errors"]


def diagnosis_of(truth: dict, entries: list[dict], kind: str, backend: str = "hotcoco") -> dict[str, Any]:
    prepared = prepare_ground_truth(truth, kind)
    table = prepare_detections(entries, prepared, [kind])
    return diagnose(prepared, table, Evaluators(prepared, table, backend), kind)


CASES: dict[str, tuple[list[Object], list[Found], dict[str, tuple[int, float]]]] = {
    "another class": (
        [(A, PLACE), (B, OTHER)],
        [(A, PLACE, 0.9), (A, OTHER, 0.8)],
        {"classification": (1, 50.0)},
    ),
    "a box in the wrong place": ([(A, PLACE)], [(A, NEAR, 0.9)], {"localisation": (1, 100.0)}),
    "the wrong class and place": (
        [(B, PLACE), (A, OTHER)],
        [(A, NEAR, 0.9), (A, OTHER, 0.8)],
        {"both": (1, 25.0), "missed": (1, 50.0)},
    ),
    "two detections of one object": (
        [(A, PLACE), (A, OTHER)],
        [(A, PLACE, 0.9), (A, PLACE, 0.8), (A, OTHER, 0.7)],
        {"duplicate": (1, 100 - 100 * (51 + 50 * 2 / 3) / 101)},
    ),
    "nothing there": ([(A, PLACE)], [(A, FAR, 0.9), (A, PLACE, 0.8)], {"background": (1, 50.0)}),
    "not found": ([(A, PLACE), (A, OTHER)], [(A, PLACE, 0.9)], {"missed": (1, 100 - HALF)}),
    "a class that is never detected": (
        [(A, PLACE), (B, OTHER)],
        [(A, PLACE, 0.9)],
        {"missed": (1, 50.0)},
    ),
    "no object has two mended errors": (
        [(A, PLACE)],
        [(A, NEAR, 0.9), (A, NEAR, 0.8)],
        {"localisation": (2, 100.0)},
    ),
    "the object of a misplaced box is found": (
        [(A, PLACE), (A, OTHER)],
        [(A, NEAR, 0.9), (A, PLACE, 0.8)],
        # The misplaced box is removed: half of the recall at precision 1 instead of 1/2.
        {"localisation": (1, HALF / 2), "missed": (1, 50 - HALF / 2)},
    ),
}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("case", CASES)
def test_hand_made_errors(case: str, kind: str) -> None:
    objects, found, expected = CASES[case]
    errors = find_errors(objects, found, kind)
    assert list(errors) == list(ERRORS)
    for name in ERRORS:
        count, lost = expected.get(name, (0, 0.0))
        assert (errors[name]["count"], errors[name]["AP50_lost"]) == (count, pytest.approx(lost)), name


def test_crowds_are_neither_found_nor_missed() -> None:
    errors = find_errors(
        [(A, PLACE), (A, OTHER)], [(A, OTHER, 0.9), (A, OTHER, 0.8), (A, PLACE, 0.7)], crowd=(2,)
    )
    assert [row["count"] for row in errors.values()] == [0] * 6


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_all_backends_agree_and_no_kind_costs_more_than_is_lost(kind: str, backend: str) -> None:
    for seed in range(3):
        truth, entries = random_data(seed)
        found = diagnosis_of(truth, entries, kind, backend)
        assert found == diagnosis_of(truth, entries, kind, "pycocotools")
        lost = 100 - evaluate_results(truth, entries, kind)["AP50"]
        for row in found["errors"].values():
            assert -1e-9 <= row["AP50_lost"] <= lost + 1e-9
            assert row["count"] > 0 or row["AP50_lost"] == 0


def test_without_detections_everything_is_missed() -> None:
    errors = find_errors([(A, PLACE), (B, OTHER)], [])
    assert errors["missed"] == {"count": 2, "AP50_lost": 100.0}
    assert np.isnan(find_errors([], [(A, FAR, 0.9)])["background"]["AP50_lost"])


def test_the_best_threshold_by_trying_all() -> None:
    random = np.random.default_rng(0)
    scores = random.random(200).round(2)  # ties
    hits = random.random(200) < scores
    best = best_threshold(scores, hits, 150)
    assert best is not None

    def f1(score: float) -> float:
        kept = scores >= score
        return 200 * hits[kept].sum() / (kept.sum() + 150)

    values = {score: f1(score) for score in scores}
    assert best["F1"] == pytest.approx(max(values.values()))
    assert best["score"] == max(s for s, value in values.items() if value == max(values.values()))
    kept = scores >= best["score"]
    assert best["precision"] == pytest.approx(100 * hits[kept].mean())
    assert best["recall"] == pytest.approx(100 * hits[kept].sum() / 150)
    assert best_threshold(scores, np.zeros(200, dtype=bool), 150) is None


def test_calibration_of_scores_that_are_right_and_of_others() -> None:
    random = np.random.default_rng(0)
    scores = random.random(20000)
    right = calibration(scores, random.random(20000) < scores)
    assert right["error"] < 2
    assert sum(each["count"] for each in right["bins"]) == 20000
    # Half of the score: on average 25 percentage points too much, in the last bin 47.5.
    bold = calibration(scores, random.random(20000) < scores / 2)
    assert bold["error"] == pytest.approx(25, abs=1)
    last = bold["bins"][-1]
    assert 100 * last["score"] - last["precision"] == pytest.approx(47.5, abs=3)
    assert calibration(np.ones(1), np.ones(1, dtype=bool))["bins"][-1]["count"] == 1
    assert calibration(np.empty(0), np.empty(0, dtype=bool))["error"] is None


def test_thresholds_are_those_of_each_class() -> None:
    truth, entries = random_data(1)
    found = diagnosis_of(truth, entries, "segm")
    assert list(found["thresholds"]) == ["kind 1", "kind 3", "kind 4", "kind 90"]
    for category, best in zip((1, 3, 4, 90), found["thresholds"].values(), strict=True):
        alone = {**truth, "categories": [c for c in truth["categories"] if c["id"] == category]}
        alone["annotations"] = [a for a in truth["annotations"] if a["category_id"] == category]
        own = [entry for entry in entries if entry["category_id"] == category]
        assert diagnosis_of(alone, own, "segm")["threshold"] == best
