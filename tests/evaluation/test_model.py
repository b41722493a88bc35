"""From a model's detections to files and numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch

from gn_detect.errors import UserError
from gn_detect.evaluation import detections_to_coco, evaluate_model, evaluate_results
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

    def detect(self, images: list, original_sizes: list) -> list[Detections]:
        assert (
            not self.training and torch.is_inference_mode_enabled() and original_sizes == [SIZE] * len(images)
        )
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
    return SimpleNamespace(name="toy", annotations_path=path, category_ids=[7, 20])


def make_loader() -> list[list[Sample]]:
    samples = [Sample(torch.zeros(3, *SIZE, dtype=torch.uint8), i, f"{i}.png", SIZE) for i in (1, 2, 3)]
    return [samples[:2], samples[2:]]


def test_entries_are_cocos() -> None:
    found = make_detections()
    entries = detections_to_coco(found, 42, [7, 20])
    assert [entry["category_id"] for entry in entries] == [20, 7]
    assert entries[1]["bbox"] == [5.25, 20, 4.75, 10] and entries[0]["score"] == pytest.approx(0.9)
    assert {entry["image_id"] for entry in entries} == {42}
    for entry, mask in zip(json.loads(json.dumps(entries)), found.masks, strict=True):
        assert np.array_equal(coco_mask.decode(entry["segmentation"]), mask.numpy())
    without = Detections(found.boxes, found.scores, found.labels)
    assert "segmentation" not in detections_to_coco(without, 1, [7, 20])[0]
    assert detections_to_coco(found[:0], 1, [7, 20]) == []


def test_a_perfect_model(dataset: SimpleNamespace, tmp_path: Path) -> None:
    model = PerfectModel()
    folder = tmp_path / "run/inference"
    metrics = evaluate_model(model, make_loader(), dataset, folder)
    assert model.training
    assert metrics["bbox"]["AP"] == pytest.approx(100) and metrics["segm"]["AP"] == pytest.approx(100)
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


def test_log_tells_numbers_and_speed(
    dataset: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="gn_detect"):
        evaluate_model(PerfectModel(), make_loader(), dataset, tmp_path)
    assert "3 images, " in caplog.text and "images/s (data " in caplog.text
    assert "segm   100.0  100.0  100.0" in caplog.text


def in_one_process(rank: int, folder: Path) -> None:
    """Rank 0 has images 1 and 2, rank 1 has image 3; then the annotation file disappears."""
    group = {"init_method": f"file://{folder}/group", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **group)
    try:
        data = SimpleNamespace(
            name="toy", annotations_path=folder / "truth.json", category_ids=[7, 20], class_names=["a", "b"]
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
    torch.multiprocessing.spawn(in_one_process, (tmp_path,), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == pytest.approx(100) and "nowhere.json: cannot be read" in first[1]
    written = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    assert [entry["image_id"] for entry in written] == [1, 1, 2, 2, 3, 3]


def test_boxes_alone(dataset: SimpleNamespace, tmp_path: Path) -> None:
    assert set(
        evaluate_model(PerfectModel().eval(), make_loader(), dataset, tmp_path, iou_types=["bbox"])
    ) == {"bbox"}


def test_a_failing_model_keeps_its_mode_and_leaves_no_file(dataset: SimpleNamespace, tmp_path: Path) -> None:
    class Broken(PerfectModel):
        def detect(self, images: list, original_sizes: list) -> list[Detections]:
            raise RuntimeError("no")

    model = Broken()
    with pytest.raises(RuntimeError, match="no"):
        evaluate_model(model, make_loader(), dataset, tmp_path / "out")
    assert model.training and not list((tmp_path / "out").iterdir())
