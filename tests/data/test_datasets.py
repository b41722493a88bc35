"""Names of datasets and what is said when one cannot be found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gn_detect.data import DatasetSource, datasets, resolve_dataset
from tests.refusal import refusal


def put(root: Path, annotations: str, images: str) -> None:
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    (root / annotations).write_text("{}")
    (root / images).mkdir(parents=True)


def test_registered_names_come_first(tmp_path: Path, make_cfg: Callable[..., Any]) -> None:
    put(tmp_path, "mine.json", "pictures")
    entry = SimpleNamespace(annotations=str(tmp_path / "mine.json"), images=str(tmp_path / "pictures"))
    cfg = make_cfg(datasets__registered={"coco_2017_val": entry})
    expected = DatasetSource("coco_2017_val", tmp_path / "mine.json", tmp_path / "pictures")
    assert resolve_dataset(cfg, "coco_2017_val") == expected


def test_root_of_the_built_in_datasets(
    tmp_path: Path, make_cfg: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("ours", "theirs", "here/datasets"):
        put(tmp_path / folder, "coco/annotations/instances_val2017.json", "coco/val2017")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("GN_DETECT_DATASETS", raising=False)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert resolve_dataset(make_cfg(), "coco_2017_val").images == Path("datasets/coco/val2017")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "theirs"))
    assert resolve_dataset(make_cfg(), "coco_2017_val").images == tmp_path / "theirs/coco/val2017"
    monkeypatch.setenv("GN_DETECT_DATASETS", str(tmp_path / "ours"))
    assert resolve_dataset(make_cfg(), "coco_2017_val").images == tmp_path / "ours/coco/val2017"


def test_missing_files_are_named(
    tmp_path: Path, make_cfg: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GN_DETECT_DATASETS", str(tmp_path))
    with refusal("missing-annotations", "coco_2017_train", "GN_DETECT_DATASETS"):
        resolve_dataset(make_cfg(), "coco_2017_train")
    put(tmp_path, "mine.json", "pictures")
    (tmp_path / "pictures").rmdir()
    entry = SimpleNamespace(annotations=str(tmp_path / "mine.json"), images=str(tmp_path / "pictures"))
    with refusal("missing-images-folder", "mine", "pictures", "REGISTER.mine"):
        resolve_dataset(make_cfg(datasets__registered={"mine": entry}), "mine")


def test_unknown_name_gets_the_nearest(make_cfg: Callable[..., Any]) -> None:
    with refusal("unknown-dataset", "'coco_2017_vall'", "coco_2017_val"):
        resolve_dataset(make_cfg(), "coco_2017_vall")
    with refusal("unknown-dataset", "'xyz'", "coco_2017_train", "REGISTER"):
        resolve_dataset(make_cfg(), "xyz")


def test_demo_dataset_is_generated_on_first_use(
    tmp_path: Path, make_cfg: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(root: Path) -> None:
        put(root, "demo/instances_val.json", "demo/images_val")

    monkeypatch.setenv("GN_DETECT_DATASETS", str(tmp_path / "new"))
    monkeypatch.setattr(datasets, "ensure_demo_dataset", generate)
    assert resolve_dataset(make_cfg(), "demo_val").annotations == tmp_path / "new/demo/instances_val.json"
