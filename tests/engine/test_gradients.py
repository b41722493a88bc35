"""Several processes, or several parts of a batch, give the gradients of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.gradients import (
    compare,
    make_config,
    of_backbone,
    of_detector,
    of_detector_by_graphs,
    relative_difference,
)


@pytest.mark.usefixtures("quick_launch")
def test_two_processes_and_two_parts_give_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    assert all(value < 1e-6 for value in compare(of_backbone, "GN", tmp_path).values())


@pytest.mark.usefixtures("quick_launch")
def test_a_step_by_graphs_averages_the_gradients_of_two_processes(tmp_path: Path) -> None:
    """As well as PyTorch's wrapper does: the share of an image in the masks' loss depends on its process."""
    (folder := tmp_path / "wrapper").mkdir()
    expected = compare(of_detector, "GN", folder)["two processes"]
    found = compare(of_detector_by_graphs, "GN", tmp_path)["two processes"]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("norm", "is_equal"), [("GN", True), ("BN", False)])
def test_two_parts_of_a_batch(tmp_path: Path, norm: str, is_equal: bool) -> None:
    """Batch norm sees the other images of its part, group norm sees one image."""
    cfg = make_config(tmp_path, norm)
    difference = relative_difference(of_backbone(cfg, 2), of_backbone(cfg, 1))
    assert (difference < 1e-6) == is_equal
