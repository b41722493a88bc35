"""A small dataset that tests can spoil, and a config with the keys that the data part reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_detect.data import DatasetSource

SIZES = {7: (60, 90), 2: (90, 60), 5: (64, 64), 11: (50, 80)}  # image id -> (height, width)


def _small_coco() -> dict[str, Any]:
    """Four images: polygons, compressed and uncompressed RLE, a crowd, one image with nothing."""
    block = {"size": [90, 60], "counts": [10 * 90 + 20] + [30, 60] * 19 + [30, 90 * 60 - 920 - 90 * 19 - 30]}
    return {
        "categories": [{"id": 9, "name": "cat"}, {"id": 3, "name": "ant"}, {"id": 40, "name": "dog"}],
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in SIZES.items()
        ],
        "annotations": [
            _annotation(1, 7, 9, [10, 10, 30, 20], [[10, 10, 40, 10, 40, 30, 10, 30]]),
            _annotation(
                2, 7, 3, [50, 30, 20, 20], [[50, 30, 70, 30, 60, 50], [50, 45, 55, 45, 55, 50]], area=210
            ),
            _annotation(3, 2, 40, [10, 20, 20, 30], block),
            _annotation(4, 2, 3, [0, 0, 60, 90], {"size": [90, 60], "counts": [0, 5400]}, iscrowd=1),
            _annotation(5, 5, 3, [4, 4, 20, 20], [[4, 4, 24, 4, 24, 24, 4, 24]]),
        ],
    }


def _annotation(annotation_id: int, image_id: int, category_id: int, bbox: list, segmentation: Any, **other):
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "segmentation": segmentation,
        "area": bbox[2] * bbox[3],
        "iscrowd": 0,
    } | other


@pytest.fixture
def small_coco() -> dict[str, Any]:
    """Content of a valid annotation file."""
    return _small_coco()


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[[Any], DatasetSource]:
    """Writes an annotation file (any JSON content, or text) beside the images of ``small_coco``."""
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for image_id, (height, width) in SIZES.items():
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            folder / f"{image_id}.png"
        )

    def write(content: Any) -> DatasetSource:
        path = tmp_path / "annotations.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return DatasetSource("small", path, folder)

    return write


@pytest.fixture
def make_cfg() -> Callable[..., Any]:
    """A config that registers the given sources; keywords ``section__key`` change defaults."""
    return _make_cfg


def _make_cfg(*sources: DatasetSource, **changes: Any) -> Any:
    register = {
        s.name: SimpleNamespace(annotations=str(s.annotations), images=str(s.images)) for s in sources
    }
    names = tuple(register)
    cfg = SimpleNamespace(
        seed=1,
        model=SimpleNamespace(mask_on=True),
        datasets=SimpleNamespace(train=names, test=names, registered=register, root="", allow_outside=False),
        solver=SimpleNamespace(ims_per_batch=2),
        test=SimpleNamespace(ims_per_batch=1, tiles=SimpleNamespace(size=0)),
        dataloader=SimpleNamespace(
            num_workers=0,
            aspect_ratio_grouping=True,
            filter_empty_annotations=True,
            sampler_train="TrainingSampler",
            repeat_threshold=0.0,
            repeat_sqrt=True,
            tiles=SimpleNamespace(size=0, overlap=0.2, min_visible=0.3),
        ),
        input=SimpleNamespace(
            format="BGR",
            mask_format="polygon",
            min_size_train=(48, 64),
            max_size_train=120,
            min_size_train_sampling="choice",
            min_size_test=64,
            max_size_test=120,
            random_flip="horizontal",
            crop=SimpleNamespace(enabled=False, type="relative_range", size=(0.5, 0.5)),
            color_jitter=SimpleNamespace(
                enabled=False, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
            ),
            large_scale_jitter=SimpleNamespace(enabled=False, min_scale=0.1, max_scale=2.0, size=(64, 64)),
            rotate_90=False,
            affine=SimpleNamespace(enabled=False, degrees=10.0, translate=0.1, min_scale=0.8, max_scale=1.25),
            copy_paste=0.0,
            albumentations="",
        ),
    )
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = cfg
        for section in sections:
            node = getattr(node, section)
        assert hasattr(node, key)
        setattr(node, key, value)
    return cfg
