"""Training samples from tiles: the pixels of the file, clipped masks, and the objects that are visible."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from PIL import Image

from gn_detect.data import CocoDataset, DatasetSource, build_train_loader
from gn_detect.data.tiles import TiledDataset, tile_windows, visible_shares
from gn_detect.ops.masks import rasterize_polygons

HEIGHT, WIDTH, SIDE, OVERLAP, LEAST = 150, 230, 100, 0.2, 0.3
WHOLE = {"input__min_size_train": (SIDE,), "input__max_size_train": SIDE, "input__random_flip": "none"}

# Polygons: a square in one tile, one over a seam, a triangle over the corner of four tiles, a bar over three
# tiles, one with corners between pixels, and one of two polygons, of which a tile shows the smaller.
SHAPES = [
    [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]],
    [[60.0, 20.0, 120.0, 20.0, 120.0, 40.0, 60.0, 40.0]],
    [[60.0, 55.0, 140.0, 60.0, 90.0, 120.0]],
    [[5.0, 5.0, 225.0, 5.0, 225.0, 45.0, 5.0, 45.0]],
    [[20.0, 70.0, 120.5, 70.0, 120.5, 80.25, 20.0, 80.25]],
    [[55.0, 3.0, 61.0, 3.0, 61.0, 9.0, 55.0, 9.0], [150.0, 3.0, 190.0, 3.0, 190.0, 30.0, 150.0, 30.0]],
]


@pytest.fixture(params=["polygons", "rle"])
def large(request: pytest.FixtureRequest, tmp_path: Path) -> DatasetSource:
    """One image with :data:`SHAPES` and a crowd, and one with nothing but a crowd."""
    random, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    annotations: list[dict[str, Any]] = []
    for shape in SHAPES:
        mask: Any = shape
        encoded = coco_mask.merge(coco_mask.frPyObjects(shape, HEIGHT, WIDTH))
        if request.param == "rle":
            mask = {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}
        annotations.append(annotation(annotations, 1, mask, coco_mask.toBbox(encoded).tolist()))
    crowd = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * 120, HEIGHT * 100, HEIGHT * 10]}
    for image_id in (1, 2):
        annotations.append(annotation(annotations, image_id, crowd, [120, 0, 100, HEIGHT], iscrowd=1))
        pixels = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{image_id}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2)],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": annotations,
    }
    (tmp_path / "large.json").write_text(json.dumps(content))
    return DatasetSource("large", tmp_path / "large.json", folder)


def annotation(before: list, image_id: int, mask: Any, box: list[float], **other: Any) -> dict[str, Any]:
    return {
        "id": len(before) + 1, "image_id": image_id, "category_id": 1, "segmentation": mask, "bbox": box,
        "area": box[2] * box[3], "iscrowd": 0,
    } | other  # fmt: skip


def tiled_cfg(make_cfg: Callable, source: DatasetSource, **changes: Any) -> Any:
    tiles = {
        "dataloader__tiles__size": SIDE,
        "dataloader__tiles__overlap": OVERLAP,
        "dataloader__tiles__min_visible": LEAST,
    }
    return make_cfg(source, **WHOLE, **tiles, **changes)


def expected_tiles() -> list[tuple[tuple[int, int, int, int], list[np.ndarray]]]:
    """Window and clipped masks of each tile of the first image that has objects, drawn in the whole image."""
    whole = [rasterize_polygons([np.array(p) for p in shape], HEIGHT, WIDTH) for shape in SHAPES]
    found = []
    for left, top, right, bottom in tile_windows(HEIGHT, WIDTH, SIDE, OVERLAP).tolist():
        parts = [mask[top:bottom, left:right] for mask in whole]
        visible = [p for p, mask in zip(parts, whole, strict=True) if p.sum() >= LEAST * mask.sum()]
        if visible:
            found.append(((left, top, right, bottom), visible))
    return found


def pixels_of_triangle(window: tuple[int, int, int, int]) -> int:
    """Return the pixels of the triangle in a tile."""
    left, top, right, bottom = window
    whole = rasterize_polygons([np.array(p) for p in SHAPES[2]], HEIGHT, WIDTH)
    return int(whole[top:bottom, left:right].sum())


def test_samples_pixel_by_pixel(large: DatasetSource, make_cfg: Callable) -> None:
    """Each tile with objects occurs once in an epoch, with the file's pixels, its masks and their boxes."""
    expected = expected_tiles()
    assert 4 <= len(expected) < len(tile_windows(HEIGHT, WIDTH, SIDE, OVERLAP))  # one shows too little of all
    counts = [len(masks) for _, masks in expected]
    assert 0 < sum(counts) < len(expected) * len(SHAPES)
    cfg = tiled_cfg(
        make_cfg, large, input__mask_format="bitmask", solver__ims_per_batch=1, input__format="RGB"
    )
    loader, dataset = build_train_loader(cfg)
    assert len(dataset) == 2
    polygons = '"segmentation": [[' in large.annotations.read_text()
    file = np.asarray(Image.open(large.images / "1.png"))
    waiting = dict(expected)
    for (sample,) in islice(loader, len(expected)):
        assert sample.image_id == 1
        assert sample.original_size == (SIDE, SIDE)
        pixels = sample.image.numpy().transpose(1, 2, 0)
        window = next(w for w in waiting if np.array_equal(file[w[1] : w[3], w[0] : w[2]], pixels))
        drawn, masks = torch.stack(sample.target.masks).numpy(), waiting.pop(window)
        differing = [int((one != other).sum()) for one, other in zip(drawn, masks, strict=True)]
        # pycocotools draws a slanted edge that begins left of the tile by a fifth of a pixel otherwise.
        slanted = [polygons and mask.sum() == pixels_of_triangle(window) for mask in masks]
        assert all(count <= 8 * tolerated for count, tolerated in zip(differing, slanted, strict=True))
        for box, mask in zip(sample.target.boxes, drawn, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert waiting == {}


def test_polygons_stay_polygons(large: DatasetSource, make_cfg: Callable) -> None:
    """They are moved, and their boxes are exactly those of the part in the tile."""
    loader, _ = build_train_loader(tiled_cfg(make_cfg, large, solver__ims_per_batch=1))
    seen = 0
    for (sample,) in islice(loader, len(expected_tiles())):
        for box, mask in zip(sample.target.boxes.numpy(), sample.target.masks, strict=True):
            if isinstance(mask, list):
                seen += 1
                drawn = rasterize_polygons(mask, SIDE, SIDE)
                rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
                tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert np.abs(box - tight).max() <= 1
    assert (seen > 0) == ('"segmentation": [[' in large.annotations.read_text())


def test_tiles_without_objects(large: DatasetSource, make_cfg: Callable) -> None:
    """A tile with nothing but a crowd, or with a small part of an object, counts as empty."""
    tiles = len(tile_windows(HEIGHT, WIDTH, SIDE, OVERLAP))
    for keep, count in ((True, len(expected_tiles())), (False, 2 * tiles)):
        cfg = tiled_cfg(make_cfg, large, dataloader__filter_empty_annotations=keep, solver__ims_per_batch=1)
        loader, _ = build_train_loader(cfg)
        images = [sample.image.numpy().tobytes() for (sample,) in islice(loader, 2 * count)]
        assert len(set(images)) == count
        assert set(images[:count]) == set(images[count:])


def test_visible_shares_are_those_of_the_masks(large: DatasetSource) -> None:
    dataset, windows = CocoDataset(large), tile_windows(HEIGHT, WIDTH, SIDE, OVERLAP)
    shares = visible_shares(dataset, 0, windows)
    for row, shape in enumerate(SHAPES):
        mask = rasterize_polygons([np.array(p) for p in shape], HEIGHT, WIDTH)
        for column, (left, top, right, bottom) in enumerate(windows.tolist()):
            part = mask[top:bottom, left:right].sum() / mask.sum()
            assert shares[row, column] == pytest.approx(part, abs=1e-9)
    assert visible_shares(dataset, 1, windows).shape == (0, len(windows))  # a crowd is no object
    boxes = visible_shares(CocoDataset(large, masks=False), 0, windows)
    assert boxes[0, 0] == 1
    assert boxes[1].tolist() == pytest.approx([40 / 60, 55 / 60, 0, 0, 0, 0], abs=1e-9)


def test_small_images_are_one_tile(small_coco: dict, write_dataset: Callable, make_cfg: Callable) -> None:
    """Tiles that are larger than the images have the same objects."""
    source = write_dataset(small_coco)
    dataset = CocoDataset(source)
    tiled = TiledDataset(dataset, make_cfg(source, dataloader__tiles__size=200).dataloader.tiles)
    assert len(tiled) == len(dataset)
    for index in range(len(dataset)):
        whole, tile = dataset.read(index), tiled.read(index)
        assert np.array_equal(tile.image, whole.image)
        assert tile.labels.tolist() == whole.labels.tolist() == tiled.labels(index).tolist()
        assert tiled.images[index] == dataset.images[index]
    assert tiled.counts().tolist() == dataset.counts().tolist()


def test_an_epoch_is_a_pass_over_the_tiles(large: DatasetSource) -> None:
    from gn_detect.config import load_config
    from gn_detect.engine.length import of_epochs

    cfg = load_config(None, []).replace(
        {
            "DATASETS.TRAIN": ["large"],
            "DATASETS.REGISTER": {
                "large": {"annotations": str(large.annotations), "images": str(large.images)}
            },
            "DATALOADER.TILES.SIZE": SIDE,
            "SOLVER.IMS_PER_BATCH": 1,
            "MODEL.MASK_ON": True,
        }
    )
    assert of_epochs(cfg, 3).solver.max_iter == 3 * len(expected_tiles())
