"""The benchmark does real work and says where the time goes; no test looks at how long it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gn_detect.cli import main
from gn_detect.engine.benchmark import Workload, write_workload

SMALL = [
    *("--config-file", "quick/demo.yaml", "--size", "64", "96", "--objects", "3", "--iterations", "2"),
]


@pytest.mark.parametrize(
    ("mode", "parts"),
    [
        ("train", {"data", "backbone", "fpn", "rpn", "roi_heads", "losses", "backward", "optimizer"}),
        ("infer", {"data", "backbone", "fpn", "rpn", "roi_heads", "paste_masks"}),
    ],
)
def test_parts_of_a_step(
    mode: str, parts: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    assert main(["bench", mode, *SMALL, "--json", str(path), "MODEL.DEVICE", "cpu"]) == 0
    report = json.loads(path.read_text())
    assert set(report["parts"]) >= parts - {"losses"} and all(ms > 0 for ms in report["parts"].values())
    assert len(report["seconds"]) == 2 and report["summary"] > 0
    printed = capsys.readouterr().out
    assert "one step: median" in printed and "backbone" in printed


def test_the_workload_is_the_same_each_time(tmp_path: Path) -> None:
    first = write_workload(tmp_path / "a", Workload(64, 96))
    second = write_workload(tmp_path / "b", Workload(64, 96))
    assert (first[0] == second[0]).all() and first[0].shape == (1000, 4)
    assert (tmp_path / "a/1.png").read_bytes() == (tmp_path / "b/1.png").read_bytes()
    assert (tmp_path / "a/annotations.json").read_text() == (tmp_path / "b/annotations.json").read_text()
