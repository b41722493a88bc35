"""Masks in and out of boxes, against slow references."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gn_detect.ops.masks as masks_module
from gn_detect.ops import (
    crop_bitmaps,
    paste_masks,
    paste_one_by_one,
    rasterize_masks,
    rasterize_polygons,
)


def paste_by_grid_sample(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The sampling grid that detectron2 describes in ``paste_masks_in_image``: probabilities (N, H, W)."""
    height, width = size
    y = (torch.arange(height) + 0.5 - boxes[:, 1, None]) / (boxes[:, 3] - boxes[:, 1])[:, None] * 2 - 1
    x = (torch.arange(width) + 0.5 - boxes[:, 0, None]) / (boxes[:, 2] - boxes[:, 0])[:, None] * 2 - 1
    grid = torch.stack(
        [x[:, None, :].expand(-1, height, width), y[:, :, None].expand(-1, height, width)], dim=-1
    )
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([80.0, 60.0])
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * 50], dim=1)


def test_pasting_equals_grid_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    masks, boxes = torch.rand(40, 28, 28, generator=generator), random_boxes(40, generator)
    boxes[0] = torch.tensor([-10.0, -10.0, 150.0, 110.0])  # over all borders
    boxes[1] = torch.tensor([5.0, 5.0, 5.5, 5.5])  # smaller than a pixel
    expected = paste_by_grid_sample(masks, boxes, (90, 120))
    pasted = paste_masks(masks, boxes, (90, 120))
    # Pixels whose probability is the threshold up to rounding may fall on either side.
    clear = (expected - 0.5).abs() > 1e-5
    assert clear.float().mean() > 0.9999
    assert torch.equal(pasted[clear], expected[clear] >= 0.5)
    assert pasted.any(dim=(1, 2)).sum() > 30


@pytest.mark.parametrize("cells", [28, 56])
def test_pixels_at_the_threshold_fall_where_grid_sampling_lets_them_fall(cells: int) -> None:
    """An edge through centres of pixels has the threshold there, but for rounding, other for each box."""
    generator = torch.Generator().manual_seed(1)
    edge = torch.randint(1, cells, (100,), generator=generator)
    width = 4 + 60 * torch.rand(100, generator=generator)
    left = 40.5 - width * edge / cells
    boxes = torch.stack([left, torch.full_like(left, 3), left + width, torch.full_like(left, 70)], dim=1)
    masks = (torch.arange(cells) >= edge[:, None]).float()[:, None].repeat(1, cells, 1)
    masks[50:], boxes[50:] = masks[50:].transpose(1, 2).clone(), boxes[50:, [1, 0, 3, 2]]
    expected = paste_by_grid_sample(masks, boxes, (90, 120))
    pasted = paste_masks(masks, boxes, (90, 120))
    assert ((expected - 0.5).abs() < 1e-5).sum() > 3000
    assert torch.equal(pasted, expected >= 0.5)


def test_pasting_nothing() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (9, 12)).shape == (0, 9, 12)


class OnGpu(Tensor):
    """Says that it is on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]

    def cpu(self) -> Tensor:  # type: ignore[override]
        """The plain tensor."""
        return self.as_subclass(Tensor)


def test_masks_that_the_gpu_cannot_hold_are_pasted_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    masks, boxes = torch.rand(5, 28, 28, generator=generator), random_boxes(5, generator)
    tried = []

    def fail(*_: object) -> Tensor:
        tried.append(True)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(masks_module, "_paste_in_chunks", fail)
    pasted = paste_masks(masks.as_subclass(OnGpu), boxes.as_subclass(OnGpu), (90, 120))
    assert tried
    assert type(pasted) is Tensor
    assert pasted.device.type == "cpu"
    assert torch.equal(pasted, paste_masks(masks, boxes, (90, 120)))


@pytest.mark.parametrize("count", [5, 0])
def test_whole_images_equal_the_surroundings_of_the_boxes(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """The accelerator's masks, here in chunks of two, against the CPU's."""
    monkeypatch.setattr(masks_module, "_PASTE_BYTES", 2 * 4 * 90 * 120)
    generator = torch.Generator().manual_seed(0)
    masks, boxes = torch.rand(count, 28, 28, generator=generator), random_boxes(count, generator)
    chunks = masks_module._paste_in_chunks(masks, boxes, (90, 120), 0.5)
    whole = masks_module._joined(chunks, count, (90, 120), masks.device)
    assert (whole != paste_masks(masks, boxes, (90, 120))).sum() <= 2


@pytest.mark.gpu
def test_pasting_on_a_gpu_equals_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    masks, boxes = torch.rand(40, 28, 28, generator=generator), random_boxes(40, generator)
    on_gpu = paste_masks(masks.cuda(), boxes.cuda(), (90, 120)).cpu()
    assert (on_gpu != paste_masks(masks, boxes, (90, 120))).float().mean() < 1e-5


def test_polygons_are_joined() -> None:
    left, right = np.array([0.0, 0, 4, 0, 4, 4, 0, 4]), np.array([6.0, 0, 10, 0, 10, 4, 6, 4])
    mask = rasterize_polygons([left, right], 6, 12)
    assert mask[:4, :4].all()
    assert mask[:4, 6:10].all()
    assert not mask[:, 4:6].any()
    assert not mask[4:].any()
    assert not rasterize_polygons([], 6, 12).any()


def test_mixed_masks_agree_with_each_other() -> None:
    """A rectangle gives the same target as a polygon and as a bitmap, with any neighbour."""
    polygon = [np.array([8.0, 8, 40, 8, 40, 32, 8, 32])]
    bitmap = torch.zeros(64, 64, dtype=torch.bool)
    bitmap[8:32, 8:40] = True
    boxes = torch.tensor([[8.0, 8, 40, 32], [0, 0, 56, 56], [8, 8, 40, 32], [0, 0, 56, 56]])
    targets = rasterize_masks([polygon, bitmap], torch.tensor([0, 0, 1, 1]), boxes, 28)
    assert targets.dtype == torch.bool
    assert targets[0].all()
    assert targets[2].all()
    # COCO's polygon fill and RoIAlign place the edge at most one cell apart.
    assert (targets[1] != targets[3]).sum() <= 28
    assert targets[3, 4:16, 4:20].all()
    assert targets[3].sum() == 12 * 16


def test_crop_of_a_shared_bitmap() -> None:
    bitmaps = torch.zeros(2, 20, 20, dtype=torch.bool)
    bitmaps[0, :10] = True
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 20, 10], [0, 0, 20, 20]])
    crops = crop_bitmaps(bitmaps, torch.tensor([0, 0, 1]), boxes, 4)
    assert crops[0].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert crops[1].all()
    assert not crops[2].any()


def test_no_rois() -> None:
    assert rasterize_masks([], torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), 28).shape == (0, 28, 28)


@pytest.mark.parametrize("pixels", [1, 500, 1 << 22])
def test_masks_pasted_one_by_one_are_those_pasted_together(
    monkeypatch: pytest.MonkeyPatch, pixels: int
) -> None:
    """To the last bit, also of boxes that leave the image, however many rows are sampled at a time."""
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(60, 28, 28, generator=generator)
    corners = torch.rand(60, 2, generator=generator) * torch.tensor([150.0, 120.0]) - 15
    boxes = torch.cat([corners, corners + torch.rand(60, 2, generator=generator) * 90 + 0.01], dim=1)
    together = paste_masks(masks, boxes, (90, 120))
    monkeypatch.setattr(masks_module, "_GRID_PIXELS", pixels)
    assert torch.equal(paste_masks(masks, boxes, (90, 120)), together)
    parts = list(paste_one_by_one(masks, boxes, (90, 120)))
    assert len(parts) == len(masks)
    for (top, left, part), whole in zip(parts, together, strict=True):
        found = torch.zeros(90, 120, dtype=torch.bool)
        found[top : top + part.shape[0], left : left + part.shape[1]] = part
        assert torch.equal(found, whole)


def test_the_cpu_goes_on_where_the_memory_of_a_gpu_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    masks, boxes = torch.rand(5, 28, 28, generator=generator), random_boxes(5, generator)
    together = paste_masks(masks, boxes, (90, 120))

    def two_and_no_more(*_: object) -> Iterator[Tensor]:
        yield together[:2]
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(masks_module, "_paste_in_chunks", two_and_no_more)
    parts = list(paste_one_by_one(masks.as_subclass(OnGpu), boxes.as_subclass(OnGpu), (90, 120)))
    assert [int(part.sum()) for _, _, part in parts] == together.sum(dim=(1, 2)).tolist()


def test_parts_of_the_masks_that_a_gpu_pastes_leave_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that are certain up to their edge reach farthest; some boxes leave the image."""
    generator = torch.Generator().manual_seed(5)
    corners = torch.rand(60, 2, generator=generator) * torch.tensor([120.0, 90.0]) - 10
    boxes = torch.cat([corners, corners + torch.rand(60, 2, generator=generator) * 90 + 0.01], dim=1)
    boxes[:20] = boxes[:20].round()
    masks, size, real = torch.ones(60, 7, 7), (90, 120), masks_module._paste_in_chunks
    whole = torch.cat(list(real(masks, boxes, size, 0.5)))

    def paste(masks: Tensor, boxes: Tensor, *rest: object) -> Iterator[Tensor]:
        return real(masks.cpu(), boxes.cpu(), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(masks_module, "_PASTE_BYTES", 7 * 4 * 90 * 120)
    monkeypatch.setattr(masks_module, "_paste_in_chunks", paste)
    parts = list(paste_one_by_one(masks.as_subclass(OnGpu), boxes.as_subclass(OnGpu), size))
    assert len(parts) == len(masks)
    for (top, left, part), mask in zip(parts, whole, strict=True):
        rows, columns = slice(top, top + part.shape[0]), slice(left, left + part.shape[1])
        assert torch.equal(part, mask[rows, columns])
        assert part.sum() == mask.sum()
    assert sum(part.numel() for _, _, part in parts) < whole.numel() / 2
