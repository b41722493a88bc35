"""Which files an annotation file may lead to, and what is opened at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gn_detect.data import CocoDataset, DatasetSource, read_image_list
from gn_detect.data.coco.reader import load_coco
from gn_detect.data.doctor.report import examine
from gn_detect.errors import UserError
from tests.refusal import refusal

Write = Callable[[Any], DatasetSource]


@pytest.fixture(params=["absolute", "up", "up inside"])
def outside(request: pytest.FixtureRequest, write_dataset: Write, small_coco: dict) -> DatasetSource:
    """A dataset whose first image has a name that leads out of the folder to an image."""
    source = write_dataset(small_coco)
    first = small_coco["images"][0]
    secret = source.images.parent / "secret.png"
    Image.new("RGB", (first["width"], first["height"])).save(secret)
    up = os.path.relpath(secret, source.images)
    name = {"absolute": str(secret), "up": up, "up inside": f"x/../{up}"}[request.param]
    if request.param == "up inside":
        (source.images / "x").mkdir()
    first["file_name"] = name
    return write_dataset(small_coco)


def test_a_name_that_leads_out_of_the_folder_needs_the_key(outside: DatasetSource) -> None:
    with pytest.raises(
        UserError, match=r"image 7 has 'file_name' '.*secret\.png', which leads out of .*"
    ) as e:
        CocoDataset(outside)
    assert "DATASETS.ALLOW_OUTSIDE True" in str(e.value)
    assert "\n" not in str(e.value)
    dataset = CocoDataset(replace(outside, allow_outside=True))
    dataset.check_files()
    assert any("secret.png" in record.file_name for record in dataset.images)


def test_the_doctor_does_not_open_it_either(outside: DatasetSource, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(str(path)) or original(path, *rest))
    kinds = {finding.kind for finding in examine([outside]).findings}
    assert "image-outside" in kinds
    assert not any("secret" in path for path in opened)
    kinds = {finding.kind for finding in examine([replace(outside, allow_outside=True)]).findings}
    assert "image-outside" not in kinds
    assert any("secret" in path for path in opened)


def test_neither_do_lists_of_images(outside: DatasetSource) -> None:
    with refusal("image-outside", "DATASETS.ALLOW_OUTSIDE"):
        read_image_list(outside.annotations, outside.images)
    assert len(read_image_list(outside.annotations, outside.images, outside=True)) == 4


def test_a_name_that_leads_to_nothing_is_a_missing_image(write_dataset: Write, small_coco: dict) -> None:
    small_coco["images"][0]["file_name"] = "/none/of/these/folders/is/here.png"
    dataset = CocoDataset(write_dataset(small_coco))
    with refusal("missing-image"):
        dataset.check_files()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes and devices here")
def test_annotations_are_read_from_regular_files_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(UserError, match=f"{name} is a device, a pipe or a socket; give a regular file"):
            load_coco(tmp_path / name)
