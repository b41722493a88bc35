"""A whole detector as a starting point for other classes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from gn_detect.cli import main
from tests.engine.tiny import make_dataset, write_config


def with_one_class(annotations: Path) -> Path:
    """The same objects, all called "thing"."""
    content = json.loads(annotations.read_text())
    content["categories"] = [{"id": 9, "name": "thing"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 9
    target = annotations.parent / "one_class.json"
    target.write_text(json.dumps(content))
    return target


@pytest.mark.slow
def test_a_detector_of_other_classes_is_worth_much(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``MODEL.WEIGHTS`` is all that it takes; the class layers start afresh, and the log says so."""
    train, val = make_dataset(tmp_path / "train", 16, seed=1), make_dataset(tmp_path / "val", 8, seed=2)
    config = write_config(tmp_path, train, val)
    common = ["train", "--config-file", str(config), "SOLVER.BASE_LR", "0.04", "SOLVER.LOG_PERIOD", "50"]
    whole = ["SOLVER.MAX_ITER", "120", "SOLVER.STEPS", "[90]", "DATASETS.TEST", "[]"]
    assert main([*common, *whole, "OUTPUT_DIR", str(tmp_path / "whole")]) == 0

    data: list[str] = []
    for part, file in (("train", train), ("val", val)):
        data += [f"--{part}-json", str(with_one_class(file))]
        data += [f"--{part}-images", str(file.parent / "images")]
    accuracy = {}
    for weights in ("", str(tmp_path / "whole" / "model_final.pth")):
        output = tmp_path / ("scratch", "fine_tuned")[bool(weights)]
        with caplog.at_level(logging.INFO, logger="gn_detect"):
            keys = ["MODEL.WEIGHTS", weights, "SOLVER.MAX_ITER", "40", "OUTPUT_DIR", str(output)]
            assert main([*common[:3], *data, *common[3:], *keys]) == 0
        accuracy[output.name] = json.loads((output / "results.json").read_text())
    assert "6 start afresh, made for other classes" in caplog.text
    for kind in ("bbox", "segm"):
        assert accuracy["fine_tuned"][kind]["AP"] > accuracy["scratch"][kind]["AP"] + 20, accuracy
