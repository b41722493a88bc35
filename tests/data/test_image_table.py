"""A packed list of records behaves as a list."""

from __future__ import annotations

import gc
import json
import pickle
from pathlib import Path

import pytest

from gn_detect.data import CocoDataset, DatasetSource
from gn_detect.data.coco.tables import ImageRecord, ImageTable

RECORDS = [ImageRecord(7, "a/ä b.png", 3, 4), ImageRecord(2, "", 1, 2), ImageRecord(9, "c\ud800", 2**40, 6)]


def test_records_come_back() -> None:
    table = ImageTable(RECORDS)
    assert list(table) == RECORDS
    assert len(table) == 3
    assert table[-1] == RECORDS[2]
    assert table[:2] == RECORDS[:2]
    assert type(table[0].id) is int
    with pytest.raises(IndexError):
        table[3]


def test_tables_are_pickled_and_compared() -> None:
    table, empty = ImageTable(RECORDS), ImageTable([])
    assert not len(empty)
    assert pickle.loads(pickle.dumps(table)) == table != empty


def test_a_dataset_holds_no_object_for_each_image_or_annotation(tmp_path: Path) -> None:
    """Whatever has a reference count is copied into every loader worker that touches it."""

    def read(count: int) -> int:
        content = {
            "categories": [{"id": 1, "name": "a"}],
            "images": [{"id": i, "file_name": f"{i}.png", "height": 9, "width": 9} for i in range(count)],
            "annotations": [
                {
                    "id": i,
                    "image_id": i,
                    "category_id": 1,
                    "bbox": [1, 1, 5, 5],
                    "segmentation": [[1, 1, 6, 1, 6, 6]],
                }
                for i in range(count)
            ],
        }
        path = tmp_path / "a.json"
        path.write_text(json.dumps(content))
        del content
        gc.collect()
        before = len(gc.get_objects())
        dataset = CocoDataset(DatasetSource("a", path, tmp_path))
        gc.collect()
        assert len(dataset) == count
        return len(gc.get_objects()) - before

    read(1)
    assert abs(read(2000) - read(10)) < 100
