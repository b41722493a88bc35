"""What is said before a training run, from the loaded arrays alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_detect.data import CocoDataset, DatasetSource, warn_of_faults
from gn_detect.data.doctor.quick import quick_faults

Write = Callable[[Any], DatasetSource]


def counts(source: DatasetSource, **options: Any) -> dict[str, int]:
    return {kind: count for kind, count, _ in quick_faults(CocoDataset(source, **options)) if count}


def test_a_good_dataset(write_dataset: Write, small_coco: dict, caplog: pytest.LogCaptureFixture) -> None:
    small_coco["annotations"].pop(3)  # of a handful a crowd is many
    source = write_dataset(small_coco)
    assert counts(source) == {} == counts(source, masks=False)
    with caplog.at_level(logging.WARNING):
        warn_of_faults(CocoDataset(source))
    assert caplog.text == ""


def test_faults_are_counted_with_an_example(
    write_dataset: Write, small_coco: dict, caplog: pytest.LogCaptureFixture
) -> None:
    small_coco["annotations"].pop(3)
    first = small_coco["annotations"][0]
    small_coco["annotations"] += [
        {**first, "id": 50},
        {**first, "id": 51, "bbox": [10, 10, 30, 26]},
        {**first, "id": 52, "bbox": [10, 10, 90, 20]},
    ]
    small_coco["categories"].append({"id": 99, "name": "yak"})
    source = write_dataset(small_coco)
    assert counts(source) == {
        "box-overlaps-border": 1,
        "box-mask": 2,
        "duplicate-annotation": 1,
        "unused-category": 1,
    }
    with caplog.at_level(logging.WARNING):
        warn_of_faults(CocoDataset(source))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 4
    assert messages[0].startswith("small: 1 x boxes that reach out")
    assert "annotation 52;" in messages[0]
    assert messages[-1].startswith("gn-detect doctor FILE")


def test_files_that_are_in_both_parts(
    write_dataset: Write, small_coco: dict, caplog: pytest.LogCaptureFixture
) -> None:
    small_coco["annotations"].pop(3)
    train, val = (CocoDataset(write_dataset(small_coco)) for _ in range(2))
    with caplog.at_level(logging.WARNING):
        warn_of_faults(train, [val])
    assert "small: 4 x images in two files" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_faults(train, [train])
    assert caplog.text == ""


def test_no_objects_at_all(write_dataset: Write, small_coco: dict) -> None:
    small_coco["annotations"] = []
    assert counts(write_dataset(small_coco)) == {"unused-category": 3}


def test_mixed_masks(write_dataset: Write, small_coco: dict) -> None:
    """RLE have no polygons to compare with; their neighbours are compared all the same."""
    dataset = CocoDataset(write_dataset(small_coco))
    assert np.flatnonzero(np.diff(dataset.objects.masks.first_byte)).tolist() == [0]
    small_coco["annotations"][4]["bbox"] = [30, 30, 20, 20]
    assert counts(write_dataset(small_coco))["box-mask"] == 1


def test_16_bit_images_that_would_be_black(write_dataset: Write, small_coco: dict) -> None:
    source = write_dataset(small_coco)
    paths = sorted(source.images.iterdir())
    pixels = {path: np.asarray(Image.open(path).convert("L")).astype(np.uint16) for path in paths}
    for factor, dark in [(1, 1), (16, 1), (256, 0)]:  # 8 and 12 bits in files of 16, and all 16
        for path, values in pixels.items():
            Image.fromarray(values * factor).save(path)
        assert counts(source).get("dark-images", 0) == dark, factor
    Image.fromarray(pixels[paths[0]] * 0).save(paths[0])  # one may well be dark
    assert "dark-images" not in counts(source)
