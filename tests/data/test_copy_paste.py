"""Objects of one image pasted onto another: pixels, masks and boxes of hand-made and of real images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gn_detect.config import load_config
from gn_detect.data import build_train_loader
from gn_detect.data.augmentation import copy_paste
from gn_detect.data.transforms import LabelledImage, bitmap_bounds, paste, to_target

SIZE = (12, 16)


def scene(
    value: int, *squares: tuple[int, int, int, int], polygons: bool = False, first: int = 0
) -> LabelledImage:
    """A grey image with rectangles ``xyxy`` of whole pixels, of the classes ``first``, ``first`` + 1, ..."""
    masks: list = []
    for x0, y0, x1, y1 in squares:
        bitmap = np.zeros(SIZE, dtype=bool)
        bitmap[y0:y1, x0:x1] = True
        polygon = [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]
        masks.append(polygon if polygons else bitmap)
    boxes = np.array(squares, dtype=np.float64).reshape(-1, 4)
    return LabelledImage(np.full((*SIZE, 3), value, np.uint8), boxes, first + np.arange(len(squares)), masks)


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize("above", [True, False])
def test_pixels_masks_and_boxes_by_hand(below: bool, above: bool) -> None:
    """The pasted rectangle covers half of the first object, all of the second, none of the third."""
    image = scene(10, (2, 2, 8, 6), (9, 3, 11, 5), (12, 8, 16, 12), polygons=below)
    image.image[...] += np.arange(SIZE[1], dtype=np.uint8)[:, None]
    before = image.image.copy()
    pasted = paste(image, scene(200, (5, 1, 12, 7), polygons=above, first=7))
    expected = before.copy()
    expected[1:7, 5:12] = 200
    np.testing.assert_array_equal(pasted.image, expected)
    np.testing.assert_array_equal(image.image, before)
    assert pasted.labels.tolist() == [0, 2, 7]
    target = to_target(pasted, draw_polygons=True, boxes_from_masks=True)
    assert target.boxes.tolist() == [[2, 2, 5, 6], [12, 8, 16, 12], [5, 1, 12, 7]]
    assert pasted.boxes.tolist() == target.boxes.tolist()
    for mask, (x0, y0, x1, y1) in zip(target.masks, target.boxes.int().tolist(), strict=True):
        drawn = np.zeros(SIZE, dtype=bool)
        drawn[y0:y1, x0:x1] = True
        np.testing.assert_array_equal(mask.numpy(), drawn)
    kinds = [isinstance(mask, list) for mask in pasted.masks]
    assert kinds == [False, below, above]  # what was cut is a bitmap; the others stay as they were


def test_an_object_in_the_middle_makes_a_hole() -> None:
    pasted = paste(scene(0, (0, 0, 16, 12)), scene(9, (4, 4, 6, 6)))
    assert pasted.boxes.tolist() == [[0, 0, 16, 12], [4, 4, 6, 6]]
    assert [int(mask.sum()) for mask in pasted.masks] == [16 * 12 - 4, 4]


def test_a_random_subset_is_pasted() -> None:
    squares = [(x, y, x + 2, y + 2) for y in (0, 4, 8) for x in (0, 5, 10)]
    shares = []
    for seed in range(60):
        found = copy_paste(scene(0), scene(9, *squares), np.random.default_rng(seed))
        again = copy_paste(scene(0), scene(9, *squares), np.random.default_rng(seed))
        assert found.labels.tolist() == again.labels.tolist() == sorted(set(found.labels.tolist()))
        np.testing.assert_array_equal(found.image[..., 0] == 9, np.any(found.masks, axis=0))
        shares.append(len(found) / len(squares))
    assert 0 < min(shares) < max(shares)
    assert 0.58 < np.mean(shares) < 0.72  # 1 - (1 - 1/9) ** 9 = 0.65


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("polygons", [False, True])
def test_images_of_another_size_are_cropped_or_padded(scale: int, polygons: bool) -> None:
    """Objects keep their size, also where the two images differ in form."""
    small = scene(9, (1, 1, 4, 5), polygons=polygons)
    height, width = 6 * scale, 30
    large = LabelledImage(
        np.zeros((height, width, 3), np.uint8),
        np.array([[20.0, 1, 24, 4]]),
        np.array([3]),
        [np.zeros((height, width), bool)],
    )
    large.masks[0][1:4, 20:24] = True
    for seed in range(5):
        onto_small = copy_paste(small, large, np.random.default_rng(seed))
        assert onto_small.size == SIZE
        target = to_target(onto_small, draw_polygons=True, boxes_from_masks=True)
        assert target.labels.tolist()[-1] == 3
        assert target.masks[-1].sum() <= 12
        np.testing.assert_array_equal(target.boxes[-1], bitmap_bounds(target.masks[-1].numpy()))
        onto_large = copy_paste(large, small, np.random.default_rng(seed))
        assert onto_large.size == (height, width)
        assert onto_large.labels.tolist() == [3, 0]


def test_nothing_to_paste() -> None:
    image = scene(5, (1, 1, 3, 3))
    found = copy_paste(image, scene(9), np.random.default_rng(0))
    np.testing.assert_array_equal(found.image, image.image)
    assert found.labels.tolist() == [0]


def test_crowds_are_not_pasted(write_dataset: Callable, small_coco: dict, make_cfg: Callable) -> None:
    """The crowd of image 2 is all of that image."""
    cfg = make_cfg(write_dataset(small_coco), input__copy_paste=1.0, input__mask_format="bitmask")
    pasted = 0
    for sample in sum(islice(build_train_loader(cfg)[0], 20), []):
        own = {7: 2, 2: 1, 5: 1}[sample.image_id]
        pasted += len(sample.target) > own
        assert all(mask.float().mean() < 0.3 for mask in sample.target.masks)
        for box, mask in zip(sample.target.boxes.numpy(), sample.target.masks, strict=True):
            np.testing.assert_array_equal(box, bitmap_bounds(mask.numpy()))
    assert pasted > 10


def test_the_share_of_the_images(write_dataset: Callable, small_coco: dict, make_cfg: Callable) -> None:
    source = write_dataset(small_coco)

    def images(share: float) -> list[Any]:
        return sum(islice(build_train_loader(make_cfg(source, input__copy_paste=share))[0], 20), [])

    plain, half, all_of_them = (images(share) for share in (0.0, 0.5, 1.0))
    changed = [
        sum(not np.array_equal(a.image, b.image) for a, b in zip(plain, other, strict=True))
        for other in (half, all_of_them)
    ]
    assert changed[1] > 25  # an image may get its own objects
    assert 10 < changed[0] < 30


def test_nuclei_stay_apart(shared_dir: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In these data no pixel has two objects; in a pasted image neither, and boxes are those of the masks."""
    monkeypatch.chdir(repository)
    cfg = load_config("quick/nuclei_r18_gn.yaml").replace({"INPUT.COPY_PASTE": 1.0})
    plain = build_train_loader(cfg.replace({"INPUT.COPY_PASTE": 0.0}))[0]
    pairs = zip(sum(islice(plain, 3), []), sum(islice(build_train_loader(cfg)[0], 3), []), strict=True)
    more = 0
    for before, after in pairs:
        assert before.file_name == after.file_name
        masks = np.stack([mask.numpy() for mask in after.target.masks])
        assert masks.sum(axis=0).max() == 1
        np.testing.assert_array_equal(after.target.boxes, [bitmap_bounds(mask) for mask in masks])
        covered = (before.image != after.image).any(dim=0).numpy()
        assert not (covered & ~masks.any(axis=0)).any()  # pixels change only where an object was pasted
        more += len(after.target) - len(before.target)
    assert more > 0
