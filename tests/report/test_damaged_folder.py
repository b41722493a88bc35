"""Report, plot and replay of folders whose files are damaged, or are other files: one line each."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gn_detect.cli import main
from gn_detect.config import load_config
from gn_detect.engine.divergence import CONFIG, STATE, Finding, write_black_box
from gn_detect.modeling import make_model
from gn_detect.structures import Sample, Target
from gn_detect.visualize import metric_points, read_metrics

MakeRun = Callable[..., Path]

METRICS = "metrics.jsonl"
RESULTS = "inference/tiny_test/results.json"
DETECTIONS = "inference/tiny_test/coco_instances_results.json"

DEEP = "[" * 100_000


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The only line of a command that is refused."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


OTHER_SHAPES = [
    "", "[]", "null", '"x"', "{", DEEP, '{"a":' * 100_000, "1" * 5000, "\0", "\ufeff[]",
    '{"bbox": 5}', '{"bbox": [1]}', '{"bbox": {"AP": "40.0"}}', '{"bbox": {"AP": [40.0]}}',
    '{"bbox": {"AP": {"x": 1}}}', '{"bbox": {"AP": Infinity}}', '{"bbox": {"AP": 1' + "0" * 400 + "}}",
    '{"bbox": {"AP": -5}}', '{"bbox": {"AP": true}}', '{"set": {"bbox": {"AP": 40.0}}}',
]  # fmt: skip


def test_a_results_file_of_another_shape_is_one_line(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run()
    for text in OTHER_SHAPES:
        (folder / RESULTS).write_text(text)
        assert RESULTS in refused(capsys, "report", folder)
    assert not (folder / "report.html").exists()


def test_nan_and_null_are_no_value(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / RESULTS).write_text('{"bbox": {"AP": NaN, "AP50": null, "AP75": 0, "APs": 100.0}}')
    assert main(["report", str(folder)]) == 0


@pytest.mark.parametrize("name", ["environment.json", METRICS, RESULTS, DETECTIONS, "config.yaml"])
def test_no_file_of_a_run_can_stop_a_report(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A command that needs the file ends with one line; the others do without it."""
    folder = make_run()
    for kind in ("pipe", "device", "noise", "empty", "folder"):
        replace(folder / name, kind)
        commands = ("report", "plot") if name in (METRICS, "config.yaml") else ("report",)
        few = ["--pictures", "0" if name != DETECTIONS else "1"]
        statuses = {
            command: main([command, str(folder), *(few if command == "report" else [])])
            for command in commands
        }
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert set(statuses.values()) <= {0, 2}
        assert len(errors) == list(statuses.values()).count(2)
        if name == METRICS:
            assert statuses["plot"] == 2
            assert METRICS in errors[-1]


def replace(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(bytes(range(256)) * 20 if kind == "noise" else b"")


GOOD = {"iteration": 0, "total_loss": 2.0, "lr": 0.1, "bbox/AP": 40.0}


@pytest.mark.parametrize(
    "line",
    [
        '{"iteration": 1, "total_lo', "", "[]", "5", "null", "{}", DEEP, "\x1b[2J", '{"iteration": "1"}',
        '{"iteration": NaN, "total_loss": 1}', '{"iteration": null, "total_loss": 1}',
        '{"iteration": -1, "lr": 1}',
        '{"iteration": 1.5, "lr": 1}', '{"iteration": [1], "lr": 1}', '{"iteration": true, "lr": 1}',
        '{"iteration": 1' + "0" * 400 + "}", '{"iteration": 1' + "0" * 5000 + "}", '{"total_loss": 1.0}',
        '{"iteration": 1, "total_loss": "2.0"}', '{"iteration": 1, "total_loss": {"x": 1}}',
    ],
)  # fmt: skip
def test_a_damaged_line_of_metrics_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str
) -> None:
    path = tmp_path / METRICS
    last = {"bbox/AP": 41.0, "total_loss": 1.0, "iteration": 2}  # keys in another order
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(last)}\n")
    with caplog.at_level(logging.WARNING):
        rows = read_metrics(path)
    assert metric_points(rows, "bbox/AP").tolist() == [[0, 40], [2, 41]]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == (
        [f"{path}: 1 of 3 lines are damaged and left out, the first of them line 2"] if line else []
    )


@pytest.mark.usefixtures("real_curves")
@pytest.mark.parametrize(
    "values", [("NaN", "1e308", "-5", "-Infinity"), ("1" + "0" * 400, "1e-320", "NaN", "1e308")]
)
def test_numbers_that_no_training_writes_are_drawn_as_gaps_or_as_they_are(
    make_run: MakeRun, values: tuple[str, ...]
) -> None:
    folder = make_run(evaluated=False)
    rows = [json.dumps({**GOOD, "images_per_second": 1.0, "iteration": i}) for i in range(3)]
    keys = ("total_loss", "lr", "bbox/AP", "images_per_second")
    damaged = "".join(f', "{key}": {value}' for key, value in zip(keys, values, strict=True))
    (folder / METRICS).write_text("\n".join(row[:-1] + damaged + "}" for row in rows))
    assert main(["report", str(folder)]) == 0
    assert main(["plot", str(folder), "--smooth", "2"]) in (0, 2)


def test_metrics_of_damaged_lines_alone_are_refused(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run()
    (folder / METRICS).write_text("x\n" * 5)
    for command in ("plot", "report"):
        assert "no line with an iteration" in refused(capsys, command, folder)


OTHER_DETECTIONS: list[Any] = [
    {"score": "high"}, {"score": None}, {"score": float("nan")}, {"score": 10**400}, {"bbox": "x"},
    {"bbox": [1, 2, 3]}, {"bbox": [10**400] * 4}, {"image_id": 999}, {"image_id": []},
    {"category_id": {}},
    {"segmentation": 5}, {"segmentation": {"size": [10**400, 1], "counts": "0"}},
    {"segmentation": {"size": None, "counts": "0"}}, {"segmentation": [[1, 2]]}, 5, None, [],
]  # fmt: skip


def test_detections_of_other_data_are_said_on_the_page(make_run: MakeRun) -> None:
    folder = make_run()
    entries = json.loads((folder / DETECTIONS).read_text())
    for change in OTHER_DETECTIONS:
        other = entries[1] | change if isinstance(change, dict) else change
        (folder / DETECTIONS).write_text(json.dumps([entries[0], other]))
        assert main(["report", str(folder)]) == 0
        assert "No curves, confusion and pictures: " in (folder / "report.html").read_text(), change


def test_images_of_no_size_are_said_on_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    folder, annotations = make_run(), tmp_path / "val" / "annotations.json"
    content = json.loads(annotations.read_text())
    for size in (-5, 0, float("inf"), float("nan"), 10**400, "x", [64]):
        content["images"][0]["height"] = size
        annotations.write_text(json.dumps(content))
        assert main(["report", str(folder)]) == 0
        assert "No curves, confusion and pictures: " in (folder / "report.html").read_text(), size


@pytest.fixture
def black_box(make_run: MakeRun, tmp_path: Path) -> Path:
    """A record of a step with one image and one object."""
    cfg = load_config(make_run() / "config.yaml")
    polygon = torch.tensor([4.0, 4, 30, 4, 30, 40], dtype=torch.float64).numpy()
    target = Target(torch.tensor([[4.0, 4, 30, 40]]), torch.tensor([1]), [[polygon]])
    sample = Sample(torch.zeros(3, 64, 80, dtype=torch.uint8), 7, "7.png", (64, 80), target)
    folder = tmp_path / "box"
    finding = Finding({"loss_mask": float("nan")}, None, None, None)
    write_black_box(folder, cfg, make_model(cfg), 3, {0: [sample]}, {0: finding}, 1.0)
    text = (folder / CONFIG).read_text().replace("IMS_PER_BATCH: 2", "IMS_PER_BATCH: 1", 1)
    (folder / CONFIG).write_text(text)
    return folder


def test_a_whole_black_box_is_repeated(black_box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(black_box)]) == 0
    assert "process 0: everything is finite" in capsys.readouterr().out


OTHER_PARTS: list[tuple[str, Any]] = [
    ("iteration", "3"), ("iteration", -1), ("iteration", 10**30), ("iteration", None), ("scale", "1"),
    ("scale", 0.0), ("scale", float("nan")), ("scale", [1.0]), ("batches", None), ("batches", {}),
    ("batches", {0: []}), ("batches", {"0": [1]}), ("batches", {0: 5}), ("batches", {0: [5]}),
    ("group_norm_eps", {"x": -1.0}), ("group_norm_eps", {"x": 10**400}), ("group_norm_eps", [1]),
    ("image", "x"), ("image", torch.zeros(3, 64, 80)), ("image", torch.zeros(0, dtype=torch.uint8)),
    ("boxes", None), ("boxes", torch.zeros(2, 4)), ("boxes", torch.full((1, 4), float("nan"))),
    ("boxes", torch.zeros(1, 4).to_sparse()), ("labels", torch.tensor([2])),
    ("labels", torch.tensor([-1])),
    ("labels", torch.tensor([0.5])), ("labels", [1]), ("masks", None), ("masks", []), ("masks", [5]),
    ("masks", [[torch.tensor([1.0, 2])]]), ("masks", [[torch.full((6,), 1e30)]]),
    ("masks", [torch.zeros(2, 2, dtype=torch.bool)]), ("original_size", 5), ("original_size", ["x", "y"]),
]  # fmt: skip


def test_a_damaged_black_box_is_one_line(black_box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (black_box / STATE).read_bytes()
    for key, value in OTHER_PARTS:
        content = torch.load(io.BytesIO(whole), weights_only=True)
        if key in content or key == "group_norm_eps":
            content[key] = value
        else:
            content["batches"][0][0][key] = value
        torch.save(content, black_box / STATE)
        assert STATE in refused(capsys, "replay", black_box), (key, value)


def test_a_black_box_without_a_part_is_one_line(black_box: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (black_box / STATE).read_bytes()
    for key in ("iteration", "scale", "batches", "image", "labels", "boxes", "masks"):
        content = torch.load(io.BytesIO(whole), weights_only=True)
        del (content if key in content else content["batches"][0][0])[key]
        torch.save(content, black_box / STATE)
        assert f"it has no '{key}'" in refused(capsys, "replay", black_box)
