"""COCO numbers: the known ones, and the same ones from every backend, whatever the data look like."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gn_detect.errors import UserError
from gn_detect.evaluation import METRICS, evaluate_results, format_results
from gn_detect.evaluation import backends as backends_module

BACKENDS = ["pycocotools", "hotcoco", "faster_coco_eval"]
HEIGHT, WIDTH = 120, 160


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


def random_data(
    seed: int, images: int = 12, categories: tuple[int, ...] = (1, 3, 4, 90)
) -> tuple[dict, list[dict]]:
    """Rectangles as ground truth, crowds among them, and shifted copies and inventions as detections."""
    random = np.random.default_rng(seed)
    truth: dict[str, list] = {
        "images": [
            {"id": int(i), "height": HEIGHT, "width": WIDTH} for i in random.permutation(1000)[:images]
        ],
        "categories": [{"id": c, "name": f"kind {c}"} for c in categories],
        "annotations": [],
    }
    detections = []
    for image in truth["images"][1:]:
        for _ in range(random.integers(0, 9)):
            size = random.integers(4, 90, 2)
            x, y = (random.uniform(0, 1, 2) * (np.array([WIDTH, HEIGHT]) - size)).astype(int).tolist()
            w, h = size.tolist()
            category = int(random.choice(categories))
            crowd = int(random.random() < 0.15)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": crowd,
                    "segmentation": rectangle(x, y, w, h)
                    if crowd
                    else [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
            for _ in range(random.integers(0, 4)):
                dx, dy, dw, dh = (random.integers(-6, 7, 4)).tolist()
                box = [max(x + dx, 0), max(y + dy, 0), max(w + dw, 2), max(h + dh, 2)]
                score = round(float(random.random()), 1)  # ties
                detections.append(make_detection(image["id"], category, box, score))
    return truth, detections


def rectangle(x: int, y: int, w: int, h: int) -> dict[str, Any]:
    """Compressed RLE."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(mask)
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def make_detection(image_id: int, category_id: int, box: list[int], score: float) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": box,
        "score": score,
        "segmentation": rectangle(*box),
    }


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
    for iou_type in ("bbox", "segm"):
        expected = by_pycocotools(truth, detections, iou_type, tmp_path)
        numbers = evaluate_results(truth, detections, iou_type, backend)
        ours = [numbers[name] / 100 for name in METRICS]
        ours = [-1.0 if math.isnan(value) else value for value in ours]
        assert ours == pytest.approx(expected, abs=1e-9), iou_type


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


def test_numbers_of_detectron2(backend: str, shared_dir: Path) -> None:
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
        assert math.isnan(numbers["APl"]) and math.isnan(expected[iou_type]["APl"])


@pytest.mark.parametrize("name", ["coco80", "dsb2018", "coco_person1"])
def test_real_ground_truth_moved_a_little(name: str, backend: str, shared_dir: Path, tmp_path: Path) -> None:
    truth = json.loads((shared_dir / f"data/{name}/annotations/instances_val.json").read_text())
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
    assert_equal_to_pycocotools(truth, detections, backend, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_crowds_ties_empty_images_and_gaps_in_ids(seed: int, backend: str, tmp_path: Path) -> None:
    assert_equal_to_pycocotools(*random_data(seed), backend, tmp_path)


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
    assert math.isnan(numbers["AP-kind 3"]) and numbers["AP-kind 90"] == 0


def spelled_otherwise(change: Callable[[dict], None]) -> tuple[dict, list[dict]]:
    truth, detections = random_data(3)
    for annotation in truth["annotations"]:
        change(annotation)
    return truth, detections


def uncompressed(annotation: dict) -> None:
    if annotation["iscrowd"]:
        mask = coco_mask.decode(annotation["segmentation"]).flatten(order="F")
        edges = np.flatnonzero(np.diff(mask)) + 1
        runs = np.diff(np.concatenate([[0], edges, [len(mask)]])).tolist()
        annotation["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [0, *runs] if mask[0] else runs}


def as_bytes(annotation: dict) -> None:
    if annotation["iscrowd"]:
        annotation["segmentation"]["counts"] = annotation["segmentation"]["counts"].encode()


@pytest.mark.parametrize(
    "change",
    [
        uncompressed,
        as_bytes,
        lambda a: a.update(id=a["id"] - 1),  # pycocotools itself mistakes the id 0 for "not matched"
        lambda a: a.update(ignore=1),  # overwritten by iscrowd
        lambda a: a.pop("area"),  # rectangles: the mask's area is the box's
        lambda a: a.pop("iscrowd") if not a["iscrowd"] else None,
        lambda a: a.update(extra={"anything": None}),
    ],
)
def test_other_spellings_of_the_same_ground_truth(change: Callable[[dict], None], backend: str) -> None:
    plain, detections = random_data(3)
    other, _ = spelled_otherwise(change)
    for iou_type in ("bbox", "segm"):
        expected = evaluate_results(plain, detections, iou_type, "pycocotools")
        assert evaluate_results(other, detections, iou_type, backend) == pytest.approx(
            expected, abs=1e-9, nan_ok=True
        )


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
    assert nothing["AP"] == 0 and nothing["AR100"] == 0
    empty = evaluate_results({**truth, "annotations": []}, perfect, "bbox", backend)
    assert all(math.isnan(value) for value in empty.values())


def test_inputs_are_left_alone(backend: str) -> None:
    truth, detections = random_data(1)
    before = json.dumps([truth, detections])
    evaluate_results(truth, detections, "segm", backend)
    assert json.dumps([truth, detections]) == before


def test_nothing_is_printed(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate_results(*random_data(1), "bbox", backend)
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


def test_names_that_two_categories_share() -> None:
    truth, detections = random_data(1)
    for category in truth["categories"][:2]:
        category["name"] = "same"
    numbers = evaluate_results(truth, detections, "bbox")
    assert {"AP-same (1)", "AP-same (3)", "AP-kind 4"} <= set(numbers)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"image_id": 12345}, "is of image 12345, which the ground truth does not have"),
        ({"category_id": 2}, "is of category 2, which the ground truth does not have"),
        ({"score": float("nan")}, "has the score nan"),
        ({"score": None}, "cannot be evaluated"),
        ({"bbox": [1, 2, 3]}, "is not x, y, width, height"),
    ],
)
def test_bad_detections(change: dict, part: str) -> None:
    truth, detections = random_data(1)
    detections[4] |= change
    with pytest.raises(UserError, match="results: detection 5") as caught:
        evaluate_results(truth, detections, "bbox")
    assert part in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    truth, detections = random_data(1)
    path = tmp_path / "x.json"
    with pytest.raises(UserError, match="x.json: cannot be read"):
        evaluate_results(path, detections, "bbox")
    path.write_text("{")
    with pytest.raises(UserError, match="x.json: not JSON"):
        evaluate_results(path, detections, "bbox")
    path.write_text("[]")
    with pytest.raises(UserError, match="not COCO ground truth; it needs the lists images, annotations"):
        evaluate_results(path, detections, "bbox")
    path.write_text("{}")
    with pytest.raises(UserError, match="not COCO results"):
        evaluate_results(truth, path, "bbox")
    del truth["annotations"][0]["bbox"], truth["annotations"][0]["segmentation"]
    with pytest.raises(UserError, match="annotation 1 cannot be evaluated"):
        evaluate_results(truth, detections, "bbox")


def test_backends_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'fast' is not one of auto, hotcoco, faster_coco_eval, pycocotools"):
        backends_module.choose_backend("fast")
    monkeypatch.setattr(
        backends_module.importlib.util, "find_spec", lambda name: name == "pycocotools" or None
    )
    assert backends_module.choose_backend("auto") == "pycocotools"
    with pytest.raises(UserError, match="hotcoco is not installed; pip install hotcoco"):
        backends_module.choose_backend("hotcoco")


def test_table() -> None:
    truth, detections = random_data(1)
    numbers = {kind: evaluate_results(truth, detections, kind) for kind in ("bbox", "segm")}
    lines = format_results(numbers).splitlines()
    assert lines[1].split()[:2] == ["bbox", f"{numbers['bbox']['AP']:.1f}"]
    assert lines[2].split()[0] == "segm"
    assert "kind 90" in "\n".join(lines[4:]) and f"{numbers['segm']['AP-kind 90']:.1f}" in "\n".join(
        lines[4:]
    )
