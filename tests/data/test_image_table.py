"""A packed list of records behaves as a list."""

from __future__ import annotations

import pickle

import pytest

from gn_detect.data.image_table import ImageRecord, ImageTable, join_images

RECORDS = [ImageRecord(7, "a/ä b.png", 3, 4), ImageRecord(2, "", 1, 2), ImageRecord(9, "c\ud800", 2**40, 6)]


def test_records_come_back() -> None:
    table = ImageTable(RECORDS)
    assert list(table) == RECORDS and len(table) == 3 and table[-1] == RECORDS[2] and table[:2] == RECORDS[:2]
    assert type(table[0].id) is int
    with pytest.raises(IndexError):
        table[3]


def test_tables_are_joined_pickled_and_compared() -> None:
    table, empty = ImageTable(RECORDS), ImageTable([])
    assert list(join_images([table, empty, table])) == RECORDS * 2 and not len(empty)
    assert pickle.loads(pickle.dumps(table)) == table != empty
