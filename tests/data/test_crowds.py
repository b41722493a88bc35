"""Crowds that training leaves out are said when the dataset is read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from gn_detect.data import CocoDataset, DatasetSource

Write = Callable[[Any], DatasetSource]


def warned(source: DatasetSource, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        CocoDataset(source)
    return "".join(line for line in caplog.messages if "crowds" in line)


def test_crowds_that_are_left_out(
    write_dataset: Write, small_coco: dict, caplog: pytest.LogCaptureFixture
) -> None:
    """More than 1 in 20, or a few that are single small objects."""
    entries = small_coco["annotations"]
    source = write_dataset(small_coco)
    text = warned(source, caplog)
    assert text.startswith(f"{source.annotations}: 1 of 5 objects are crowds")
    assert "set 'iscrowd' 0: gn-detect doctor --fix OUT.json --no-crowds does that" in text
    x = [{**entries[0], "id": 100 + i, "bbox": [0, 0, 5 + i, 9]} for i in range(16)]
    entries += [{**e, "segmentation": [[0, 0, e["bbox"][2], 0, e["bbox"][2], 9, 0, 9]]} for e in x]
    assert warned(write_dataset(small_coco), caplog) == ""
    entries[3] |= {"segmentation": {"size": [90, 60], "counts": [91, 5, 85, 5, 5214]}, "bbox": [1, 1, 2, 5]}
    assert (
        "1 of 21 objects are crowds ('iscrowd' 1) and left out of training; 1 of the 1 looked at"
        in warned(write_dataset(small_coco), caplog)
    )
    entries[3]["segmentation"]["counts"] = [91, 5, 175, 5, 5124]  # two pieces
    assert warned(write_dataset(small_coco), caplog) == ""
