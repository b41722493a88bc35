"""A run without a config, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gn_detect.cli import main
from gn_detect.cli.main import parse
from gn_detect.cli.own_data import choose_config
from gn_detect.config import load_config
from tests.cli.conftest import Case
from tests.test_docs import SMALL_MODEL


def flags(case: Case, val: bool = True) -> list[str]:
    parts = {"train": case.train, **({"val": case.val} if val else {})}
    pairs = [
        (f"--{part}-json", path, f"--{part}-images", path.parent / "images") for part, path in parts.items()
    ]
    return [str(word) for pair in pairs for word in pair]


def test_one_command_trains_says_why_and_leaves_its_config(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["OUTPUT_DIR", str(case.output), *SMALL_MODEL]
    assert main(["train", *flags(case), "--json", *keys]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)  # alone on standard output
    assert set(result["results"]) == {"bbox", "segm", "diagnosis", "validation"}
    assert Path(result["weights"]).is_file()
    for topic in ("classes: 2", "anchors:", "SOLVER.MAX_ITER as given", "learning rate:"):
        assert topic in printed.err
    cfg = load_config(case.output / "config.yaml")
    assert cfg.model.roi_heads.num_classes == 2
    assert cfg.solver.max_iter == 1
    again = [
        "train",
        "--config-file",
        str(case.output / "config.yaml"),
        "OUTPUT_DIR",
        str(tmp_path / "again"),
    ]
    assert main([*again, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    results = [
        json.loads((folder / "results.json").read_text()) for folder in (case.output, tmp_path / "again")
    ]
    assert results[0] == results[1]


def test_mask_on_false_is_heard_before_masks_are_looked_for(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.edit(lambda content: content["annotations"][1].pop("segmentation"))
    words = ["train", *flags(case, val=False)]
    assert main(words) == 2
    assert "annotation 2 of image 1 has no segmentation; add one, or set MODEL.MASK_ON" in (
        capsys.readouterr().err
    )
    args = parse([*words, "MODEL.MASK_ON", "False"])
    assert choose_config(args).model.mask_on is False
    assert "masks: MODEL.MASK_ON as given" in capsys.readouterr().out


def test_weights_decide_about_the_network_and_no_val_is_said(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["train", "--config-file", str(case.config), "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "[]"]) == 0
    )
    capsys.readouterr()
    weights = case.output / "model_final.pth"
    keys = ["OUTPUT_DIR", str(tmp_path / "two"), "SOLVER.MAX_ITER", "1", "MODEL.DEVICE", "cpu"]
    assert main(["train", *flags(case, val=False), "--weights", str(weights), *keys]) == 0
    printed = capsys.readouterr().out
    assert "Mask R-CNN R-18-FPN with GN, as the weights are" in printed
    assert "without --val-json" in printed
    before, after = load_config(case.output / "config.yaml"), load_config(tmp_path / "two" / "config.yaml")
    assert after.model.gn == before.model.gn
    assert after.model.fpn == before.model.fpn
    assert after.model.resnets.depth == 18
    assert after.model.resnets.res2_out_channels == 8
    assert after.model.pixel_std == before.model.pixel_std
