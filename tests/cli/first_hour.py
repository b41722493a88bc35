"""Mistakes of a user's first hour: how each is made, and what its message must name and advise.

tests/cli/test_first_hour.py provokes them; docs/troubleshooting.md is checked against what they print.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gn_detect.cli import main
from gn_detect.config import load_config
from gn_detect.engine.folder_lock import FolderLock
from gn_detect.modeling import build_model
from gn_detect.weights import norm_settings
from tests.cli.conftest import Case

Prepare = Callable[[Case], Any]


@dataclass(frozen=True)
class Mistake:
    """Attributes:
    command: arguments; {config}, {train}, {val}, {images}, {folder} and {output} are the test's files.
    names: what the message must name.
    remedy: words of what it must advise.
    prepare: what is spoiled before.
    needs_no_gpu: the mistake is none where there is a GPU.
    retries: lines about further tries stand before the message.
    """

    command: str
    names: str
    remedy: str
    prepare: Prepare = field(default=lambda case: None)
    needs_no_gpu: bool = False
    retries: bool = False


def _edit(change: Callable[[dict[str, Any]], Any]) -> Prepare:
    return lambda case: case.edit(change)


def _text(text: str) -> Prepare:
    return lambda case: case.train.write_text(text)


def _file(name: str, content: str | bytes) -> Prepare:
    """A file in the test's folder."""
    data = content.encode() if isinstance(content, str) else content
    return lambda case: (case.config.parent / name).write_bytes(data)


def _first_image(change: Callable[[Path], Any]) -> Prepare:
    return lambda case: change(case.train.parent / "images" / "001.png")


def _weights(keys: list[str], damage: Callable[[Path], Any] = lambda path: None) -> Prepare:
    """``w.pth`` of the test's config with other keys."""

    def prepare(case: Case) -> None:
        path = case.config.parent / "w.pth"
        model = build_model(load_config(case.config, keys))
        torch.save({"model": model.state_dict(), **norm_settings(model).to_dict()}, path)
        damage(path)

    return prepare


def _mix_options(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["model"]["args"] = argparse.Namespace(lr=0.1)
    torch.save(content, path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _state(path: Path, **metadata: Any) -> None:
    torch.save({**torch.load(path, weights_only=True), **metadata}, path)


def _of_rgb(path: Path) -> None:
    stated = {"format": "RGB", "pixel_mean": [123.675, 116.28, 103.53], "pixel_std": [58.4, 57.1, 57.4]}
    _state(path, input=stated)


def _hostile(path: Path) -> None:
    path.write_bytes(b"cposix\nsystem\n(S'true'\ntR.")


def _last_checkpoint(case: Case) -> None:
    case.output.mkdir()
    (case.output / "last_checkpoint").write_text("model_0000009.pth")


def _run(case: Case) -> None:
    """A run of one iteration."""
    keys = ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", "[]"]
    assert main(["train", "--config-file", str(case.config), *keys]) == 0


def _in_use(case: Case) -> None:
    case.output.mkdir()
    lock = FolderLock(case.output)
    lock.take()
    _HELD.append(lock)


_HELD: list[FolderLock] = []
"""The locks of other trainings, which the end of the tests releases."""


def _make_fractions(annotation: dict[str, Any]) -> None:
    annotation["bbox"] = [number / 1000 for number in annotation["bbox"]]


def _rename_category(case: Case) -> None:
    content = json.loads(case.val.read_text())
    content["categories"][0]["name"] = "circle"
    case.val.write_text(json.dumps(content))


BN = [text for part in ("RESNETS", "FPN", "ROI_MASK_HEAD") for text in (f"MODEL.{part}.NORM", "BN")]
TRAIN = "train --config-file {config}"
OWN = "train --train-json {train} --train-images {images}"
EVAL = "eval --config-file {config}"
PREDICT = "predict --config-file {config} {images}"

MISTAKES = {
    "command with a typo": Mistake("trian", "trian", "did you mean train?"),
    "command of another tool": Mistake("test", "test", "choose from"),
    "flag of another tool": Mistake(
        f"{PREDICT} --confidence-threshold 0.5", "--confidence-threshold", "did you mean --threshold?"
    ),
    "key given as a flag": Mistake(f"{TRAIN} --lr 0.01", "--lr", "after the command: SOLVER.BASE_LR"),
    "epochs as a flag": Mistake(
        f"{TRAIN} --epochs 12", "--epochs", "SOLVER.MAX_ITER, in iterations: epochs x"
    ),
    "key with an equals sign": Mistake(
        f"{TRAIN} SOLVER.MAX_ITER=12", "SOLVER.MAX_ITER=12", "stand apart here, as in SOLVER.MAX_ITER 12"
    ),
    "key of another tool": Mistake(f"{TRAIN} batch 4", "batch: unknown key", "SOLVER.IMS_PER_BATCH"),
    "images by a flag": Mistake(
        "predict --config-file {config} --source {images}", "--source", "given without a flag"
    ),
    "flag that there is not": Mistake(f"{TRAIN} --colour red", "--colour", "gn-detect train --help"),
    "flag before the command": Mistake("--config-file {config} train", "--config-file", "after its name"),
    "flag without its value": Mistake("train --config-file", "--config-file", "gn-detect train --help"),
    "word for a number": Mistake(f"{TRAIN} --num-gpus two", "--num-gpus", "gn-detect train --help"),
    "nothing to work on": Mistake("predict --config-file {config}", "INPUT", "gn-detect predict --help"),
    "word too many": Mistake("report {folder}/a {folder}/b", "b", "gn-detect report --help"),
    "no config": Mistake("train", "config", "--config-file FILE"),
    "config that is not there": Mistake(
        "train --config-file quick/dmeo.yaml", "quick/dmeo.yaml", "quick/demo.yaml"
    ),
    "config that is no YAML": Mistake(
        "train --config-file {folder}/bad.yaml",
        "bad.yaml: line 2",
        "not YAML",
        _file("bad.yaml", "MODEL: {\n :"),
    ),
    "key that stands twice": Mistake(
        "train --config-file {folder}/twice.yaml", "SEED", "twice", _file("twice.yaml", "SEED: 1\nSEED: 2\n")
    ),
    "unknown key": Mistake(f"{TRAIN} SOLVER.BASE_RL 0.1", "SOLVER.BASE_RL", "did you mean SOLVER.BASE_LR"),
    "value of another type": Mistake(f"{TRAIN} SOLVER.MAX_ITER many", "SOLVER.MAX_ITER", "integer"),
    "key without a value": Mistake(f"{TRAIN} SOLVER.MAX_ITER", "SOLVER.MAX_ITER", "KEY VALUE"),
    "value that is not implemented": Mistake(
        f"{TRAIN} MODEL.KEYPOINT_ON True", "MODEL.KEYPOINT_ON", "must be False"
    ),
    "nothing to explain": Mistake("config explain", "explain", "such as gn-detect config explain"),
    "unknown key to explain": Mistake("config explain MODEL.NUM_CLASES", "NUM_CLASES", "NUM_CLASSES"),
    "groups that do not divide": Mistake(f"{TRAIN} MODEL.GN.NUM_GROUPS 3", "MODEL.GN.NUM_GROUPS", "MODEL"),
    "annotation file missing": Mistake(
        f"{TRAIN}", "annotations.json", "correct DATASETS.REGISTER", lambda case: case.train.unlink()
    ),
    "annotation file missing, own data": Mistake(
        "train --train-json none.json --train-images {images}", "none.json", "correct its path"
    ),
    "not JSON": Mistake(OWN, "annotations.json", "give a COCO annotation file", _text("hello")),
    "not COCO": Mistake(OWN, "annotations.json", "images", _text('{"a": 1}')),
    "a list": Mistake(OWN, "annotations.json", "give a COCO annotation file", _text("[1, 2]")),
    "result file": Mistake(
        OWN,
        "a file of results",
        "give the annotations",
        _text('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]'),
    ),
    "annotations of another tool": Mistake(
        "train --train-json {folder}/data.yaml --train-images {images}",
        "YOLO labels",
        "FiftyOne or Datumaro",
        _file("data.yaml", "nc: 1\nnames: [cat]\n"),
    ),
    "folder for a file": Mistake(
        "doctor {images} --images {images}", "it is a folder", "give the COCO annotation file"
    ),
    "boxes that are fractions": Mistake(
        OWN,
        "boxes are fractions",
        "--fix OUT.json",
        _edit(lambda c: [_make_fractions(a) for a in c["annotations"]]),
    ),
    "no categories": Mistake(
        OWN, "annotations.json", "add the classes", _edit(lambda c: c["categories"].clear())
    ),
    "no images in the JSON": Mistake(
        OWN, "annotations.json", "give a file", _edit(lambda c: c["images"].clear())
    ),
    "no objects": Mistake(OWN, "annotations.json", "annotate", _edit(lambda c: c["annotations"].clear())),
    "unlisted category": Mistake(
        OWN, "category id 55", "add the category", _edit(lambda c: c["annotations"][0].update(category_id=55))
    ),
    "box outside": Mistake(
        OWN, "annotation 2", "correct", _edit(lambda c: c["annotations"][1].update(bbox=[500, 500, 9, 9]))
    ),
    "id that occurs twice": Mistake(
        OWN, "annotation id 1", "own id", _edit(lambda c: c["annotations"][1].update(id=1))
    ),
    "object without a mask": Mistake(
        OWN, "annotation 1", "MODEL.MASK_ON False", _edit(lambda c: c["annotations"][0].pop("segmentation"))
    ),
    "images folder missing": Mistake(
        "train --train-json {train} --train-images nowhere", "nowhere", "correct --train-images"
    ),
    "image under another name": Mistake(
        OWN,
        "001.png is there",
        "doctor --fix",
        _edit(lambda c: c["images"][0].update(file_name="C:\\a\\001.png")),
    ),
    "image missing": Mistake(OWN, "001.png", "restore it", _first_image(Path.unlink)),
    "image that is no image": Mistake(
        f"{TRAIN} DATASETS.TEST []", "001.png", "replace", _first_image(lambda p: p.write_text("no picture"))
    ),
    "image that was cut off": Mistake(
        f"{TRAIN} DATASETS.TEST []", "001.png", "replace or remove it", _first_image(_halve)
    ),
    "image outside of the folder": Mistake(
        OWN,
        "../images/001.png",
        "set DATASETS.ALLOW_OUTSIDE True",
        _edit(lambda c: c["images"][0].update(file_name="../images/001.png")),
    ),
    "annotations that have no end": Mistake(
        "train --train-json /dev/zero --train-images {images}", "/dev/zero", "give a regular file"
    ),
    "config that grows": Mistake(
        "train --config-file {folder}/bomb.yaml", "bomb.yaml", "correct that line", _file("bomb.yaml", BOMB)
    ),
    "image of another size": Mistake(
        f"{TRAIN} DATASETS.TEST []",
        "001.png",
        "correct",
        _first_image(lambda p: Image.new("RGB", (9, 9)).save(p)),
    ),
    "other number of classes": Mistake(
        f"{TRAIN} MODEL.ROI_HEADS.NUM_CLASSES 5", "MODEL.ROI_HEADS.NUM_CLASSES", "set it to 2"
    ),
    "train and val of other classes": Mistake(TRAIN, "circle", "give both the same", _rename_category),
    "two training sets of other classes": Mistake(
        f"{TRAIN} DATASETS.TRAIN [tiny_train,tiny_test] DATASETS.TEST []",
        "circle",
        "give both the same",
        _rename_category,
    ),
    "half of a pair of flags": Mistake("train --train-json {train}", "--train-images", "give both"),
    "unknown dataset": Mistake(f"{TRAIN} DATASETS.TRAIN tiny_trian", "tiny_trian", "tiny_train"),
    "unequal flags of the doctor": Mistake(
        "doctor {train} {val} --images {images}", "2 annotation files", "each"
    ),
    "nothing to evaluate": Mistake(EVAL, "MODEL.WEIGHTS", "add --weights"),
    "nothing to evaluate on": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth DATASETS.TEST []", "DATASETS.TEST", "--val-json", _weights([])
    ),
    "nothing to predict with": Mistake(PREDICT, "MODEL.WEIGHTS", "add --weights"),
    "weights missing": Mistake(f"{OWN} --weights none.pth", "none.pth", "check MODEL.WEIGHTS"),
    "weights named twice": Mistake(f"{TRAIN} --weights a.pth MODEL.WEIGHTS b.pth", "a.pth", "give one"),
    "weights named twice, to predict": Mistake(
        f"{PREDICT} --weights a.pth MODEL.WEIGHTS b.pth", "a.pth", "give one"
    ),
    "weights cut short": Mistake(f"{EVAL} --weights {{folder}}/w.pth", "w.pth", "again", _weights([], _cut)),
    "weights that are none": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth", "w.pth", "checkpoint", _file("w.pth", "not weights at all")
    ),
    "weights that would run code": Mistake(
        f"{EVAL} --weights {{folder}}/w.pkl",
        "posix",
        "not",
        lambda case: _hostile(case.config.parent / "w.pkl"),
    ),
    "weights of another norm": Mistake(
        f"{TRAIN} --weights {{folder}}/w.pth", "w.pth", "gn-detect convert", _weights(BN)
    ),
    "weights of other groups": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth",
        "w.pth",
        "set MODEL.GN.NUM_GROUPS 1",
        _weights(["MODEL.GN.NUM_GROUPS", "1"]),
    ),
    "weights of another network": Mistake(
        f"{TRAIN} --weights {{folder}}/w.pth",
        "w.pth",
        "configuration",
        _weights(["MODEL.FPN.OUT_CHANNELS", "8"]),
    ),
    "weights of other classes": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth",
        "NUM_CLASSES",
        "to 3",
        _weights(["MODEL.ROI_HEADS.NUM_CLASSES", "3"]),
    ),
    "weights of classes of other names": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth",
        "bar, circle",
        "--other-classes",
        _weights([], lambda path: _state(path, class_names=["bar", "circle"])),
    ),
    "prediction of classes of other names": Mistake(
        f"{PREDICT} --weights {{folder}}/w.pth --annotations {{train}}",
        "bar, circle",
        "--other-classes",
        _weights([], lambda path: _state(path, class_names=["bar", "circle"])),
    ),
    "weights of other input": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth", "INPUT.FORMAT RGB", "--fix-config", _weights([], _of_rgb)
    ),
    "weights that are no ResNet": Mistake(
        f"{OWN} --weights {{folder}}/v.pth",
        "v.pth",
        "--config-file",
        lambda case: torch.save({"features.0.weight": torch.zeros(3, 3)}, case.config.parent / "v.pth"),
    ),
    "unknown name in the zoo": Mistake(f"{OWN} --weights zoo://R-50-NG", "R-50-NG", "R-50-GN"),
    "offline": Mistake(
        "eval --config-file {config} --weights https://127.0.0.1:9/w.pth",
        "127.0.0.1:9/w.pth",
        "put it at",
        retries=True,
    ),
    "no GPU": Mistake(f"{TRAIN} MODEL.DEVICE cuda", "MODEL.DEVICE", "cpu or auto", needs_no_gpu=True),
    "more GPUs than there are": Mistake(
        f"{TRAIN} --num-gpus 99 MODEL.DEVICE auto", "--num-gpus 99, but PyTorch finds", "MODEL.DEVICE cpu"
    ),
    "no GPU, own data": Mistake(f"{OWN} --num-gpus 0", "--num-gpus 0", "MODEL.DEVICE cpu"),
    "batch that processes do not divide": Mistake(
        f"{TRAIN} --num-gpus 2 SOLVER.IMS_PER_BATCH 3", "SOLVER.IMS_PER_BATCH", "multiple of 2"
    ),
    "output folder that cannot be made": Mistake(
        f"{TRAIN} OUTPUT_DIR {{folder}}/file/run", "file/run", "choose another folder", _file("file", "")
    ),
    "resume without the checkpoint": Mistake(
        f"{TRAIN} --resume", "model_0000009.pth", "without --resume", _last_checkpoint
    ),
    "resume with other settings": Mistake(
        f"{TRAIN} --resume SOLVER.BASE_LR 0.5", "SOLVER.BASE_LR was 0.02", "--allow-changes", _run
    ),
    "resume with other classes": Mistake(
        f"{TRAIN} --resume",
        "circle, bar",
        "--other-classes",
        lambda case: (_run(case), case.edit(lambda c: c["categories"][0].update(name="circle"))),
    ),
    "resume of nothing": Mistake(f"{TRAIN} --resume", "run", "leave out --resume"),
    "resume of nothing, to evaluate": Mistake(f"{EVAL} --resume", "has no checkpoint", "add --weights"),
    "changes without a resume": Mistake(f"{TRAIN} --allow-changes", "--allow-changes", "add --resume"),
    "no image to predict": Mistake("predict --config-file {config} nowhere", "nowhere", "give image files"),
    "predict into the folder of the images": Mistake(
        "predict --config-file {config} --output {images} {images}", "001.png", "another --output folder"
    ),
    "folder of another training": Mistake(TRAIN, "OUTPUT_DIR", "or give this run another", _in_use),
    "weights with a damaged bit": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth", "w.pth", "copy or download it again", _weights([], _flip)
    ),
    "dataset with the name of a path": Mistake(f"{TRAIN} DATASETS.TEST ../x", "DATASETS.TEST", "leave out"),
    "key among the images": Mistake(
        "predict --config-file {config} SOLVER.MAX_ITER 3", "no images", "before"
    ),
    "threshold in percent": Mistake(f"{PREDICT} --threshold 50", "--threshold 50", "from 0 to 1"),
    "output folder of predict as a key": Mistake(f"{PREDICT} OUTPUT_DIR out", "OUTPUT_DIR", "--output"),
    "exported detector as weights": Mistake(f"{PREDICT} --weights m.onnx", "m.onnx", "by --model"),
    "key of predict without its value": Mistake(
        f"{PREDICT} --weights w.pth MODEL.DEVICE", "MODEL.DEVICE", "give KEY VALUE pairs"
    ),
    "doctor without images": Mistake("doctor {train}", "--images", "--no-images"),
    "repair with another folder": Mistake(
        "doctor {train} --images {folder} --fix {output}", "none of the 4 images", "is their folder"
    ),
    "repair that removes much": Mistake(
        "doctor {train} --images {images} --fix {output}",
        "2 of 8 annotations (id 1, 2)",
        "add --drop",
        _edit(lambda c: [a.update(category_id=55) for a in c["annotations"][:2]]),
    ),
    "report of another kind": Mistake("report {folder} --output page.pdf", "page.pdf", "in .html"),
    "convert without a format": Mistake("convert {folder}/w.pth gn", "gn", "--format", _weights(BN)),
    "calibrate a detector without its config": Mistake(
        "calibrate {folder}/w.pth {folder}/w.pth {folder}/c.pth --images {images}",
        "--config-file",
        "trained with",
        _weights(BN),
    ),
    "options among the weights": Mistake(
        "convert {folder}/w.pth {folder}/gn.pth",
        "w.pth",
        "save its state dict alone",
        _weights(BN, _mix_options),
    ),
    "model without weights": Mistake("convert resnet18 gn.pth", "resnet18", "--weights DEFAULT"),
    "plot of no run": Mistake("plot {folder}/nowhere", "nowhere", "run"),
    "replay of no black box": Mistake("replay {folder}/nowhere", "nowhere", "black_box"),
}


def skip_reason(mistake: Mistake) -> str | None:
    """Why the mistake cannot be made here."""
    return "there is a GPU here" if mistake.needs_no_gpu and torch.cuda.is_available() else None


def arguments(mistake: Mistake, case: Case) -> list[str]:
    """The command of a mistake with the test's files."""
    files = {
        "config": case.config,
        "train": case.train,
        "val": case.val,
        "images": case.train.parent / "images",
        "folder": case.config.parent,
        "output": case.output,
    }
    return [word.format(**files) for word in mistake.command.split()]


def provoke(
    mistake: Mistake, case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Make the mistake; returns the message, with the test's folder as ``FOLDER``."""
    monkeypatch.chdir(case.config.parent)
    monkeypatch.setenv("GN_DETECT_CACHE", str(case.config.parent / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    mistake.prepare(case)
    assert main(arguments(mistake, case)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 or mistake.retries, lines
    assert lines[-1].startswith("error: ")
    return lines[-1].removeprefix("error: ").replace(str(case.config.parent), "FOLDER")
