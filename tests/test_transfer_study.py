"""The transfer study's bookkeeping and statistics; its trainings run by hand."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.transfer import cells, plan, slides
from benchmarks.transfer.arms import ARMS, CAUSES, PARTS, Arm, Conversion
from benchmarks.transfer.data import annotations_of, divide, folds, read_slides, slides_of
from benchmarks.transfer.intervals import Images, Pair, difference, student_quantile
from benchmarks.transfer.matches import Matches, count_objects, match
from benchmarks.transfer.training import gradient_factors


@pytest.fixture
def nuclei(shared_dir: Path) -> Path:
    return shared_dir / "data" / "dsb2018"


def test_slides_are_those_of_the_images(nuclei: Path) -> None:
    assert slides.group(nuclei) == read_slides()


def test_no_slide_is_trained_on_and_tested_on(nuclei: Path) -> None:
    known, found = read_slides(), folds(nuclei)
    parts = {"dev": 3, "small": 3, "young": 3, "stained": 5}
    assert set(found) == {
        "A",
        "B",
        *(f"{name}{i + 1}" for name, count in parts.items() for i in range(count)),
        *("imagenetA", "imagenetB", "imagenetdev1"),
    }
    for fold in found.values():
        trained = {known[name] for name in (*fold.source, *fold.train)}
        assert fold.test
        assert not trained & {known[name] for name in fold.test}
    assert found["A"].train == found["B"].test
    assert found["B"].train == found["A"].test
    assert len(found["A"].train) + len(found["B"].train) == len(known) == 194
    for number in (1, 2, 3):
        fold = found[f"dev{number}"]
        assert {*fold.train, *fold.test} == {*found["A"].train}
    for names in (["A", "B"], ["dev1", "dev2", "dev3"], [f"stained{i}" for i in range(1, 6)]):
        for one, other in combinations(names, 2):
            assert not set(found[one].test) & set(found[other].test)
    assert sum(len(found[f"stained{i}"].test) for i in range(1, 6)) == 33
    for name in ("A", "B", "dev1"):
        assert found[f"imagenet{name}"].test == found[name].test


def test_slides_are_spread_by_kind() -> None:
    pictures = [slides.Picture(f"{n:02}", (256, 256, "dark" if n < 12 else "bright")) for n in range(18)]
    known = {picture.name: int(picture.name) // 2 for picture in pictures}
    parts = divide(pictures, known, 3)
    assert [len(part) for part in parts] == [6, 6, 6]
    assert all(sum(int(name) < 12 for name in part) == 4 for part in parts)
    assert divide(pictures[::-1], known, 3) == parts


def test_arms_differ_only_in_norms() -> None:
    norms = {key for key, _ in PARTS.values()} | {"MODEL.GN.NUM_GROUPS", "MODEL.GN.MIN_CHANNELS_PER_GROUP"}
    for name, arm in (ARMS | CAUSES).items():
        assert set(arm.config_keys()) <= norms, name
    assert set(Arm().config_keys().values()) == {"FrozenBN"}
    heads = Arm(conversion=Conversion(("backbone",))).config_keys()
    assert heads["MODEL.RESNETS.NORM"] == "GN"
    assert {heads[key] for key, _ in list(PARTS.values())[1:]} == {"FrozenBN"}
    conversions = {arm.conversion for arm in (ARMS | CAUSES).values() if arm.conversion}
    assert len({conversion.name for conversion in conversions}) == len(conversions)


def test_every_source_has_the_same_cells() -> None:
    rates = dict.fromkeys(ARMS, 0.005)
    found = cells.final(rates, "GN, matched")
    assert len({(cell.unit, cell.name) for cell in found}) == len(found)
    names = {unit: [c.name for c in found if c.unit == unit] for unit in dict.fromkeys(c.unit for c in found)}
    assert list(names) == [f"{fold}-source{i}" for i in (1, 2, 3) for fold in ("A", "B")]
    assert len({tuple(part) for part in names.values()}) == 1
    assert {cell.arm for cell in found} == set(ARMS)
    assert len(cells.stained(rates, "GN, matched")) == 5 * 3 * 2
    for some in (rates, {"frozen BN": 0.003, "GN, matched": 0.0075}):
        found = cells.pretrained(some)
        assert {cell.arm for cell in found} <= set(some)
        assert len({(cell.unit, cell.name) for cell in found}) == len(found)
    for study in (plan.rate_cells(), plan.cause_cells()):
        assert len({(cell.unit, cell.name) for cell in study}) == len(study)
    assert set(plan.CAUSE_ARMS) <= {*ARMS, *CAUSES}


def test_a_rate_is_chosen_when_its_neighbours_did_worse(tmp_path: Path) -> None:
    assert plan.chosen_rates(tmp_path, plan.rate_cells()) == {}
    grid = [cells.Cell("fold", 1, "arm", rate) for rate in (0.001, 0.002, 0.004, 0.008)]
    for aps, expected in (
        ((1, 3), {}),
        ((1, 3, 2), {"arm": 0.002}),
        ((3, 1), {"arm": 0.001}),
        ((1, 2, 3), {}),
    ):
        done = {cell.name: {"AP": ap} for cell, ap in zip(grid, aps, strict=False)}
        (tmp_path / "fold-source1.json").write_text(json.dumps(done))
        assert plan.chosen_rates(tmp_path, grid) == expected
    assert plan.cells("final", tmp_path) == plan.cells("stained", tmp_path) == []


def _truth(objects: int, images: int = 3) -> dict[str, object]:
    boxes = [[20.0 * j, 10.0, 10.0, 10.0] for j in range(objects)]
    annotations = [
        {
            "id": 1 + i * objects + j,
            "image_id": 7 - i,
            "category_id": 1,
            "bbox": box,
            "area": 100.0,
            "iscrowd": 0,
            "segmentation": _rectangle(box),
        }
        for i in range(images)
        for j, box in enumerate(boxes)
    ]
    return {
        "images": [{"id": 7 - i, "height": 64, "width": 128} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "nucleus"}],
    }


def _rectangle(box: list[float]) -> list[list[float]]:
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _detections(truth: dict[str, object], seed: int) -> list[dict[str, object]]:
    random = np.random.default_rng(seed)
    found = []
    for annotation in truth["annotations"]:  # type: ignore[attr-defined]
        for _ in range(2):
            box = (np.array(annotation["bbox"]) + random.normal(0, 1.5, 4)).clip(1).tolist()
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": 1,
                    "score": float(random.random()),
                    "bbox": box,
                    "segmentation": _rectangle(box),
                }
            )
    return found


def test_average_precision_is_cocos() -> None:
    from gn_detect.evaluation.coco import evaluate_results

    truth = _truth(5)
    found = _detections(truth, 1)
    matches = match(truth, found)
    expected = evaluate_results(truth, found, "segm", "pycocotools")["AP"]
    # Scores are stored in 16 bits; no two of them are that close here.
    assert matches.average_precision(count_objects(truth)) == pytest.approx(expected, abs=1e-6)
    assert 5 < expected < 95
    read = Matches.from_text(matches.to_text())
    for one, other in zip(vars(read).values(), vars(matches).values(), strict=True):
        assert (one == other).all()
    assert match(truth, []).average_precision(count_objects(truth)) == 0


def test_a_resample_counts_images_as_often_as_it_says() -> None:
    truth = _truth(4)
    twice = _truth(4, images=6)
    found = _detections(truth, 2)
    repeated = found + [{**entry, "image_id": entry["image_id"] - 3} for entry in found]  # type: ignore[operator]
    weighted = match(truth, found).average_precision(count_objects(truth), np.full(3, 2.0))
    assert weighted == pytest.approx(match(truth, found).average_precision(count_objects(truth)))
    assert match(twice, repeated).average_precision(count_objects(twice)) == pytest.approx(weighted, abs=2.0)


def test_student_quantiles() -> None:
    # Tables of Student's t, two-sided 95%.
    for degrees, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042), (1e9, 1.960)):
        assert student_quantile(degrees) == pytest.approx(quantile, abs=1e-3)


def _run(quality: np.ndarray, images: Images, random: np.random.Generator) -> Matches:
    """Return detections whose part of true positives is ``quality``, (I,), at every threshold."""
    image = np.repeat(np.arange(len(quality)), images.objects)
    hits = random.random(len(image)) < quality[image]
    return Matches.of(image, random.permutation(len(image)), np.repeat(hits[:, None], 10, 1))


def test_an_interval_covers_the_true_difference() -> None:
    """Two arms of equal quality, with noise by slide, by source and by run: 95% of the intervals hold 0."""
    random = np.random.default_rng(1)
    images = Images(np.full(24, 5), np.arange(24) // 2)
    covered = []
    for _ in range(60):
        pairs = []
        slide = random.normal(0, 0.05, (2, 12))
        for source in range(3):
            shift = random.normal(0, 0.06, 2)
            one, other = (
                _run((0.6 + slide[arm][images.slide] + shift[arm]).clip(0, 1), images, random)
                for arm in (0, 1)
            )
            pairs.append(Pair("A", str(source), one, other))
        found = difference(pairs, {"A": images}, resamples=30)
        covered.append(found.low <= 0 <= found.high)
        assert found.over == "slides, sources"
    # The standard deviation of this mean is 0.03.
    assert np.mean(covered) >= 0.88


def test_an_interval_finds_a_difference() -> None:
    random = np.random.default_rng(2)
    images = Images(np.full(24, 8), np.arange(24) // 2)
    pairs = [
        Pair("A", str(source), *(_run(np.full(24, q), images, random) for q in (0.4, 0.8)))
        for source in range(3)
    ]
    found = difference(pairs, {"A": images}, resamples=60)
    assert found.decided
    assert 25 < found.value < 60
    same = difference([Pair("A", "1", pairs[0].first, pairs[0].first)], {"A": images}, resamples=60)
    assert (same.value, same.low, same.high, same.over) == (0, 0, 0, "slides")


def test_scaled_gradients_move_a_channel_as_before_balancing() -> None:
    before, after = nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(3, 2, 1, bias=False)
    scales = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        after.weight.copy_(before.weight * scales[:, None, None, None])
    ((parameter, factor),) = gradient_factors(after, before)
    assert parameter is after.weight
    torch.testing.assert_close(factor.flatten(), scales.square())


def test_slides_are_numbered_without_gaps(nuclei: Path) -> None:
    truth = annotations_of(nuclei, folds(nuclei)["A"].test)
    numbers = slides_of(truth)
    assert sorted(set(numbers.tolist())) == list(range(int(numbers.max()) + 1))
    assert count_objects(truth).sum() == len(truth["annotations"])
    assert not any(annotation["iscrowd"] for annotation in truth["annotations"])
