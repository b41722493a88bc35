"""Mistakes of a user's first hour: how each is made, the code of its message and what it must name.

tests/cli/test_first_hour.py provokes them; docs/troubleshooting.md is checked against what they print.
"""

from __future__ import annotations

import argparse
import json
import re
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
from gn_detect.errors import Code
from gn_detect.modeling import build_model
from gn_detect.weights import norm_settings
from tests.cli.conftest import Case

Prepare = Callable[[Case], Any]


@dataclass(frozen=True)
class Mistake:
    """Attributes:
    command: arguments; {config}, {train}, {val}, {images}, {folder} and {output} are the test's files.
    code: of the message.
    names: what the message must name: the wrong thing, and the flag, key or name to use.
    prepare: what is spoiled before.
    needs_no_gpu: the mistake is none where there is a GPU.
    retries: lines about further tries stand before the message.
    """

    command: str
    code: Code
    names: str | tuple[str, ...]
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
    "command with a typo": Mistake("trian", "unknown-command", ("trian", "train")),
    "command of another tool": Mistake("test", "unknown-command", "test"),
    "flag of another tool": Mistake(
        f"{PREDICT} --confidence-threshold 0.5", "unknown-flag", ("--confidence-threshold", "--threshold")
    ),
    "key given as a flag": Mistake(f"{TRAIN} --lr 0.01", "unknown-flag", ("--lr", "SOLVER.BASE_LR")),
    "epochs under another name": Mistake(
        f"{TRAIN} --num-epochs 12", "unknown-flag", ("--num-epochs", "--epochs")
    ),
    "epochs and iterations": Mistake(
        f"{TRAIN} --epochs 12 SOLVER.MAX_ITER 3", "conflicting-flags", ("--epochs", "SOLVER.MAX_ITER")
    ),
    "a time without a unit": Mistake(f"{TRAIN} --time 2", "bad-argument", ("--time", "2")),
    "key with an equals sign": Mistake(
        f"{TRAIN} SOLVER.MAX_ITER=12", "key-with-equals", "SOLVER.MAX_ITER=12"
    ),
    "key of another tool": Mistake(f"{TRAIN} batch 4", "unknown-key", ("batch", "SOLVER.IMS_PER_BATCH")),
    "images by a flag": Mistake(
        "predict --config-file {config} --source {images}", "unknown-flag", "--source"
    ),
    "flag that there is not": Mistake(f"{TRAIN} --colour red", "unknown-flag", "--colour"),
    "flag before the command": Mistake("--config-file {config} train", "unknown-flag", "--config-file"),
    "flag without its value": Mistake("train --config-file", "missing-argument", "--config-file"),
    "word for a number": Mistake(f"{TRAIN} --num-gpus two", "bad-argument", "--num-gpus"),
    "nothing to work on": Mistake("predict --config-file {config}", "missing-argument", "INPUT"),
    "word too many": Mistake("report {folder}/a {folder}/b", "extra-argument", "b"),
    "no config": Mistake("train", "no-config", ("config", "--config-file")),
    "config that is not there": Mistake(
        "train --config-file quick/dmeo.yaml", "missing-config", ("quick/dmeo.yaml", "quick/demo.yaml")
    ),
    "config that is no YAML": Mistake(
        "train --config-file {folder}/bad.yaml",
        "not-yaml",
        "bad.yaml: line 2",
        _file("bad.yaml", "MODEL: {\n :"),
    ),
    "key that stands twice": Mistake(
        "train --config-file {folder}/twice.yaml",
        "not-yaml",
        "SEED",
        _file("twice.yaml", "SEED: 1\nSEED: 2\n"),
    ),
    "unknown key": Mistake(
        f"{TRAIN} SOLVER.BASE_RL 0.1", "unknown-key", ("SOLVER.BASE_RL", "SOLVER.BASE_LR")
    ),
    "value of another type": Mistake(f"{TRAIN} SOLVER.MAX_ITER many", "bad-value", "SOLVER.MAX_ITER"),
    "key without a value": Mistake(f"{TRAIN} SOLVER.MAX_ITER", "missing-value", "SOLVER.MAX_ITER"),
    "value that is not implemented": Mistake(
        f"{TRAIN} MODEL.KEYPOINT_ON True", "unsupported-value", "MODEL.KEYPOINT_ON"
    ),
    "nothing to explain": Mistake("config explain", "missing-argument", "explain"),
    "unknown key to explain": Mistake(
        "config explain MODEL.NUM_CLASES", "unknown-key", ("NUM_CLASES", "NUM_CLASSES")
    ),
    "groups that do not divide": Mistake(
        f"{TRAIN} MODEL.GN.NUM_GROUPS 3", "conflicting-keys", "MODEL.GN.NUM_GROUPS"
    ),
    "annotation file missing": Mistake(
        f"{TRAIN}",
        "missing-annotations",
        ("annotations.json", "DATASETS.REGISTER"),
        lambda case: case.train.unlink(),
    ),
    "annotation file missing, own data": Mistake(
        "train --train-json none.json --train-images {images}", "missing-annotations", "none.json"
    ),
    "not JSON": Mistake(OWN, "not-json", "annotations.json", _text("hello")),
    "not COCO": Mistake(OWN, "not-coco", "annotations.json", _text('{"a": 1}')),
    "a list": Mistake(OWN, "not-coco", "annotations.json", _text("[1, 2]")),
    "result file": Mistake(
        OWN,
        "foreign-format",
        "results",
        _text('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]'),
    ),
    "annotations of another tool": Mistake(
        "train --train-json {folder}/data.yaml --train-images {images}",
        "foreign-format",
        "YOLO labels",
        _file("data.yaml", "nc: 1\nnames: [cat]\n"),
    ),
    "folder for a file": Mistake("doctor {images} --images {images}", "foreign-format", "images"),
    "boxes that are fractions": Mistake(
        OWN,
        "fractions",
        ("boxes", "--fix", "OUT.json"),
        _edit(lambda c: [_make_fractions(a) for a in c["annotations"]]),
    ),
    "no categories": Mistake(OWN, "empty-list", "annotations.json", _edit(lambda c: c["categories"].clear())),
    "no images in the JSON": Mistake(
        OWN, "empty-list", "annotations.json", _edit(lambda c: c["images"].clear())
    ),
    "no objects": Mistake(OWN, "no-objects", "annotations.json", _edit(lambda c: c["annotations"].clear())),
    "unlisted category": Mistake(
        OWN,
        "dangling-category",
        "category id 55",
        _edit(lambda c: c["annotations"][0].update(category_id=55)),
    ),
    "box outside": Mistake(
        OWN, "box-outside", "annotation 2", _edit(lambda c: c["annotations"][1].update(bbox=[500, 500, 9, 9]))
    ),
    "id that occurs twice": Mistake(
        OWN, "duplicate-annotation-id", "annotation id 1", _edit(lambda c: c["annotations"][1].update(id=1))
    ),
    "object without a mask": Mistake(
        OWN,
        "no-mask",
        ("annotation 1", "MODEL.MASK_ON"),
        _edit(lambda c: c["annotations"][0].pop("segmentation")),
    ),
    "images folder missing": Mistake(
        "train --train-json {train} --train-images nowhere",
        "missing-images-folder",
        ("nowhere", "--train-images"),
    ),
    "image under another name": Mistake(
        OWN,
        "misnamed-image",
        ("001.png", "--fix"),
        _edit(lambda c: c["images"][0].update(file_name="C:\\a\\001.png")),
    ),
    "image missing": Mistake(OWN, "missing-image", "001.png", _first_image(Path.unlink)),
    "image that is no image": Mistake(
        f"{TRAIN} DATASETS.TEST []",
        "unreadable-image",
        "001.png",
        _first_image(lambda p: p.write_text("no picture")),
    ),
    "image that was cut off": Mistake(
        f"{TRAIN} DATASETS.TEST []", "unreadable-image", "001.png", _first_image(_halve)
    ),
    "image outside of the folder": Mistake(
        OWN,
        "image-outside",
        ("../images/001.png", "DATASETS.ALLOW_OUTSIDE"),
        _edit(lambda c: c["images"][0].update(file_name="../images/001.png")),
    ),
    "annotations that have no end": Mistake(
        "train --train-json /dev/zero --train-images {images}", "not-a-file", "/dev/zero"
    ),
    "config that grows": Mistake(
        "train --config-file {folder}/bomb.yaml", "not-yaml", "bomb.yaml", _file("bomb.yaml", BOMB)
    ),
    "image of another size": Mistake(
        f"{TRAIN} DATASETS.TEST []",
        "size-differs",
        "001.png",
        _first_image(lambda p: Image.new("RGB", (9, 9)).save(p)),
    ),
    "other number of classes": Mistake(
        f"{TRAIN} MODEL.ROI_HEADS.NUM_CLASSES 5",
        "num-classes-differ",
        ("MODEL.ROI_HEADS.NUM_CLASSES", "set it to 2"),
    ),
    "train and val of other classes": Mistake(TRAIN, "classes-differ", "circle", _rename_category),
    "two training sets of other classes": Mistake(
        f"{TRAIN} DATASETS.TRAIN [tiny_train,tiny_test] DATASETS.TEST []",
        "classes-differ",
        "circle",
        _rename_category,
    ),
    "half of a pair of flags": Mistake("train --train-json {train}", "lone-flag", "--train-images"),
    "unknown dataset": Mistake(
        f"{TRAIN} DATASETS.TRAIN tiny_trian", "unknown-dataset", ("tiny_trian", "tiny_train")
    ),
    "unequal flags of the doctor": Mistake(
        "doctor {train} {val} --images {images}", "missing-argument", "--images"
    ),
    "nothing to evaluate": Mistake(EVAL, "no-weights", ("MODEL.WEIGHTS", "--weights")),
    "nothing to evaluate on": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth DATASETS.TEST []",
        "no-dataset",
        ("DATASETS.TEST", "--val-json"),
        _weights([]),
    ),
    "nothing to predict with": Mistake(PREDICT, "no-weights", ("MODEL.WEIGHTS", "--weights")),
    "weights missing": Mistake(f"{OWN} --weights none.pth", "missing-weights", ("none.pth", "MODEL.WEIGHTS")),
    "weights named twice": Mistake(
        f"{TRAIN} --weights a.pth MODEL.WEIGHTS b.pth", "conflicting-flags", "a.pth"
    ),
    "weights named twice, to predict": Mistake(
        f"{PREDICT} --weights a.pth MODEL.WEIGHTS b.pth", "conflicting-flags", "a.pth"
    ),
    "weights cut short": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth", "damaged-weights", "w.pth", _weights([], _cut)
    ),
    "weights that are none": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth", "not-weights", "w.pth", _file("w.pth", "not weights at all")
    ),
    "weights that would run code": Mistake(
        f"{EVAL} --weights {{folder}}/w.pkl",
        "unsafe-file",
        "posix",
        lambda case: _hostile(case.config.parent / "w.pkl"),
    ),
    "weights of another norm": Mistake(
        f"{TRAIN} --weights {{folder}}/w.pth", "other-norm", "w.pth", _weights(BN)
    ),
    "weights of other groups": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth",
        "other-groups",
        ("w.pth", "MODEL.GN.NUM_GROUPS"),
        _weights(["MODEL.GN.NUM_GROUPS", "1"]),
    ),
    "weights of another network": Mistake(
        f"{TRAIN} --weights {{folder}}/w.pth",
        "other-network",
        "w.pth",
        _weights(["MODEL.FPN.OUT_CHANNELS", "8"]),
    ),
    "weights of other classes": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth",
        "num-classes-differ",
        ("NUM_CLASSES", "to 3"),
        _weights(["MODEL.ROI_HEADS.NUM_CLASSES", "3"]),
    ),
    "weights of classes of other names": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth",
        "classes-differ",
        ("bar, circle", "--other-classes"),
        _weights([], lambda path: _state(path, class_names=["bar", "circle"])),
    ),
    "prediction of classes of other names": Mistake(
        f"{PREDICT} --weights {{folder}}/w.pth --annotations {{train}}",
        "classes-differ",
        ("bar, circle", "--other-classes"),
        _weights([], lambda path: _state(path, class_names=["bar", "circle"])),
    ),
    "weights of other input": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth",
        "other-input",
        ("INPUT.FORMAT RGB", "--fix-config"),
        _weights([], _of_rgb),
    ),
    "weights that are no ResNet": Mistake(
        f"{OWN} --weights {{folder}}/v.pth",
        "unknown-network",
        ("v.pth", "--config-file"),
        lambda case: torch.save({"features.0.weight": torch.zeros(3, 3)}, case.config.parent / "v.pth"),
    ),
    "unknown name in the zoo": Mistake(
        f"{OWN} --weights zoo://R-50-NG", "unknown-weights", ("R-50-NG", "R-50-GN")
    ),
    "offline": Mistake(
        "eval --config-file {config} --weights https://127.0.0.1:9/w.pth",
        "download-failed",
        "127.0.0.1:9/w.pth",
        retries=True,
    ),
    "no GPU": Mistake(f"{TRAIN} MODEL.DEVICE cuda", "no-gpu", "MODEL.DEVICE", needs_no_gpu=True),
    "more GPUs than there are": Mistake(
        f"{TRAIN} --num-gpus 99 MODEL.DEVICE auto", "no-gpu", ("--num-gpus 99", "MODEL.DEVICE")
    ),
    "no GPU, own data": Mistake(f"{OWN} --num-gpus 0", "bad-argument", ("--num-gpus 0", "MODEL.DEVICE")),
    "batch that processes do not divide": Mistake(
        f"{TRAIN} --num-gpus 2 SOLVER.IMS_PER_BATCH 3",
        "indivisible-batch",
        ("SOLVER.IMS_PER_BATCH", "multiple of 2"),
    ),
    "output folder that cannot be made": Mistake(
        f"{TRAIN} OUTPUT_DIR {{folder}}/file/run", "cannot-write", "file/run", _file("file", "")
    ),
    "resume without the checkpoint": Mistake(
        f"{TRAIN} --resume", "no-checkpoint", ("model_0000009.pth", "--resume"), _last_checkpoint
    ),
    "resume with other settings": Mistake(
        f"{TRAIN} --resume SOLVER.BASE_LR 0.5",
        "other-run",
        ("SOLVER.BASE_LR was 0.02", "--allow-changes"),
        _run,
    ),
    "resume with other classes": Mistake(
        f"{TRAIN} --resume",
        "classes-differ",
        ("circle, bar", "--other-classes"),
        lambda case: (_run(case), case.edit(lambda c: c["categories"][0].update(name="circle"))),
    ),
    "resume of nothing": Mistake(f"{TRAIN} --resume", "no-run", ("run", "--resume")),
    "resume of nothing, to evaluate": Mistake(f"{EVAL} --resume", "no-weights", "--weights"),
    "changes without a resume": Mistake(
        f"{TRAIN} --allow-changes", "lone-flag", ("--allow-changes", "--resume")
    ),
    "no image to predict": Mistake("predict --config-file {config} nowhere", "no-such-image", "nowhere"),
    "predict into the folder of the images": Mistake(
        "predict --config-file {config} --output {images} {images}", "replaced-file", ("001.png", "--output")
    ),
    "folder of another training": Mistake(TRAIN, "folder-in-use", "OUTPUT_DIR", _in_use),
    "weights with a damaged bit": Mistake(
        f"{EVAL} --weights {{folder}}/w.pth", "damaged-weights", "w.pth", _weights([], _flip)
    ),
    "dataset with the name of a path": Mistake(f"{TRAIN} DATASETS.TEST ../x", "bad-value", "DATASETS.TEST"),
    "key among the images": Mistake(
        "predict --config-file {config} SOLVER.MAX_ITER 3", "missing-argument", "images"
    ),
    "threshold in percent": Mistake(f"{PREDICT} --threshold 50", "bad-argument", "--threshold 50"),
    "output folder of predict as a key": Mistake(
        f"{PREDICT} OUTPUT_DIR out", "conflicting-flags", ("OUTPUT_DIR", "--output")
    ),
    "exported detector as weights": Mistake(
        f"{PREDICT} --weights m.onnx", "conflicting-flags", ("m.onnx", "--model")
    ),
    "key of predict without its value": Mistake(
        f"{PREDICT} --weights w.pth MODEL.DEVICE", "missing-value", "MODEL.DEVICE"
    ),
    "doctor without images": Mistake("doctor {train}", "missing-argument", ("--images", "--no-images")),
    "repair with another folder": Mistake(
        "doctor {train} --images {folder} --fix {output}", "lossy-repair", "4 images"
    ),
    "repair that removes much": Mistake(
        "doctor {train} --images {images} --fix {output}",
        "lossy-repair",
        ("2 of 8 annotations (id 1, 2)", "--drop"),
        _edit(lambda c: [a.update(category_id=55) for a in c["annotations"][:2]]),
    ),
    "report of another kind": Mistake(
        "report {folder} --output page.pdf", "wrong-ending", ("page.pdf", ".html")
    ),
    "convert without a format": Mistake(
        "convert {folder}/w.pth gn", "wrong-ending", ("gn", "--format"), _weights(BN)
    ),
    "calibrate a detector without its config": Mistake(
        "calibrate {folder}/w.pth {folder}/w.pth {folder}/c.pth --images {images}",
        "no-config",
        "--config-file",
        _weights(BN),
    ),
    "options among the weights": Mistake(
        "convert {folder}/w.pth {folder}/gn.pth",
        "unsafe-file",
        "w.pth",
        _weights(BN, _mix_options),
    ),
    "model without weights": Mistake("convert resnet18 gn.pth", "no-weights", ("resnet18", "--weights")),
    "plot of no run": Mistake("plot {folder}/nowhere", "no-metrics", "nowhere"),
    "replay of no black box": Mistake("replay {folder}/nowhere", "not-a-run", "nowhere"),
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
) -> tuple[str, str]:
    """Make the mistake; returns the message, with the test's folder as ``FOLDER``, and its code."""
    monkeypatch.chdir(case.config.parent)
    monkeypatch.setenv("GN_DETECT_CACHE", str(case.config.parent / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    mistake.prepare(case)
    assert main(arguments(mistake, case)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 or mistake.retries, lines
    line = re.fullmatch(r"error: (.+) \[([a-z-]+)\]", lines[-1])
    assert line is not None, lines[-1]
    return line[1].replace(str(case.config.parent), "FOLDER"), line[2]
