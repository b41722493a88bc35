"""The bootstrap over images: its average precision is COCO's, and its intervals contain the truth."""

from __future__ import annotations

import time

import numpy as np
import pytest

from gn_detect.evaluation import (
    Evaluators,
    Ranked,
    average_precision,
    draw_images,
    evaluate_results,
    interval,
    prepare_detections,
    prepare_ground_truth,
)
from tests.evaluation.synthetic import make_detection, random_data


def ranked_of(truth: dict, detections: list[dict], kind: str, backend: str) -> dict[tuple[int, int], Ranked]:
    prepared = prepare_ground_truth(truth, kind)
    return Evaluators(prepared, prepare_detections(detections, prepared, [kind]), backend).ranked(kind)


def means(ranked: dict[tuple[int, int], Ranked], draws: np.ndarray) -> np.ndarray:
    """Return (R, 4) AP in percent of all areas, small, medium and large."""
    found = []
    for area in range(4):
        values = [average_precision(r, draws) for (_, own), r in ranked.items() if own == area]
        per_category = np.stack([value.mean(axis=1) for value in values])
        with np.errstate(invalid="ignore"):
            number = (~np.isnan(per_category)).sum(axis=0)
            found.append(np.where(number > 0, np.nansum(per_category, axis=0) / number, np.nan) * 100)
    return np.stack(found, axis=1)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_all_images_once_give_cocos_numbers(seed: int, kind: str, backend: str) -> None:
    """With crowds, ties, empty images, and more than 100 detections in one."""
    truth, detections = random_data(seed)
    image = truth["images"][3]["id"]
    random = np.random.default_rng(seed)
    for x, y in random.integers(0, 80, (130, 2)).tolist():
        detections.append(make_detection(image, 3, [x, y, 30, 30], round(float(random.random()), 2)))
    ranked = ranked_of(truth, detections, kind, backend)
    ours = means(ranked, np.ones((1, len(truth["images"])), dtype=np.int32))[0]
    expected = evaluate_results(truth, detections, kind, backend)
    assert ours == pytest.approx(
        [expected[name] for name in ("AP", "APs", "APm", "APl")], abs=1e-9, nan_ok=True
    )


def test_resamples_have_the_numbers_of_datasets_with_repeated_images() -> None:
    """Without equal scores: their order depends on the images' ids."""
    truth, detections = random_data(5)
    for number, detection in enumerate(detections):
        detection["score"] = 0.9 - 0.7 * number / len(detections)
    ids = sorted(image["id"] for image in truth["images"])
    draws = draw_images(len(ids), 8, seed=3)
    ours = means(ranked_of(truth, detections, "bbox", "hotcoco"), draws)
    for row, drawn in zip(ours, draws, strict=True):
        copies = {image_id: range(int(count)) for image_id, count in zip(ids, drawn, strict=True)}
        repeated = {
            "categories": truth["categories"],
            "images": [i | {"id": i["id"] + 1000 * c} for i in truth["images"] for c in copies[i["id"]]],
            "annotations": [
                a | {"id": a["id"] + 1000 * c, "image_id": a["image_id"] + 1000 * c}
                for a in truth["annotations"]
                for c in copies[a["image_id"]]
            ],
        }
        found = [
            d | {"image_id": d["image_id"] + 1000 * c} for d in detections for c in copies[d["image_id"]]
        ]
        expected = evaluate_results(repeated, found, "bbox", "pycocotools")
        assert row == pytest.approx([expected[n] for n in ("AP", "APs", "APm", "APl")], abs=1e-9, nan_ok=True)


def simulated(random: np.random.Generator, images: int, skills: tuple[float, float]) -> list[Ranked]:
    """Two detectors on the same images: objects are hard to different degrees, and false positives random."""
    objects = random.integers(0, 4, images)
    owner = np.repeat(np.arange(images), objects)
    ease = random.normal(0, 1, images)[owner] + random.normal(0, 0.5, len(owner))
    found = []
    for skill in skills:
        false = np.repeat(np.arange(images), random.poisson(1.5, images))
        seen = ease + random.normal(0, 0.7, len(owner)) + skill > 0
        scores = np.concatenate([random.normal(1 + ease[seen] / 2, 0.5), random.normal(0.3, 0.6, len(false))])
        places, hits = np.concatenate([owner[seen], false]), np.arange(len(scores)) < seen.sum()
        order = np.argsort(-scores, kind="stable")
        nothing = np.zeros((1, len(scores)), dtype=bool)
        found.append(Ranked(places[order], hits[order][None], nothing, objects))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("skills", [(0.5, 0.5), (0.4, 0.8)])
def test_intervals_of_95_percent_contain_the_truth_in_95_percent(skills: tuple[float, float]) -> None:
    """In 93 to 97 of 100 datasets; the truth is the difference on 400,000 images."""
    random = np.random.default_rng(1)

    def difference(pair: list[Ranked], draws: np.ndarray) -> np.ndarray:
        first, second = (average_precision(ranked, draws)[:, 0] for ranked in pair)
        return second - first

    many = 400_000
    truth = float(difference(simulated(random, many, skills), np.ones((1, many), dtype=np.int32))[0])
    inside, repeats = 0, 1000
    for _ in range(repeats):
        low, high = interval(difference(simulated(random, 200, skills), draw_images(200, 500)))
        inside += low <= truth <= high
    assert 0.93 <= inside / repeats <= 0.97


@pytest.mark.slow
def test_1000_resamples_of_5000_images_take_seconds() -> None:
    random = np.random.default_rng(0)
    draws = draw_images(5000, 1000)
    begin = time.process_time()
    for _ in range(8):  # of 8 categories at one threshold: 125,000 detections
        average_precision(simulated(random, 5000, (0.5, 0.5))[0], draws)
    assert time.process_time() - begin < 20


def test_draws_have_as_many_images_and_follow_the_seed() -> None:
    draws = draw_images(30, 9, seed=1)
    assert draws.sum(axis=1).tolist() == [30] * 9
    assert np.array_equal(draws, draw_images(30, 9, seed=1))
    assert not np.array_equal(draws, draw_images(30, 9, seed=2))


def test_nothing_to_find_is_nan() -> None:
    nothing = np.zeros((2, 0), dtype=bool)
    empty = Ranked(np.empty(0, np.int64), nothing, nothing, np.zeros(3, np.int64))
    assert np.isnan(average_precision(empty, draw_images(3, 5))).all()
    some = Ranked(np.empty(0, np.int64), nothing, nothing, np.array([1, 0, 0]))
    assert average_precision(some, np.ones((1, 3), np.int32)).tolist() == [[0, 0]]
