"""Figures of a dataset, and anchors against its boxes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou

from gn_detect.data import DatasetSource
from gn_detect.engine.autoconfig import anchor_recall, best_anchor_iou, sizes_of, survey
from gn_detect.modeling.anchors import AnchorGenerator
from tests.engine.tiny import make_dataset
from tests.refusal import refusal


def test_best_anchor_is_that_of_all_anchors() -> None:
    random = np.random.default_rng(0)
    corner, sides = random.uniform(40, 150, (50, 2)), random.uniform(3, 90, (50, 2))
    boxes = np.concatenate([corner, corner + sides], axis=1)
    sizes, ratios, strides = [[8.0, 12.0], [32.0, 48.0]], [0.5, 1.0, 2.0], [4, 16]
    anchors = torch.cat(AnchorGenerator(sizes, [ratios], strides)([(80, 80), (20, 20)]))
    expected = box_iou(torch.from_numpy(boxes), anchors.double()).amax(dim=1)
    found = best_anchor_iou(boxes, sizes, ratios, strides)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert anchor_recall(found) == (found >= 0.5).mean()
    assert anchor_recall(found[:0]) == 0


def test_figures_of_a_dataset(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", 4)
    data = survey(DatasetSource("tiny", path, path.parent / "images"))
    assert data.class_names == ["square", "bar"]
    assert len(data.images) == 4
    assert len(data.boxes) == 8
    assert data.short_edge == 64
    assert data.elongation == 80 / 64
    assert data.most_objects == 2
    assert data.has_masks
    assert not data.has_bitmaps
    assert data.image_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    doubled = data.resized_boxes(128, 1000)
    np.testing.assert_allclose(doubled, 2 * data.boxes)
    np.testing.assert_allclose(sizes_of(doubled)[:2], [40.0, 2 * (34 * 12) ** 0.5])


def test_boxes_without_masks_are_seen_as_such(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", 2)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    content["annotations"][0]["segmentation"] = [[]]
    # Tools write a crowd as RLE in a dataset of boxes, too.
    crowd = {"iscrowd": 1, "segmentation": {"size": [64, 80], "counts": [0, 5120]}}
    content["annotations"].append({**content["annotations"][0], **crowd, "id": 50})
    path.write_text(json.dumps(content))
    assert not survey(DatasetSource("tiny", path, path.parent / "images")).has_masks


def test_what_is_given_decides_whether_masks_are_read(tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "data", 2)
    source = DatasetSource("tiny", path, path.parent / "images")
    assert survey(source, masks=True).has_masks
    assert not survey(source, masks=False).has_masks
    content = json.loads(path.read_text())
    del content["annotations"][1]["segmentation"]
    path.write_text(json.dumps(content))
    assert len(survey(source, masks=False).boxes) == 4
    for masks in (None, True):
        with refusal("no-mask", "annotation 2", "MODEL.MASK_ON False"):
            survey(source, masks=masks)
