"""Mask targets of RoIs against pycocotools, by NumPy and by the Triton kernel."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import roi_align

from gn_detect.ops.mask_targets import PaddedMasks, crop_bitmaps, mask_targets, pad_masks
from gn_detect.structures import PolygonMask

Case = tuple[list[PolygonMask], np.ndarray, np.ndarray]


def polygon(random: np.random.Generator) -> np.ndarray:
    """Corners that cross themselves, leave the box, lie on integers, or are repeated."""
    count, kind = random.integers(3, 40), random.integers(0, 5)
    if kind == 0:
        corners = random.uniform(-20, 120, (count, 2))
    elif kind == 1:
        angle, radius = np.sort(random.uniform(0, 2 * np.pi, count)), random.uniform(10, 40, count)
        corners = 50 + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    elif kind == 2:
        corners = random.integers(0, 100, (count, 2)).astype(np.float64)
    elif kind == 3:
        corners = np.repeat(random.integers(0, 100, (count, 2)), 2, axis=0).astype(np.float64)
        corners[::3] = corners[0]
    else:  # no area: all corners on one line
        corners = np.outer(random.uniform(0, 100, count), random.uniform(0, 1, 2))
    return corners.reshape(-1)


def random_case(seed: int, rois: int = 25) -> Case:
    """Objects of 0 to 3 polygons, the object of each RoI, and boxes (R, 4)."""
    random = np.random.default_rng(seed)
    objects = [[polygon(random) for _ in range(random.integers(0, 4))] for _ in range(random.integers(1, 6))]
    corner = random.uniform(-10, 80, (rois, 2))
    boxes = np.concatenate([corner, corner + random.uniform(2, 80, (rois, 2))], axis=1).astype(np.float32)
    boxes[0, 2:] = boxes[0, :2]  # no area
    if seed % 2:
        boxes[1:] = boxes[1:].round()
    return objects, random.integers(0, len(objects), rois), boxes


def by_pycocotools(case: Case, side: int) -> np.ndarray:
    """detectron2's way, one RoI at a time."""
    objects, which, boxes = case
    drawn = np.zeros((len(which), side, side), dtype=bool)
    for target, index, box in zip(drawn, which, boxes.astype(np.float64), strict=True):
        scale = side / np.maximum(box[2:] - box[:2], 0.1)
        moved = [((p.reshape(-1, 2) - box[:2]) * scale).reshape(-1).tolist() for p in objects[index]]
        if moved:
            target[:] = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, side, side)))
    return drawn


def arguments(case: Case) -> tuple[PaddedMasks, Tensor, Tensor]:
    objects, which, boxes = case
    return pad_masks(objects, (100, 100)), torch.from_numpy(which), torch.from_numpy(boxes)


@pytest.mark.parametrize("side", [14, 28, 56])
def test_polygons_are_drawn_as_by_pycocotools(side: int) -> None:
    for seed in range(20):
        case = random_case(seed)
        assert np.array_equal(mask_targets(*arguments(case), side).numpy(), by_pycocotools(case, side)), seed


@pytest.mark.parametrize(("side", "seeds"), [(28, range(2)), (9, range(6, 8)), (56, range(9, 10))])
def test_the_kernel_draws_the_same(side: int, seeds: range) -> None:
    pytest.importorskip("triton", reason="needs Triton, which PyTorch brings along on Linux")
    from gn_detect.ops import mask_targets_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for seed in seeds:
        case = random_case(seed, rois=3)
        masks, which, boxes = arguments(case)
        tensors = (t.to(device) for t in (masks.corners, masks.polygons, masks.objects, which, boxes))
        drawn = mask_targets_triton.draw(*tensors, side).cpu().numpy()
        assert np.array_equal(drawn, by_pycocotools(case, side)), seed


def crop_case(seed: int, size: tuple[int, int], rois: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, the bitmap of each RoI, -1 for one without, and boxes that also leave the image."""
    generator = torch.Generator().manual_seed(seed)
    bitmaps = torch.rand(5, *size, generator=generator) < 0.5
    which = torch.randint(-1, 5, (rois,), generator=generator)
    limit = torch.tensor(size).flip(0)
    corner = (torch.rand(rois, 2, generator=generator) * 1.4 - 0.4) * limit
    boxes = torch.cat([corner, corner + torch.rand(rois, 2, generator=generator) * limit], dim=1)
    boxes[::2] = boxes[::2].round()  # a share of exactly one half is frequent
    boxes[0, 2:] = boxes[0, :2]  # no area
    boxes[1] = torch.cat([-limit, 2 * limit])
    return bitmaps, which, boxes


def cropped_by_torchvision(bitmaps: Tensor, which: Tensor, boxes: Tensor, side: int) -> Tensor:
    """detectron2's way, with all bitmaps in float32; shares of the cells."""
    rois = torch.cat([which[:, None].clamp(min=0).float(), boxes], dim=1)
    shares = roi_align(bitmaps[:, None].float(), rois, side, sampling_ratio=0, aligned=True)[:, 0]
    return torch.where((which >= 0)[:, None, None], shares, 0)


CROPS = [(0, (40, 56), 28, 4), (1, (33, 1), 7, 8), (2, (1, 50), 5, 8), (3, (30, 40), 9, 6)]


@pytest.mark.parametrize(("seed", "size", "side", "rois"), CROPS)
def test_the_kernel_crops_as_torchvision(seed: int, size: tuple[int, int], side: int, rois: int) -> None:
    kernels = pytest.importorskip("gn_detect.ops.mask_targets_triton", exc_type=ImportError)
    case = crop_case(seed, size, rois)
    shares = cropped_by_torchvision(*case, side)
    assert 0 < (shares >= 0.5).sum() < shares.numel()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert torch.equal(kernels.crop(*(t.to(device) for t in case), side).cpu(), shares >= 0.5)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest floating-point result of an operator."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.bytes = max(self.bytes, result.nbytes)
        return result


@pytest.mark.parametrize("fits", [1, 2, 5])
def test_bitmaps_are_cropped_in_bounded_memory(fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = crop_case(0, (60, 90), 30)
    most = 4 * 60 * 90 * fits
    module = import_module("gn_detect.ops.mask_targets")  # a function has this name, too
    monkeypatch.setattr(module, "_FLOAT_BYTES", most)
    with Largest() as largest:
        found = module._crop_some_at_a_time(*case, 7)
    assert torch.equal(found, cropped_by_torchvision(*case, 7) >= 0.5)
    assert 0 < largest.bytes <= most


def test_bitmaps_and_polygons_in_one_batch() -> None:
    random = np.random.default_rng(0)
    bitmap, small = torch.rand(60, 90) > 0.5, torch.rand(30, 40) > 0.5
    objects = [[polygon(random)], bitmap, [], small]
    which = torch.tensor([0, 1, 3, 2, 1, 3])
    boxes = torch.tensor(
        [[0, 0, 50, 50], [3, 4, 33, 58], [0, 0, 40, 30], [1, 1, 9, 9], [50, 20, 90, 60], [20.5, 10, 40, 30]]
    )
    found = mask_targets(pad_masks(objects, (64, 96)), which, boxes, 28)
    assert torch.equal(found[[1, 4]], crop_bitmaps(bitmap[None], torch.zeros(2).long(), boxes[[1, 4]], 28))
    assert torch.equal(found[[2, 5]], crop_bitmaps(small[None], torch.zeros(2).long(), boxes[[2, 5]], 28))
    assert not found[3].any()
    assert np.array_equal(found[0], by_pycocotools(([objects[0]], np.array([0]), boxes[:1].numpy()), 28)[0])


def test_shapes_do_not_depend_on_the_objects() -> None:
    shapes = []
    for objects in ([[], []], [[polygon(np.random.default_rng(0))], []]):
        masks = pad_masks(objects, (32, 32))
        shapes.append({name: value.shape for name, value in masks.tensors().items()})
        assert mask_targets(masks, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 28).shape == (
            0,
            28,
            28,
        )
    assert shapes[0] == shapes[1]


def test_the_operator_is_well_formed() -> None:
    masks, which, boxes = arguments(random_case(0))
    torch.library.opcheck(
        torch.ops.gn_detect.draw_polygons, (masks.corners, masks.polygons, masks.objects, which, boxes, 28)
    )
    torch.library.opcheck(torch.ops.gn_detect.crop_bitmaps, (*crop_case(0, (20, 30), 4), 7))
