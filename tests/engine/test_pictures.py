"""The pictures at the end of a run: as files, and in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gn_detect
from gn_detect.config import load_config
from tests.engine.tiny import make_dataset, write_config


@pytest.mark.usefixtures("real_curves")
def test_test_images_are_drawn_for_the_folder_and_for_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train, val = make_dataset(tmp_path / "train", 2), make_dataset(tmp_path / "val", 3, seed=2)
    keys = ["SOLVER.MAX_ITER", "1", "VIS.NUM_IMAGES", "2"]
    cfg = load_config(write_config(tmp_path, train, val), keys)
    gn_detect.train(cfg)
    folder = Path(cfg.output_dir)
    drawn = sorted(path.name for path in (folder / "pictures").iterdir())
    assert drawn == ["curves.png", "tiny_test_1.png", "tiny_test_2.png"]
    picture = np.asarray(Image.open(folder / "pictures" / "tiny_test_1.png").convert("RGB")).astype(int)
    amber = np.abs(picture - (255, 192, 46)).sum(axis=-1) < 12  # what an untrained model misses
    middle = picture.shape[1] // 2
    assert amber[:, :middle].sum() > 100
    assert not amber[:, middle + 10 :].any()
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["images"]) == ["tiny_test/1", "tiny_test/2"]
    assert events.Images("tiny_test/1")[0].width > 900
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["device"] == "cpu"
    assert environment["processes"] == 1
    assert environment["torch"]
