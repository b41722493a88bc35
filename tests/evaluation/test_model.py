"""From a model's detections to files and numbers."""

from __future__ import annotations

import json
import sys
import tracemalloc
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch

from gn_detect.errors import UserError
from gn_detect.evaluation import detections_to_coco, evaluate_model, evaluate_results
from gn_detect.evaluation import model as model_module
from gn_detect.structures import Detections, Sample

SIZE = (40, 60)


def make_detections() -> Detections:
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[0, 5:15, 10:30] = True
    masks[1, 20:30, 5:10] = True
    boxes = torch.tensor([[10.0, 5, 30, 15], [5.25, 20, 10, 30]])
    return Detections(boxes, torch.tensor([0.9, 0.5]), torch.tensor([1, 0]), masks)


class PerfectModel(torch.nn.Module):
    """Finds in every image what is there."""

    def detect(self, images: list, original_sizes: list, paste: bool = True) -> list[Detections]:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        assert original_sizes == [SIZE] * len(images)
        return [make_detections() for _ in images]


@pytest.fixture
def dataset(tmp_path: Path) -> SimpleNamespace:
    entries = detections_to_coco(make_detections(), 0, [7, 20])
    annotations = [
        {**entry, "image_id": image, "id": 2 * image + i, "iscrowd": 0, "area": 200 if i == 0 else 50}
        for image in (1, 2, 3)
        for i, entry in enumerate(entries)
    ]
    truth = {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in (1, 2, 3)],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "a"}, {"id": 20, "name": "b"}],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    return SimpleNamespace(name="toy", annotations_path=path, category_ids=[7, 20], spelt_categories={})


def make_loader() -> list[list[Sample]]:
    samples = [Sample(torch.zeros(3, *SIZE, dtype=torch.uint8), i, f"{i}.png", SIZE) for i in (1, 2, 3)]
    return [samples[:2], samples[2:]]


def test_entries_are_cocos() -> None:
    found = make_detections()
    entries = detections_to_coco(found, 42, [7, 20])
    assert [entry["category_id"] for entry in entries] == [20, 7]
    assert entries[1]["bbox"] == [5.25, 20, 4.75, 10]
    assert entries[0]["score"] == pytest.approx(0.9)
    assert {entry["image_id"] for entry in entries} == {42}
    for entry, mask in zip(json.loads(json.dumps(entries)), found.masks, strict=True):
        assert np.array_equal(coco_mask.decode(entry["segmentation"]), mask.numpy())
    without = Detections(found.boxes, found.scores, found.labels)
    assert "segmentation" not in detections_to_coco(without, 1, [7, 20])[0]
    assert detections_to_coco(found[:0], 1, [7, 20]) == []


def detections_of(masks: torch.Tensor) -> Detections:
    count = len(masks)
    return Detections(torch.zeros(count, 4), torch.ones(count), torch.zeros(count).long(), masks)


@pytest.mark.parametrize("moved_bytes", [1, 3 * 37 * 53, 1 << 28])
def test_masks_are_coded_as_pycocotools_codes_all_at_once(
    monkeypatch: pytest.MonkeyPatch, moved_bytes: int
) -> None:
    """Masks have any form; nothing of a mask may stay in the next one."""
    monkeypatch.setattr(model_module, "_MOVED_BYTES", moved_bytes)
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(10, 37, 53, dtype=torch.bool)
    masks[0] = True
    masks[2, 0, 0] = masks[3, -1, -1] = masks[4, 5, :] = masks[5, :, 7] = True
    masks[6, [3, 30], [50, 2]] = True  # two parts
    masks[7:] = torch.rand(3, 37, 53, generator=generator) > 0.5
    expected = coco_mask.encode(np.asfortranarray(masks.numpy().view(np.uint8).transpose(1, 2, 0)))
    for given in (masks, masks.transpose(1, 2).contiguous().transpose(1, 2)):
        entries = detections_to_coco(detections_of(given), 1, [7])
        assert [entry["segmentation"] for entry in entries] == [
            {"size": [37, 53], "counts": rle["counts"].decode()} for rle in expected
        ]


@pytest.mark.parametrize(("top", "left"), [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_parts_of_an_image_are_coded_as_the_whole(top: int, left: int) -> None:
    """Every mask of 3 x 2 pixels, in each corner of 4 x 4: runs go on from a column to the next."""
    for bits in range(64):
        part = np.array([bits >> i & 1 for i in range(6)], dtype=bool).reshape(3, 2)
        whole = np.zeros((4, 4), dtype=np.uint8, order="F")
        whole[top : top + 3, left : left + 2] = part
        counts = model_module._run_lengths(part, top, left, (4, 4))
        assert coco_mask.frPyObjects({"size": (4, 4), "counts": counts}, 4, 4) == coco_mask.encode(whole)


@pytest.mark.parametrize(("height", "width"), [(1, 12), (2, 6), (3, 4), (12, 1)])
def test_every_mask_of_a_small_image_is_coded_as_pycocotools_does(height: int, width: int) -> None:
    masks = (torch.arange(1 << 12)[:, None] >> torch.arange(12)) % 2 == 1
    masks = masks.reshape(-1, height, width)
    expected = coco_mask.encode(np.asfortranarray(masks.numpy().view(np.uint8).transpose(1, 2, 0)))
    entries = detections_to_coco(detections_of(masks), 1, [7])
    assert [entry["segmentation"]["counts"] for entry in entries] == [
        rle["counts"].decode() for rle in expected
    ]


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_a_part_without_pixels_is_an_empty_mask(shape: tuple[int, int]) -> None:
    assert model_module._run_lengths(np.zeros(shape, dtype=bool), 2, 3, (7, 9)).tolist() == [63]


def test_coding_masks_makes_no_copy_of_them_all() -> None:
    """Those of a large image are several GB."""
    found = detections_of(torch.ones(30, 200, 300, dtype=torch.bool))
    tracemalloc.start()
    detections_to_coco(found, 1, [7])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 200 * 300


def test_masks_of_an_image_are_gone_before_the_next(dataset: SimpleNamespace, tmp_path: Path) -> None:
    class Watched(PerfectModel):
        seen: list[weakref.ref] = []

        def detect(self, images: list, original_sizes: list, paste: bool = True) -> list[Detections]:
            assert not any(seen() is not None for seen in self.seen)
            found = super().detect(images, original_sizes)
            self.seen += [weakref.ref(detections.masks) for detections in found]
            return found

    model = Watched()
    evaluate_model(model, make_loader(), dataset, tmp_path)
    assert len(model.seen) == 3


def test_too_little_gpu_memory_names_the_images_and_the_keys(
    dataset: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref] = []

    class Hungry(PerfectModel):
        def detect(self, images: list, original_sizes: list, paste: bool = True) -> list[Detections]:
            features = torch.zeros(3)
            held.append(weakref.ref(features))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def empty_cache() -> None:
        assert held[0]() is None
        held.clear()

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    small = [Sample(torch.zeros(3, 20, 30), 5, "photos/5.png", SIZE)]
    for batch, words in (
        (make_loader()[0], ("1.png", "2.png", "TEST.IMS_PER_BATCH (2)")),
        (small, ("5.png",)),
    ):
        with pytest.raises(UserError, match="out of GPU memory") as caught:
            evaluate_model(Hungry(), [batch], dataset, tmp_path)
        message = str(caught.value)
        assert not held, "the tensors are freed before the cache is"
        assert all(word in message for word in words)
        assert ("IMS_PER_BATCH" in message) == (len(batch) > 1)
        assert "INPUT.MAX_SIZE_TEST" in message
        assert "TEST.DETECTIONS_PER_IMAGE" in message
    assert "photos/5.png (60 x 40 pixels, resized to 30 x 20)" in message


def test_a_perfect_model(dataset: SimpleNamespace, tmp_path: Path) -> None:
    model = PerfectModel()
    folder = tmp_path / "run/inference"
    metrics = evaluate_model(model, make_loader(), dataset, folder)
    assert model.training
    assert metrics["bbox"]["AP"] == pytest.approx(100)
    assert metrics["segm"]["AP"] == pytest.approx(100)
    written = folder / "coco_instances_results.json"
    assert len(json.loads(written.read_text())) == 6
    assert evaluate_results(dataset.annotations_path, written, "segm") == pytest.approx(
        metrics["segm"], nan_ok=True
    )


def test_modules_that_were_frozen_on_purpose_stay_so(dataset: SimpleNamespace, tmp_path: Path) -> None:
    model = PerfectModel()
    model.frozen, model.free = torch.nn.BatchNorm2d(2).eval(), torch.nn.BatchNorm2d(2)
    evaluate_model(model, make_loader(), dataset, tmp_path)
    assert (model.training, model.frozen.training, model.free.training) == (True, False, True)


def test_a_missing_backend_is_refused_before_the_work(
    dataset: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setattr(PerfectModel, "detect", lambda *_: pytest.fail("ran the model"))
    with pytest.raises(UserError, match="pip install hotcoco"):
        evaluate_model(PerfectModel(), make_loader(), dataset, tmp_path, backend="hotcoco")


def test_the_log_has_numbers_and_speed(
    dataset: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="gn_detect"):
        evaluate_model(PerfectModel(), make_loader(), dataset, tmp_path)
    assert "3 images, " in caplog.text
    assert "images/s (data " in caplog.text
    assert "segm   100.0  100.0  100.0" in caplog.text
    assert "AP50 lost to  classification" in caplog.text


def in_one_process(rank: int, folder: Path) -> None:
    """Rank 0 has images 1 and 2, rank 1 has image 3; then the annotation file disappears."""
    group = {"init_method": f"file://{folder}/group", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **group)
    try:
        data = SimpleNamespace(
            name="toy",
            annotations_path=folder / "truth.json",
            category_ids=[7, 20],
            spelt_categories={},
            class_names=["a", "b"],
        )
        out = folder / "out"
        metrics = evaluate_model(PerfectModel(), [make_loader()[rank]], data, out, backend="pycocotools")
        data.annotations_path = folder / "nowhere.json"
        try:
            evaluate_model(PerfectModel(), [make_loader()[rank]], data, out, backend="pycocotools")
        except UserError as error:
            (folder / f"{rank}.json").write_text(json.dumps([metrics["segm"]["AR10"], str(error)]))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_return_the_same_numbers_and_raise_the_same_error(
    dataset: SimpleNamespace, tmp_path: Path
) -> None:
    torch.multiprocessing.start_processes(in_one_process, (tmp_path,), 2, start_method="forkserver")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == pytest.approx(100)
    assert "nowhere.json is missing" in first[1]
    written = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    assert [entry["image_id"] for entry in written] == [1, 1, 2, 2, 3, 3]


def test_boxes_alone(dataset: SimpleNamespace, tmp_path: Path) -> None:
    results = evaluate_model(PerfectModel().eval(), make_loader(), dataset, tmp_path, iou_types=["bbox"])
    assert set(results) == {"bbox", "diagnosis"}
    assert set(results["diagnosis"]) == {"bbox"}


def test_a_failing_model_keeps_its_mode_and_leaves_no_file(dataset: SimpleNamespace, tmp_path: Path) -> None:
    class Broken(PerfectModel):
        def detect(self, images: list, original_sizes: list, paste: bool = True) -> list[Detections]:
            raise RuntimeError("no")

    model = Broken()
    with pytest.raises(RuntimeError, match="no"):
        evaluate_model(model, make_loader(), dataset, tmp_path / "out")
    assert model.training
    assert not list((tmp_path / "out").iterdir())
