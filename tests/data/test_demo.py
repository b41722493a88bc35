"""The demo dataset keeps to its specification, is the same everywhere, and appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gn_detect import progress
from gn_detect.data.datasets import DatasetSource
from gn_detect.data.demo import dataset as demo
from gn_detect.data.demo.dataset import TRAIN_SEED, VAL_SEED, ensure_demo_dataset, make_image
from gn_detect.data.demo.shapes import CATEGORIES
from gn_detect.data.doctor.report import examine
from tests.refusal import refusal

Picture = tuple[np.ndarray, list[dict[str, Any]]]
Layouts = list[tuple[demo.Scene, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    """The first pictures of the train part."""
    return [make_image(TRAIN_SEED, index) for index in range(60)]


@pytest.fixture(scope="module")
def layouts() -> Layouts:
    """Unpainted layouts of many pictures of both parts, and their annotations."""
    scenes = [demo.lay_out_scene(seed, index) for seed in (TRAIN_SEED, VAL_SEED) for index in range(120)]
    return [(scene, demo.annotate(scene)) for scene in scenes]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    ensure_demo_dataset(root, num_train=12, num_val=20)
    return root / "demo"


def decode(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decode like pycocotools' ``COCO.annToMask``."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(segmentation).astype(bool)


def test_sizes_and_counts_are_as_specified(layouts: Layouts) -> None:
    assert len(CATEGORIES) == 8
    sides = {side for scene, _ in layouts for side in (scene.height, scene.width)}
    assert 192 <= min(sides) < 200
    assert 312 < max(sides) <= 320
    counts = {len(scene.objects) for scene, _ in layouts}
    assert counts >= set(range(13)) - {11, 12}
    assert max(counts) <= 12
    annotations = [annotation for _, annotated in layouts for annotation in annotated]
    assert {annotation["category_id"] for annotation in annotations} == set(CATEGORIES)
    longer = [max(annotation["bbox"][2:]) for annotation in annotations]
    assert 12 <= min(longer) < 20
    assert 140 < max(longer) <= 160


def test_every_kind_of_difficulty_occurs(layouts: Layouts) -> None:
    kinds = {"empty": 0, "crowd": 0, "cropped": 0, "occluded": 0, "polygon": 0, "RLE": 0, "plain RLE": 0}
    for scene, annotated in layouts:
        kinds["empty"] += not scene.objects
        for thing, annotation in zip(scene.objects, annotated, strict=True):
            x, y, width, height = annotation["bbox"]
            at_border = x == 0 or y == 0 or x + width == scene.width or y + height == scene.height
            inside = np.logical_or.reduce(thing.members).sum()
            kinds["cropped"] += bool(at_border and inside < thing.area)
            kinds["occluded"] += bool(annotation["area"] < 0.8 * inside)
            kinds["crowd"] += annotation["iscrowd"]
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, list):
                kinds["polygon"] += 1
            else:
                kinds["RLE" if isinstance(segmentation["counts"], str) else "plain RLE"] += 1
    assert min(kinds.values()) >= 4, kinds


def test_the_doctor_finds_no_fault(tmp_path: Path) -> None:
    categories = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    sources = []
    for part, seed, count in (("train", TRAIN_SEED, 100), ("val", VAL_SEED, 50)):
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for index in range(count):
            scene = demo.lay_out_scene(seed, index)
            size = {"height": scene.height, "width": scene.width}
            content["images"].append({"id": index, "file_name": f"{part}{index}.jpg", **size})
            for annotation in demo.annotate(scene):
                number = len(content["annotations"]) + 1
                content["annotations"].append({"id": number, "image_id": index, **annotation})
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
        sources.append(DatasetSource(part, tmp_path / f"{part}.json", tmp_path))
    diagnosis = examine(sources, open_images=False)
    assert diagnosis.healthy, str(diagnosis)


def test_generating_says_how_far_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "gn_detect"):
        ensure_demo_dataset(tmp_path, num_train=3, num_val=1)
    train, val = "generating pictures of demo_train", "generating pictures of demo_val"
    lines = [f"{train}: 3", f"{train}: 1 of 3", f"{train}: 2 of 3", f"{train}: 3 of 3"]
    assert caplog.messages == [*lines, f"{val}: 1", f"{val}: 1 of 1"]


def test_at_least_half_of_each_object_is_visible(layouts: Layouts) -> None:
    shares = [
        annotation["area"] / thing.area
        for scene, annotated in layouts
        for thing, annotation in zip(scene.objects, annotated, strict=True)
    ]
    assert 0.5 <= min(shares) < 0.6
    assert max(shares) == 1


def test_objects_are_painted_exactly_where_their_masks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen by painting with one colour for each object, without blur and noise."""
    calls: list[np.ndarray] = []

    def flat_colour(height: int, width: int, covered: object, random: object) -> np.ndarray:
        calls.append(np.array([len(calls) + 1, 0, 0], dtype=np.float32))
        return np.broadcast_to(calls[-1], (height, width, 3))

    monkeypatch.setattr(demo, "object_texture", flat_colour)
    monkeypatch.setattr(
        demo, "background", lambda height, width, random: np.zeros((height, width, 3), np.float32)
    )
    monkeypatch.setattr(demo, "finish", lambda canvas, random: canvas)
    for index in range(40):
        calls.clear()
        scene = demo.lay_out_scene(VAL_SEED, index)
        painted, annotations = make_image(VAL_SEED, index)
        colours = iter(range(1, len(calls) + 1))
        seen = np.zeros((scene.height, scene.width), dtype=bool)
        for thing, annotation in zip(scene.objects, annotations, strict=True):
            own = [next(colours) for _ in thing.members]
            mask = decode(annotation["segmentation"], scene.height, scene.width)
            assert np.array_equal(mask, np.isin(painted[..., 0], own))
            assert annotation["area"] == mask.sum()
            columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
            tight = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
            assert annotation["bbox"] == tight
            seen |= mask
        assert not painted[~seen].any()


def test_objects_stand_out_from_their_surroundings(pictures: list[Picture]) -> None:
    distances = []
    for image, objects in pictures[:30]:
        anything = np.zeros(image.shape[:2], dtype=bool)
        masks = [decode(annotation["segmentation"], *image.shape[:2]) for annotation in objects]
        for mask in masks:
            anything |= mask
        distances += [np.linalg.norm(image[mask].mean(0) - image[~anything].mean(0)) for mask in masks]
    assert np.median(distances) > 70
    assert np.quantile(distances, 0.02) > 15


def test_colour_does_not_tell_the_category(pictures: list[Picture]) -> None:
    """Nearest mean colour, from one half of the pictures to the other, is right about one time in eight."""
    halves: list[tuple[list[np.ndarray], list[int]]] = [([], []), ([], [])]
    for index, (image, objects) in enumerate(pictures):
        for annotation in objects:
            mask = decode(annotation["segmentation"], *image.shape[:2])
            halves[index % 2][0].append(np.concatenate([image[mask].mean(0), image[mask].std(0)]))
            halves[index % 2][1].append(annotation["category_id"])
    (known, labels), (new, truth) = [(np.array(a), np.array(b)) for a, b in halves]
    categories = sorted(CATEGORIES)
    centroids = np.array([known[labels == category].mean(0) for category in categories])
    nearest = np.linalg.norm(new[:, None] - centroids, axis=2).argmin(1)
    assert len(truth) > 100
    assert (np.array(categories)[nearest] == truth).mean() < 0.25


def test_annotations_are_the_same_on_every_machine() -> None:
    """A change of this digest means other data: raise demo.VERSION with it."""
    content = [demo.annotate(demo.lay_out_scene(seed, index)) for seed in (1, 2) for index in range(10)]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "d26eaa2947a53e44"


@pytest.mark.slow
def test_pictures_are_the_same_in_another_process(repository: Path, pictures: list[Picture]) -> None:
    code = (
        "import hashlib; from gn_detect.data.demo.dataset import make_image;"
        "print(hashlib.sha256(make_image(1, 3)[0].tobytes()).hexdigest())"
    )
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(repository)}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == hashlib.sha256(pictures[3][0].tobytes()).hexdigest()


def test_train_and_val_differ(pictures: list[Picture]) -> None:
    assert TRAIN_SEED != VAL_SEED
    for index in range(5):
        image, annotations = make_image(VAL_SEED, index)
        other, other_annotations = pictures[index]
        assert image.shape != other.shape or not np.array_equal(image, other)
        assert annotations != other_annotations


def test_files_are_complete_and_agree(written: Path) -> None:
    image_ids, annotation_count = set(), 0
    for part, count in (("train", 12), ("val", 20)):
        content = json.loads((written / f"instances_{part}.json").read_text())
        assert len(content["images"]) == count == len(list((written / f"images_{part}").iterdir()))
        assert {category["id"]: category["name"] for category in content["categories"]} == CATEGORIES
        for record in content["images"]:
            with Image.open(written / f"images_{part}" / record["file_name"]) as picture:
                assert picture.mode == "RGB"
                assert picture.size == (record["width"], record["height"])
        ids = [annotation["id"] for annotation in content["annotations"]]
        assert len(set(ids)) == len(ids)
        assert min(ids) > 0
        image_ids |= {record["id"] for record in content["images"]}
        annotation_count += len(ids)
    assert len(image_ids) == 32
    assert annotation_count > 60
    seed_and_index = divmod(content["images"][4]["id"], 100_000)
    with Image.open(written / "images_val" / content["images"][4]["file_name"]) as picture:
        stored = np.asarray(picture).astype(float)
    assert np.abs(stored - make_image(*seed_and_index)[0]).mean() < 3  # JPEG


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_ground_truth_as_detections_is_perfect(written: Path, iou_type: str) -> None:
    truth = COCO(str(written / "instances_val.json"))
    found = [
        {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": annotation["bbox"],
            "segmentation": truth.annToRLE(annotation),
            "score": 1.0,
        }
        for annotation in truth.anns.values()
        if not annotation["iscrowd"]
    ]
    evaluation = COCOeval(truth, truth.loadRes(found), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_call_does_nothing(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "make_image", lambda seed, index: pytest.fail("generated again"))
    (written / "images_val" / "._200001.jpg").write_bytes(b"macOS")  # a hidden file is none of ours
    ensure_demo_dataset(written.parent, num_train=12, num_val=20)
    (written / "images_val" / "._200001.jpg").unlink()


@pytest.mark.parametrize("damage", ["version", "picture", "annotations"])
def test_an_outdated_or_incomplete_copy_is_replaced(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_demo_dataset(tmp_path, 3, 2)
    before = snapshot(tmp_path / "demo")
    if damage == "version":
        monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
    elif damage == "picture":
        next((tmp_path / "demo" / "images_val").iterdir()).unlink()
    else:
        (tmp_path / "demo" / "instances_train.json").unlink()
    ensure_demo_dataset(tmp_path, 3, 2)
    after = snapshot(tmp_path / "demo")
    assert after.keys() == before.keys()
    assert (after == before) == (damage != "version")
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interruption_leaves_nothing(
    tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(seed: int, index: int) -> Picture:
        if index == 2:
            raise error
        return make_image(seed, index)

    monkeypatch.setattr(demo, "make_image", stop)
    with pytest.raises(error):
        ensure_demo_dataset(tmp_path, 4, 2)
    assert list(tmp_path.iterdir()) == []


def test_concurrent_calls_all_succeed(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            ensure_demo_dataset(tmp_path, 3, 2)
            assert len(snapshot(tmp_path / "demo")) == 8
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with refusal("cannot-write", "file"):
        ensure_demo_dataset(tmp_path / "file", 1, 1)


def test_a_folder_of_somebody_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.txt").write_text("years of work")
    with refusal("replaced-file"):
        ensure_demo_dataset(tmp_path, 1, 1)
    assert [path.name for path in tmp_path.rglob("*")] == ["demo", "thesis.txt"]
