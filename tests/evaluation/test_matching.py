"""Pairs of objects and detections, and the confusion that they give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gn_detect.errors import UserError
from gn_detect.evaluation import IN_CROWD, NOTHING, confusion_matrix, match_objects, read_truth


def entry(x: float, category: int = 1, **more: Any) -> dict[str, Any]:
    return {"bbox": [x, 0.0, 10.0, 10.0], "category_id": category, **more}


def test_high_scores_choose_first_and_each_object_is_given_once() -> None:
    objects = [entry(0), entry(100)]
    found = [entry(2, score=0.5), entry(1, score=0.9), entry(101, score=0.1), entry(50, score=0.8)]
    matched, iou = match_objects(objects, found, "bbox")
    assert matched.tolist() == [NOTHING, 0, 1, NOTHING]
    assert iou[[1, 2]] == pytest.approx([90 / 110, 90 / 110])
    assert not iou[[0, 3]].any()


def test_the_same_category_is_preferred_to_a_higher_iou() -> None:
    objects = [entry(0, category=1), entry(2, category=2)]
    matched, _ = match_objects(objects, [entry(0, category=2, score=0.9)], "bbox")
    assert matched.tolist() == [1]
    matched, _ = match_objects(objects[:1], [entry(0, category=2, score=0.9)], "bbox")
    assert matched.tolist() == [0], "another category is confusion"
    matched, _ = match_objects(objects[:1], [entry(4, category=1, score=0.9)], "bbox")
    assert matched.tolist() == [NOTHING], "an IoU of 0.43 is too little"


def test_crowds_take_any_number_and_give_nothing() -> None:
    crowd = {"bbox": [0.0, 0.0, 100.0, 100.0], "category_id": 1, "iscrowd": 1}
    found = [entry(x, score=0.5) for x in (0, 20, 40, 300)]
    matched, _ = match_objects([crowd, entry(40)], found, "bbox")
    assert matched.tolist() == [IN_CROWD, IN_CROWD, 1, NOTHING]


@pytest.mark.parametrize(("objects", "found"), [([], []), ([entry(0)], []), ([], [entry(0, score=1.0)])])
def test_nothing_on_one_side(objects: list, found: list) -> None:
    matched, iou = match_objects(objects, found, "bbox")
    assert matched.tolist() == [NOTHING] * len(found)
    assert iou.tolist() == [0.0] * len(found)


def test_confusion_counts_pairs_misses_and_false_alarms() -> None:
    crowd = {"bbox": [500.0, 0.0, 100.0, 100.0], "category_id": 7, "iscrowd": 1}
    objects = [entry(0, 3), entry(100, 3), entry(200, 7), crowd]
    found = [
        entry(0, 3, score=0.9),
        entry(200, 3, score=0.8),
        entry(300, 7, score=0.7),
        entry(510, 7, score=0.6),
    ]
    matched, _ = match_objects(objects, found, "bbox")
    counts = confusion_matrix([(objects, found, matched), ([], [], np.zeros(0, int))], [3, 7])
    assert counts.tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_truth_finds_images_by_the_end_of_their_path(tmp_path: Any) -> None:
    import json

    images = [{"id": 5, "file_name": "a/x.png", "height": 9, "width": 9}, {"id": 6, "file_name": "b/x.png"}]
    content = {"images": images, "annotations": [], "categories": [{"id": 3, "name": "star"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    truth = read_truth(tmp_path / "a.json", "bbox")
    assert truth.image_id_of("/data/a/x.png") == 5
    assert truth.image_id_of("b/x.png") == 6
    for name in ("x.png", "c/x.png", "ax.png"):
        with pytest.raises(UserError, match=r"a\.json does not list the image"):
            truth.image_id_of(name)
