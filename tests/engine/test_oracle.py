"""detectron2's checkpoint through our whole evaluation: reading, resizing, model, pasting, COCO numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gn_detect


@pytest.mark.slow
def test_ap_is_detectron2s(shared_dir: Path, tmp_path: Path) -> None:
    oracle, data = shared_dir / "oracles/dsb_r18_gn", shared_dir / "data/dsb2018"
    cfg = gn_detect.load_config(oracle / "config.yaml").replace(
        {
            "DATASETS.REGISTER": {
                "dsb_val": {
                    "annotations": str(data / "annotations/instances_val.json"),
                    "images": str(data / "images"),
                }
            },
            "MODEL.WEIGHTS": str(oracle / "model_final.pth"),
            "OUTPUT_DIR": str(tmp_path),
        }
    )
    metrics = gn_detect.evaluate(cfg)
    expected = json.loads((oracle / "results.json").read_text())
    for iou_type in ("bbox", "segm"):
        for name in ("AP", "AP50", "AP75", "APs", "APm"):
            assert metrics[iou_type][name] == pytest.approx(expected[iou_type][name], abs=0.02), (
                iou_type,
                name,
            )
    ours = json.loads((tmp_path / "inference/dsb_val/coco_instances_results.json").read_text())
    theirs = json.loads((oracle / "coco_instances_results.json").read_text())
    assert len(ours) == len(theirs)
