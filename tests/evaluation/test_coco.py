"""COCO's numbers: the known ones, and those of pycocotools from every evaluator."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gn_detect.evaluation import METRICS, evaluate_kinds, evaluate_results, format_results
from tests.evaluation.synthetic import make_detection, random_data


def by_pycocotools(truth: dict, detections: list[dict], iou_type: str, tmp_path: Path) -> list[float]:
    """The reference as everybody runs it: files, ``loadRes``, ``summarize``."""
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    reference = COCO(str(path))
    other = "segmentation" if iou_type == "bbox" else "bbox"
    found = reference.loadRes([{k: v for k, v in d.items() if k != other} for d in detections])
    evaluator = COCOeval(reference, found, iou_type)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats.tolist()


def assert_equal_to_pycocotools(truth: dict, detections: list[dict], backend: str, tmp_path: Path) -> None:
    expected = {kind: by_pycocotools(truth, detections, kind, tmp_path) for kind in ("bbox", "segm")}
    assert_equal({kind: evaluate_results(truth, detections, kind, backend) for kind in expected}, expected)
    assert_equal(evaluate_kinds(truth, detections, backend=backend), expected)


def assert_equal(found: dict[str, dict[str, float]], expected: dict[str, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for kind, numbers in found.items():
        ours = [numbers[name] / 100 for name in METRICS]
        ours = [-1.0 if math.isnan(value) else value for value in ours]
        assert ours == pytest.approx(expected[kind], abs=1e-9), kind


def test_known_numbers(backend: str, shared_dir: Path) -> None:
    folder = shared_dir / "data/cocoapi_fake45"
    expected = json.loads((folder / "expected_pycocotools.json").read_text())
    for iou_type in ("bbox", "segm"):
        numbers = evaluate_results(
            folder / "annotations/instances_val.json",
            folder / f"results/fake{iou_type}_results.json",
            iou_type,
            backend,
        )
        for name, value in expected[iou_type].items():
            assert numbers[name] / 100 == pytest.approx(value, abs=1e-9)
        for name, value in expected[f"{iou_type}_AP_per_category"].items():
            assert numbers[f"AP-{name}"] / 100 == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    "backend", ["hotcoco", "faster_coco_eval", pytest.param("pycocotools", marks=pytest.mark.slow)]
)
def test_numbers_of_detectron2(backend: str, shared_dir: Path) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    oracle = shared_dir / "oracles/dsb_r18_gn"
    expected = json.loads((oracle / "results.json").read_text())
    for iou_type in ("bbox", "segm"):
        numbers = evaluate_results(
            shared_dir / "data/dsb2018/annotations/instances_val.json",
            oracle / "coco_instances_results.json",
            iou_type,
            backend,
        )
        for name in ("AP", "AP50", "AP75", "APs", "APm"):
            assert numbers[name] == pytest.approx(expected[iou_type][name], abs=0.02)
        assert math.isnan(numbers["APl"])
        assert math.isnan(expected[iou_type]["APl"])


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("dsb2018", "coco_person1")]


@pytest.fixture(scope="module", params=["coco80", *OTHERS])
def moved(
    request: pytest.FixtureRequest, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, list[dict], dict[str, list[float]]]:
    """Real ground truth, its objects moved a little as detections, and pycocotools' numbers of them."""
    truth = json.loads((shared_dir / f"data/{request.param}/annotations/instances_val.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    random = np.random.default_rng(0)
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    detections = []
    for annotation in truth["annotations"]:
        height, width = sizes[annotation["image_id"]]
        mask = np.roll(coco.annToMask(annotation), random.integers(-3, 4, 2), axis=(0, 1))
        rle = coco_mask.encode(np.asfortranarray(mask))
        detections.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": [
                    value + shift
                    for value, shift in zip(annotation["bbox"], random.normal(0, 3, 4), strict=True)
                ],
                "score": round(float(random.random()), 2),
                "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
            }
        )
    folder = tmp_path_factory.mktemp("moved")
    return (
        truth,
        detections,
        {kind: by_pycocotools(truth, detections, kind, folder) for kind in ("bbox", "segm")},
    )


@pytest.mark.parametrize("backend", ["hotcoco", "faster_coco_eval"])
def test_real_ground_truth_moved_a_little(
    moved: tuple[dict, list[dict], dict[str, list[float]]], backend: str
) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    truth, detections, expected = moved
    assert_equal(evaluate_kinds(truth, detections, backend=backend), expected)


@pytest.mark.parametrize("seed", range(4))
def test_crowds_ties_empty_images_and_gaps_in_ids(seed: int, backend: str, tmp_path: Path) -> None:
    assert_equal_to_pycocotools(*random_data(seed), backend, tmp_path)


@pytest.mark.slow
def test_500_random_datasets(tmp_path: Path) -> None:
    """With crowds, ties, images of more than 100 detections, categories without objects or detections."""
    for seed in range(500):
        random = np.random.default_rng(seed)
        truth, detections = random_data(seed + 1000, images=int(random.integers(1, 9)))
        lost = {int(c) for c in random.choice([1, 3, 4, 90], random.integers(0, 3), replace=False)}
        if seed % 2:
            truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] not in lost]
        else:
            detections = [d for d in detections if d["category_id"] not in lost]
        if seed % 5 == 0:
            image = truth["images"][-1]["id"]
            for x, y in random.integers(0, 80, (130, 2)).tolist():
                score = round(float(random.random()), 2)
                detections.append(make_detection(image, 3, [x, y, 30, 30], score))
        if detections:  # pycocotools fails without any
            assert_equal_to_pycocotools(truth, detections, "hotcoco", tmp_path)


def test_more_than_100_detections_in_an_image(backend: str, tmp_path: Path) -> None:
    truth, detections = random_data(0)
    image = truth["annotations"][0]["image_id"]
    random = np.random.default_rng(1)
    for _ in range(250):
        x, y = random.integers(0, 100, 2).tolist()
        detections.append(make_detection(image, 3, [min(x, 120), min(y, 80), 30, 30], float(random.random())))
    assert_equal_to_pycocotools(truth, detections, backend, tmp_path)


def test_categories_without_ground_truth_or_detections(backend: str, tmp_path: Path) -> None:
    truth, detections = random_data(2)
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] != 3]
    detections = [d for d in detections if d["category_id"] != 90]
    assert_equal_to_pycocotools(truth, detections, backend, tmp_path)
    numbers = evaluate_results(truth, detections, "bbox", backend)
    assert math.isnan(numbers["AP-kind 3"])
    assert numbers["AP-kind 90"] == 0


def test_perfect_and_no_detections(backend: str) -> None:
    truth, _ = random_data(1)
    perfect = [
        make_detection(a["image_id"], a["category_id"], a["bbox"], 1.0)
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    assert evaluate_results(truth, perfect, "bbox", backend)["AP"] == pytest.approx(100)
    assert evaluate_results(truth, perfect, "segm", backend)["AP"] == pytest.approx(100)
    nothing = evaluate_results(truth, [], "segm", backend)
    assert nothing["AP"] == 0
    assert nothing["AR100"] == 0
    empty = evaluate_results({**truth, "annotations": []}, perfect, "bbox", backend)
    assert all(math.isnan(value) for value in empty.values())
    no_images = evaluate_results({**truth, "annotations": [], "images": []}, [], "segm", backend)
    assert all(math.isnan(value) for value in no_images.values())


def test_scores_that_are_all_equal(backend: str, tmp_path: Path) -> None:
    truth, detections = random_data(5)
    for detection in detections:
        detection["score"] = 0.5
    assert_equal_to_pycocotools(truth, detections, backend, tmp_path)


@pytest.mark.parametrize("area", [0, 32**2, 96**2, 32**2 + 0.5])
def test_areas_on_the_borders_of_their_ranges(area: float, backend: str, tmp_path: Path) -> None:
    truth, detections = random_data(6)
    for annotation in truth["annotations"]:
        annotation["area"] = area
    assert_equal_to_pycocotools(truth, detections, backend, tmp_path)


def test_names_that_two_categories_share() -> None:
    truth, detections = random_data(1)
    for category in truth["categories"][:2]:
        category["name"] = "same"
    numbers = evaluate_results(truth, detections, "bbox")
    assert {"AP-same (1)", "AP-same (3)", "AP-kind 4"} <= set(numbers)


def test_table() -> None:
    truth, detections = random_data(1)
    numbers = {kind: evaluate_results(truth, detections, kind) for kind in ("bbox", "segm")}
    lines = format_results(numbers).splitlines()
    assert lines[1].split()[:2] == ["bbox", f"{numbers['bbox']['AP']:.1f}"]
    assert lines[2].split()[0] == "segm"
    assert "kind 90" in "\n".join(lines[4:])
    assert f"{numbers['segm']['AP-kind 90']:.1f}" in "\n".join(lines[4:])
