"""Mistakes of a user: status 2, one line that names the item, and nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gn_detect.cli import main
from gn_detect.cli.main import load_command
from tests.cli.conftest import Case

Refused = Callable[..., str]


def drop_images(case: Case) -> None:
    shutil.rmtree(case.train.parent / "images")


def drop_one_image(case: Case) -> None:
    (case.train.parent / "images" / "002.png").unlink()


def drop_json(case: Case) -> None:
    case.train.unlink()


def write_text(text: str) -> Callable[[Case], Any]:
    return lambda case: case.train.write_text(text)


def edit(change: Callable[[dict], Any]) -> Callable[[Case], Any]:
    return lambda case: case.edit(change)


SPOILED = {
    "missing folder": (drop_images, "images"),
    "missing image": (drop_one_image, "002.png"),
    "missing JSON": (drop_json, "annotations.json"),
    "not JSON": (write_text("hello"), "annotations.json"),
    "not COCO": (write_text('{"a": 1}'), "annotations.json"),
    "a list": (write_text("[1, 2]"), "annotations.json"),
    "no annotations": (edit(lambda c: c["annotations"].clear()), "tiny_train"),
    "no images": (edit(lambda c: c["images"].clear()), "annotations.json"),
    "unlisted category": (edit(lambda c: c["annotations"][0].update(category_id=55)), "55"),
    "box outside": (edit(lambda c: c["annotations"][1].update(bbox=[500, 500, 10, 10])), "annotation 2"),
    "other classes": (edit(lambda c: c["categories"].append({"id": 9, "name": "new"})), "NUM_CLASSES"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_dataset(case: Case, refused: Refused, name: str) -> None:
    spoil, named = SPOILED[name]
    spoil(case)
    assert named in refused("train", "--config-file", case.config)
    assert not case.output.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_jpeg(case: Case, refused: Refused, workers: int) -> None:
    """It is found when it is read, in the middle of training."""
    images = case.train.parent / "images"
    for path in list(images.iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"))
    broken = images / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:400])

    def rename(content: dict) -> None:
        for image in content["images"]:
            image["file_name"] = image["file_name"].replace("png", "jpg")

    case.edit(rename)
    assert "003.jpg" in refused("train", "--config-file", case.config, "DATALOADER.NUM_WORKERS", workers)
    left = {path.name for path in case.output.iterdir()}
    assert not [name for name in left if name.endswith(".tmp")]
    pointer = case.output / "last_checkpoint"  # what was trained before it was read is kept
    assert [name for name in left if name.endswith(".pth")] == (
        [pointer.read_text()] if pointer.exists() else []
    )


KEYS = {
    "SOLVER.BASE_RL 0.1": "SOLVER.BASE_LR",
    "SOLVER.BASE_LR fast": "SOLVER.BASE_LR",
    "MODEL.ROI_HEADS.NUM_CLASSES 5": "NUM_CLASSES",
    "MODEL.WEIGHTS nowhere.pth": "nowhere.pth",
    "DATASETS.TRAIN ['tiny_trian']": "tiny_train",
    "DATASETS.TRAIN []": "DATASETS.TRAIN",
    "SOLVER.BASE_LR": "SOLVER.BASE_LR",
    "MODEL.DEVICE cuda:77": "MODEL.DEVICE",
    "MODEL.RESNETS.NORM SyncBN": "SyncBN",
    "SOLVER.BEST_CHECKPOINT_METRIC bbox/AP51": "bbox/AP51",
    "SOLVER.BEST_CHECKPOINT_METRIC segm/AP MODEL.MASK_ON False": "MASK_ON",
    "MODEL.GN.NUM_GROUPS 3": "MODEL.GN.NUM_GROUPS",
}


@pytest.mark.parametrize("keys", KEYS)
def test_wrong_keys(case: Case, refused: Refused, keys: str) -> None:
    assert KEYS[keys] in refused("train", "--config-file", case.config, *keys.split())
    assert not case.output.exists()


def test_no_config(refused: Refused) -> None:
    assert "--config-file" in refused("train")
    assert "nowhere.yaml" in refused("train", "--config-file", "nowhere.yaml")
    assert "--config-file" in refused("predict", "image.jpg")


def test_weights_of_another_architecture(case: Case, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"model": {"features.0.weight": torch.zeros(3)}}, path)
    assert "other.pth" in refused("train", "--config-file", case.config, "MODEL.WEIGHTS", path)
    assert not case.output.exists()
    assert "other.pth" in refused("eval", "--config-file", case.config, "MODEL.WEIGHTS", path)
    assert not case.output.exists()


@pytest.mark.usefixtures("quick_launch")
def test_batch_that_the_processes_do_not_divide(case: Case, refused: Refused) -> None:
    keys = ("SOLVER.IMS_PER_BATCH", 3)
    assert "IMS_PER_BATCH" in refused("train", "--config-file", case.config, "--num-gpus", 2, *keys)
    assert not case.output.exists()


def test_output_folder_that_cannot_be_made(case: Case, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in refused("train", "--config-file", case.config, "OUTPUT_DIR", tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (("eval",), "MODEL.WEIGHTS is empty"),
        (("train", "--eval-only"), "MODEL.WEIGHTS is empty"),
        (("eval", "--resume"), "has no checkpoint"),
    ],
)
def test_nothing_to_evaluate(case: Case, refused: Refused, command: tuple[str, ...], missing: str) -> None:
    assert missing in refused(*command, "--config-file", case.config)
    assert not case.output.exists()


def test_last_checkpoint_that_is_missing(case: Case, refused: Refused) -> None:
    case.output.mkdir()
    (case.output / "last_checkpoint").write_text("model_0000009.pth")
    assert "model_0000009.pth" in refused("train", "--config-file", case.config, "--resume")


def test_half_of_a_dataset_flag(case: Case, refused: Refused) -> None:
    assert "--train-images" in refused("train", "--config-file", case.config, "--train-json", case.train)


@pytest.mark.parametrize("inputs", [["nowhere"], ["*.nothing"]])
def test_predict_without_images(case: Case, refused: Refused, inputs: list[str]) -> None:
    assert inputs[0] in refused("predict", "--config-file", case.config, *inputs)


def test_degenerate_box_is_dropped_with_one_counted_warning(
    case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    def flatten(content: dict) -> None:
        for annotation in content["annotations"][:2]:
            annotation["bbox"][2] = 0

    case.edit(flatten)
    keys = ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "[]"]
    assert main(["train", "--config-file", str(case.config), *keys]) == 0
    log = (case.output / "log.txt").read_text()
    warnings = [line for line in log.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert "2" in warnings[0]
    assert capsys.readouterr().err == ""


LESS_MEMORY = {
    ("train",): "lower INPUT.MAX_SIZE_TRAIN and INPUT.MIN_SIZE_TRAIN, or set SOLVER.ACCUMULATE",
    ("train", "--eval-only"): "INPUT.MAX_SIZE_TEST",
    ("eval",): "INPUT.MAX_SIZE_TEST",
    ("predict", "photo.jpg"): "MODEL.DEVICE cpu",
    ("bench", "train"): "--images",
}


@pytest.mark.parametrize("arguments", LESS_MEMORY)
def test_too_little_gpu_memory_names_the_keys_of_the_command(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    def run(_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(load_command(arguments[0]), "run", run)
    error = refused(*arguments)
    assert "out of GPU memory; " in error
    assert LESS_MEMORY[arguments] in error
    assert ("TRAIN" in error) == (arguments == ("train",))
