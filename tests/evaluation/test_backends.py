"""The right evaluator is chosen, and it prints nothing."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest

from gn_detect.errors import UserError
from gn_detect.evaluation import evaluate_results
from gn_detect.evaluation.backends import choose_backend
from tests.evaluation.synthetic import random_data


def test_an_unknown_backend() -> None:
    with pytest.raises(UserError, match="'fast' is not one of auto, hotcoco, faster_coco_eval, pycocotools"):
        choose_backend("fast")


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hotcoco", "faster_coco_eval"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert choose_backend("auto") == choose_backend(None) == "pycocotools"
    with pytest.raises(UserError, match="faster_coco_eval is not installed; pip install faster-coco-eval"):
        choose_backend("faster_coco_eval")


@pytest.mark.parametrize(
    ("version", "chosen"), [("1.3.0", True), ("2.0", True), ("1.0.1", False), ("x", False)]
)
def test_auto_takes_only_versions_that_are_proven(
    version: str, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hotcoco", reason="hotcoco is not installed")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    assert (choose_backend("auto") == "hotcoco") == chosen


def test_nothing_is_printed(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate_results(*random_data(1), "bbox", backend)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
