"""Detection in tiles: each object once, whatever the tiles cut, with the exact union of its parts."""

from __future__ import annotations

import json
import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gn_detect.config import Config
from gn_detect.data.tiles import tile_windows
from gn_detect.engine import Predictor, evaluate, train
from gn_detect.engine.tiled import TiledDetector, in_tiles
from gn_detect.modeling import MaskRCNN, build_model
from gn_detect.structures import Detections, RleMasks
from gn_detect.weights import save_weights
from tests.refusal import refusal

SIDE = 100  # of a tile; with an overlap of 0.2 tiles begin at 0, 80, 160, ...


class Seer:
    """In place of a model: finds each part of the picture with one value above 0, exactly.

    The first channel is the object's number, the second its class, the third its score in percent.

    Args:
        spoil: changes what is found in a tile.
    """

    def __init__(self, masks: bool = True, spoil: Callable[[Detections], Detections] | None = None) -> None:
        self.masks, self.spoil = masks, spoil
        self.sizes: list[tuple[int, int]] = []

    def detect(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]], paste: bool
    ) -> list[Detections]:
        assert not paste
        self.sizes += sizes
        return [self._find(image) for image in images]

    def _find(self, image: Tensor) -> Detections:
        numbers = [int(number) for number in image[0].unique() if number]
        masks = torch.stack([image[0] == n for n in numbers]) if numbers else image[:0].bool()
        boxes = torch.tensor([bounds(mask.numpy()) for mask in masks]).reshape(-1, 4).float()
        at = [mask.nonzero()[0].tolist() for mask in masks]
        labels = torch.tensor([int(image[1, y, x]) for y, x in at], dtype=torch.int64)
        scores = torch.tensor([int(image[2, y, x]) / 100 for y, x in at])
        order = scores.argsort(descending=True)
        found = Detections(boxes, scores, labels, masks if self.masks else None)[order]
        return self.spoil(found) if self.spoil else found


def bounds(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def picture(height: int, width: int, *objects: tuple[slice, slice]) -> Tensor:
    """Objects 1, 2, ... with scores of 0.5, 0.51, ...; a later one covers the earlier ones."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for number, place in enumerate(objects, 1):
        image[0][place], image[2][place] = number, 49 + number
    return image


def detect(cfg: Config, detector: Seer, image: Tensor, overlap: float = 0.2) -> Detections:
    keys = {"TEST.TILES.SIZE": SIDE, "TEST.TILES.OVERLAP": overlap, "INPUT.MIN_SIZE_TEST": 0}
    (found,) = TiledDetector(detector, cfg.replace(keys)).detect([image])
    return found


def check(found: Detections, image: Tensor) -> None:
    """Each object of the picture was found once, with its own pixels, box, class and score."""
    numbers = [int(number) for number in image[0].unique() if number]
    assert len(found) == len(numbers)
    bitmaps = found.bitmaps()
    assert bitmaps is not None
    for mask, box, score in zip(bitmaps.numpy(), found.boxes, found.scores, strict=True):
        number = int(image[0][torch.from_numpy(mask)][0])
        expected = (image[0] == number).numpy()
        assert np.array_equal(mask, expected)
        assert box.tolist() == bounds(expected)
        assert float(score) == pytest.approx(0.49 + 0.01 * number)
        numbers.remove(number)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


CASES = {
    "over a seam": picture(90, 180, np.s_[30:60, 40:140]),
    "over a seam, higher than a tile": picture(180, 180, np.s_[10:170, 60:125]),
    "over the corner of four tiles": picture(180, 180, np.s_[50:130, 45:135]),
    "two that touch along the seam": picture(90, 180, np.s_[20:50, 40:140], np.s_[50:80, 30:130]),
    "two that touch end to end in the overlap": picture(90, 180, np.s_[30:60, 20:90], np.s_[30:60, 90:160]),
    "wholly in the overlap": picture(90, 180, np.s_[30:45, 84:96]),
    "wholly in the overlap, at the border of a tile": picture(90, 180, np.s_[30:45, 80:96]),
    "whole in one tile, cut by the other": picture(90, 180, np.s_[30:60, 50:95], np.s_[5:25, 85:150]),
    "a sliver in the next tile": picture(90, 180, np.s_[30:60, 50:82], np.s_[5:25, 98:150]),
    "over all of many tiles": picture(420, 420, np.s_[3:417, 3:417]),
    "a ring over all of many tiles": picture(420, 420, np.s_[3:417, 3:417], np.s_[40:380, 40:380]),
    "a small one in a large one, both over the seam": picture(
        90, 180, np.s_[10:80, 20:160], np.s_[40:50, 70:110]
    ),
    "none": picture(180, 180),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("overlap", [0.2, 0.5])
def test_each_object_once_and_exactly(tiny_config: Config, name: str, overlap: float) -> None:
    check(detect(tiny_config, Seer(), CASES[name], overlap), CASES[name])


def test_branches_of_one_object(tiny_config: Config) -> None:
    """A tile shows the arms of a U, the next one all of it: arms of one length, and of two."""
    for short in (150, 88):
        image = picture(90, 180, np.s_[10:80, 30:60], np.s_[10:30, 30:150], np.s_[60:80, 30:short])
        image[0] = (image[0] > 0).byte()
        image[2] = image[0] * 50

        def apart(found: Detections) -> Detections:
            """Find the two arms, where the tile does not show what joins them."""
            assert found.masks is not None
            mask = found.masks[0]
            if not len(found) or mask[35:55].any():
                return found
            both = [mask & (torch.arange(len(mask))[:, None] < 45), mask & (torch.arange(90)[:, None] >= 45)]
            parts = torch.stack([part for part in both if part.any()])
            boxes = torch.tensor([bounds(part.numpy()) for part in parts]).float()
            count = len(parts)
            return Detections(boxes, torch.full((count,), 0.5), torch.zeros(count).long(), parts)

        check(detect(tiny_config, Seer(spoil=apart), image), picture_of(image))


def picture_of(image: Tensor) -> Tensor:
    """The same picture with the score that :func:`check` expects."""
    return torch.stack([image[0], image[1], image[0] * 50])


def test_the_highest_score_of_the_parts(tiny_config: Config) -> None:
    image = picture(90, 180, np.s_[30:60, 40:140])
    scores = iter([0.3, 0.8])

    def rate(found: Detections) -> Detections:
        return Detections(found.boxes, torch.tensor([next(scores)]), found.labels, found.masks)

    assert detect(tiny_config, Seer(spoil=rate), image).scores.tolist() == [pytest.approx(0.8)]
    # Also that of a part which a whole object takes the place of.
    scores = iter([0.3, 0.8])
    whole = picture(90, 180, np.s_[30:60, 50:95])
    found = detect(tiny_config, Seer(spoil=rate), whole)
    assert found.scores.tolist() == [pytest.approx(0.8)]
    assert int(found.masks[0].sum()) == 30 * 45


def test_classes_are_not_joined(tiny_config: Config) -> None:
    """Two tiles that call the object something else: it stays two detections of its visible parts."""
    image, labels = picture(90, 180, np.s_[30:60, 40:140]), iter([0, 1])

    def name(found: Detections) -> Detections:
        return Detections(found.boxes, found.scores, torch.tensor([next(labels)]), found.masks)

    found = detect(tiny_config, Seer(spoil=name), image)
    assert sorted(found.labels.tolist()) == [0, 1]
    assert [int(mask.sum()) for mask in found.masks] == [30 * 60, 30 * 60]


def test_masks_that_differ_a_little(tiny_config: Config) -> None:
    """Real masks are not exact: the union of both parts is taken, and the touching neighbour stays apart."""
    image = picture(90, 180, np.s_[20:50, 40:140], np.s_[50:80, 30:130])
    shifts = iter([0, 2])

    def shift(found: Detections) -> Detections:
        rows = next(shifts)
        assert found.masks is not None
        return Detections(found.boxes, found.scores, found.labels, found.masks.roll(rows, dims=1))

    found = detect(tiny_config, Seer(spoil=shift), image)
    assert len(found) == 2
    for mask, top, left in zip(found.masks, (50, 20), (30, 40), strict=True):
        expected = np.zeros((90, 180), dtype=bool)
        expected[top : top + 30, left:100] = True
        expected[top + 2 : top + 32, 80 : left + 100] = True
        assert np.array_equal(mask.numpy(), expected)


@pytest.mark.parametrize("crop", [slice(30, 60), slice(30, 42)])
def test_a_whole_object_takes_the_place_of_a_rough_part(tiny_config: Config, crop: slice) -> None:
    """The second tile cuts the object, and shifts its mask or finds little of it: the first one's counts."""
    image, tile = picture(90, 180, np.s_[30:60, 50:95]), iter([0, 1])

    def roughen(found: Detections) -> Detections:
        if next(tile) == 0:
            return found
        masks = torch.zeros_like(found.masks)
        masks[:, crop] = found.masks[:, crop]
        return Detections(found.boxes, found.scores, found.labels, masks.roll(2, dims=1))

    check(detect(tiny_config, Seer(spoil=roughen), image), image)


def test_poor_copies_give_way_to_the_tile_with_the_most_room(tiny_config: Config) -> None:
    """Tiles at 0, 40 and 80: the outer ones find a little of the object, with a lower score."""
    image, tile = picture(90, 180, np.s_[30:50, 84:98]), iter([0, 1, 2])

    def shrink(found: Detections) -> Detections:
        if next(tile) == 1:
            return found
        masks = torch.zeros_like(found.masks)
        masks[:, 30:36] = found.masks[:, 30:36]
        return Detections(found.boxes, found.scores - 0.1, found.labels, masks)

    check(detect(tiny_config, Seer(spoil=shrink), image, overlap=0.5), image)


def test_boxes_alone(tiny_config: Config) -> None:
    image = picture(180, 180, np.s_[5:40, 40:140], np.s_[50:130, 45:135], np.s_[140:150, 84:96])
    found = detect(tiny_config, Seer(masks=False), image)
    assert found.masks is None
    assert found.boxes.tolist() == [[84, 140, 96, 150], [45, 50, 135, 130], [40, 5, 140, 40]]


def test_tiles_are_spread_evenly() -> None:
    assert tile_windows(90, 180, 100, 0.2).tolist() == [[0, 0, 100, 90], [80, 0, 180, 90]]
    assert tile_windows(60, 50, 100, 0.2).tolist() == [[0, 0, 50, 60]]
    windows = tile_windows(333, 1000, 128, 0.25)
    assert (windows[:, 2:] - windows[:, :2] == 128).all()
    for axis in (0, 1):
        starts = np.unique(windows[:, axis])
        assert (np.diff(starts) <= 96).all()
        assert np.diff(starts).max() - np.diff(starts).min() <= 1


def test_memory_does_not_grow_with_objects_times_pixels(tiny_config: Config) -> None:
    """400 objects in a megapixel: their bitmaps would be 400 MB."""
    size, cell = 1000, 50
    rows, columns = np.divmod(np.arange(size * size).reshape(size, size), size)
    inside = ((rows % cell < 40) & (columns % cell < 40)).astype(np.uint8)
    numbers = ((rows // cell * 7 + columns // cell) % 250 + 1).astype(np.uint8) * inside
    image = torch.from_numpy(np.stack([numbers, 0 * inside, 50 * inside]))
    before: list[weakref.ref[Tensor]] = []

    def watch(found: Detections) -> Detections:
        """The masks of a tile are gone two tiles later; tracemalloc does not see tensors."""
        assert sum(mask() is not None for mask in before) <= 1
        before.append(weakref.ref(found.masks))
        return found

    tracemalloc.start()
    found = detect(tiny_config, Seer(spoil=watch), image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) >= 400
    assert isinstance(found.masks, RleMasks)
    assert peak < 20e6
    assert sum(map(len, found.masks.counts)) < 2e5


# With a real model.

BIG = {"TEST.TILES.SIZE": 64, "TEST.TILES.OVERLAP": 0.25}


@pytest.fixture
def model(tiny_config: Config) -> MaskRCNN:
    torch.manual_seed(3)
    return build_model(tiny_config.replace({"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.3})).eval()


def test_one_tile_is_the_whole_image(tiny_config: Config, model: MaskRCNN) -> None:
    """Boxes, scores and every pixel are those without tiles; so small images and videos do not change."""
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    (expected,) = model.detect([image])
    detector = in_tiles(model, tiny_config.replace({"TEST.TILES.SIZE": 80}))
    (found,) = detector.detect([image], [(64, 80)])
    assert len(found) == len(expected) > 5
    for name in ("boxes", "scores", "labels"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.bitmaps(), expected.masks)
    assert in_tiles(model, tiny_config) is model


@pytest.mark.parametrize("changes", [{}, {"MODEL.MASK_ON": False}, {"TEST.AUG.ENABLED": True}])
def test_predictor_and_evaluation_agree(tiny_config: Config, tmp_path: Path, changes: dict) -> None:
    """The same detections from eval and from predict, also augmented, where each tile has its views."""
    aug = {"TEST.AUG.MIN_SIZES": [64], "TEST.AUG.MAX_SIZE": 96}
    cfg = tiny_config.replace(
        BIG
        | aug
        | changes
        | {"MODEL.WEIGHTS": str(tmp_path / "m.pth"), "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.3}
    )
    torch.manual_seed(3)
    save_weights(tmp_path / "m.pth", build_model(cfg).state_dict())
    results = evaluate(cfg)
    augmented = cfg.test.aug.enabled
    assert ("bbox_TTA" in results) == augmented
    folder = tmp_path / "run" / ("inference_TTA" if augmented else "inference")
    stored = json.loads((folder / "tiny_test/coco_instances_results.json").read_text())
    path = Path(cfg.datasets.registered["tiny_test"].images) / "001.png"
    predictor = Predictor(cfg)
    found = predictor(path)
    entries = [
        {**entry, "category_id": 3 + 4 * (entry["category_id"] - 1), "image_id": 1}
        for entry in found.to_coco(1)
    ]
    assert entries == [entry for entry in stored if entry["image_id"] == 1]
    assert len(entries) > 5
    # In the call, in place of the config.
    plain = Predictor(cfg.replace({"TEST.TILES.SIZE": 0}))
    assert plain(path, tile=64, overlap=0.25).to_coco() == found.to_coco()
    assert len(plain(path)) != len(found)
    (listed,) = plain([path], tile=64, overlap=0.25)
    assert torch.equal(listed.boxes, found.boxes)


def test_training_on_tiles(tiny_config: Config, tmp_path: Path) -> None:
    """It evaluates in tiles, and draws what they find."""
    keys = {"SOLVER.MAX_ITER": 2, "VIS.NUM_IMAGES": 1, "DATALOADER.TILES.SIZE": 64}
    results = train(tiny_config.replace(BIG | keys))
    assert {"bbox", "segm"} <= set(results)
    log = (tmp_path / "run/log.txt").read_text()
    assert "in 12 tiles of 64 pixels" in log
    assert "in tiles of 64 pixels" in log
    assert len(list((tmp_path / "run").rglob("tiny_test_*.png"))) == 1


def test_what_detections_of_tiles_can_do(tiny_config: Config, tmp_path: Path) -> None:
    cfg = tiny_config.replace(
        BIG | {"MODEL.WEIGHTS": str(tmp_path / "m.pth"), "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.3}
    )
    torch.manual_seed(3)
    save_weights(tmp_path / "m.pth", build_model(cfg).state_dict())
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    found = Predictor(cfg)(pixels)
    assert isinstance(found.masks, RleMasks)
    bitmaps = found.bitmaps()
    assert bitmaps.shape == (len(found), 70, 90)
    for index in (slice(1, 3), [2, 0], found.scores > float(found.scores.median()), 1):
        chosen = found[index]
        assert torch.equal(chosen.bitmaps(), bitmaps[[index] if isinstance(index, int) else index])
    assert torch.equal(found.masks[2], bitmaps[2])
    assert torch.equal(torch.stack(list(found.masks)), bitmaps)
    assert found[:0].bitmaps().shape == (0, 70, 90)
    found[:4].save(tmp_path / "found.png")
    assert min(Image.open(tmp_path / "found.png").size) >= 70


def test_bad_tiles(tiny_config: Config, tmp_path: Path) -> None:
    for size in (-1, 10, 63, 2**16):
        with refusal("bad-value", "TEST.TILES.SIZE"):
            tiny_config.replace({"TEST.TILES.SIZE": size})
    for overlap in (-0.1, 0.95, float("nan")):
        with refusal("bad-value", "TEST.TILES.OVERLAP"):
            tiny_config.replace({"TEST.TILES.OVERLAP": overlap})
    with refusal("bad-value", "DATALOADER.TILES.MIN_VISIBLE"):
        tiny_config.replace({"DATALOADER.TILES.MIN_VISIBLE": 0})
    save_weights(tmp_path / "m.pth", build_model(tiny_config).state_dict())
    predictor = Predictor(tiny_config.replace({"MODEL.WEIGHTS": str(tmp_path / "m.pth")}))
    with refusal("lone-flag", "overlap"):
        predictor(np.zeros((64, 80, 3), np.uint8), overlap=0.3)
    with refusal("bad-value", "TEST.TILES.SIZE"):
        predictor(np.zeros((64, 80, 3), np.uint8), tile=10)
