"""Masks of whole images: polygons drawn, and predicted masks pasted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor
from torch.nn import functional

from ..structures import PolygonMask

_PASTE_BYTES = 1 << 30  # for one chunk of pasted float masks on an accelerator
_GRID_PIXELS = 1 << 22  # of a mask that the CPU samples at a time


def rasterize_polygons(polygons: PolygonMask, height: int, width: int) -> np.ndarray:
    """Draw the union of polygons as COCO does.

    Args:
        polygons: arrays (2K,) of ``x0, y0, x1, y1, ...`` in pixels, K at least 3; the list may be empty.
        height, width: size of the result in pixels.

    Returns:
        bool array (height, width).
    """
    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    rles = coco_mask.frPyObjects([p.tolist() for p in polygons], height, width)
    return coco_mask.decode(coco_mask.merge(rles)).astype(bool)


def _interpolation_matrix(start: Tensor, stop: Tensor, cells: int, pixels: Tensor) -> Tensor:
    """Return weights that interpolate ``cells`` cells over [start, stop) at the centres of ``pixels``.

    Args:
        start, stop: (N,) pixels.
        cells: side of the predicted mask.
        pixels: (P,) integer pixel positions as floats.

    Returns:
        (N, P, cells) weights; cells outside the box count as zero, as in ``grid_sample`` with zero padding
        and ``align_corners=False``.
    """
    position = (pixels + 0.5 - start[:, None]) / (stop - start)[:, None] * cells - 0.5  # (N, P)
    grid = torch.arange(cells, dtype=position.dtype, device=position.device)
    return (1 - (position[..., None] - grid).abs()).clamp_(min=0)


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Resize predicted masks into their boxes on an empty image, as detectron2's ``paste_masks_in_image``.

    On the CPU the result is the same to the last bit. On an accelerator rounding flips pixels whose
    probability is the threshold.

    Args:
        masks: (N, S, S) probabilities.
        boxes: (N, 4) ``xyxy`` in pixels of the image.
        size: (height, width) of the image.
        threshold: probability from which a pixel belongs to the object.

    Returns:
        (N, height, width) bool on the masks' device, or on the CPU if that device has no memory for them:
        100 masks of 48 megapixels are 4.8 GB.
    """
    if masks.device.type != "cpu":
        try:
            chunks = _paste_in_chunks(masks.float(), boxes.float(), size, threshold)
            return _joined(chunks, len(masks), size, masks.device)
        except torch.cuda.OutOfMemoryError:
            masks, boxes = masks.cpu(), boxes.cpu()
    pasted = torch.zeros(len(masks), *size, dtype=torch.bool)
    for index, (top, left, part) in enumerate(_paste_each(masks.float(), boxes.float(), size, threshold)):
        pasted[index, top : top + part.shape[0], left : left + part.shape[1]] = part
    return pasted


def paste_one_by_one(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the masks of :func:`paste_masks` one by one: all masks of a large image are several GB.

    Args:
        masks, boxes, size, threshold: see :func:`paste_masks`.

    Yields:
        The first row and column of a part of the image, and the pixels of that part, (height, width) bool
        on the CPU; all other pixels are False.
    """
    masks, boxes, done = masks.float(), boxes.float(), 0
    if masks.device.type != "cpu":
        try:
            parts = _parts_around(boxes, size)
            for chunk in _paste_in_chunks(masks, boxes, size, threshold):
                for mask in chunk.cpu():
                    rows, columns = parts[done]
                    done += 1
                    yield rows.start, columns.start, mask[rows, columns]
            return
        except torch.cuda.OutOfMemoryError:
            masks, boxes = masks[done:].cpu(), boxes[done:].cpu()
    yield from _paste_each(masks, boxes, size, threshold)


def _paste_in_chunks(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> Iterator[Tensor]:
    """Paste many masks at a time into whole images, on an accelerator: (chunk, height, width) bool.

    Bilinear resizing is separable, so each mask is two small matrix products instead of a sampling grid.
    """
    height, width = size
    cells = masks.shape[-1]
    rows = torch.arange(height, dtype=torch.float32, device=masks.device)
    columns = torch.arange(width, dtype=torch.float32, device=masks.device)
    chunk = max(1, _PASTE_BYTES // (4 * height * width))
    for begin in range(0, len(masks), chunk):
        part = slice(begin, begin + chunk)
        vertical = _interpolation_matrix(boxes[part, 1], boxes[part, 3], cells, rows)
        horizontal = _interpolation_matrix(boxes[part, 0], boxes[part, 2], cells, columns)
        yield vertical @ masks[part] @ horizontal.transpose(1, 2) >= threshold


def _joined(chunks: Iterable[Tensor], count: int, size: tuple[int, int], device: torch.device) -> Tensor:
    pasted, begin = torch.zeros(count, *size, dtype=torch.bool, device=device), 0
    for chunk in chunks:
        pasted[begin : begin + len(chunk)] = chunk
        begin += len(chunk)
    return pasted


def _paste_each(
    masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float
) -> Iterator[tuple[int, int, Tensor]]:
    """Compute only the pixels around each box, on the CPU; see :func:`paste_one_by_one`."""
    for i, (vertical, horizontal) in enumerate(_parts_around(boxes, size)):
        y0, y1, x0, x1 = vertical.start, vertical.stop, horizontal.start, horizontal.stop
        part = torch.zeros(y1 - y0, x1 - x0, dtype=torch.bool)
        x = _sampling_positions(boxes[i, 0], boxes[i, 2], x0, x1)
        y = _sampling_positions(boxes[i, 1], boxes[i, 3], y0, y1)
        # Some rows at a time: the grid takes eight bytes for each pixel.
        rows = max(1, _GRID_PIXELS // max(1, x1 - x0))
        for first in range(0, y1 - y0 if x1 > x0 else 0, rows):
            some = y[first : first + rows]
            grid = torch.stack([x.expand(len(some), -1), some[:, None].expand(-1, x1 - x0)], dim=2)
            values = functional.grid_sample(masks[i, None, None], grid[None], align_corners=False)
            part[first : first + rows] = values[0, 0] >= threshold
        yield y0, x0, part


def _parts_around(boxes: Tensor, size: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Return rows and columns of each box (N, 4) with a margin: no pixel beyond them belongs to its mask.

    Outside a box less than half of the mask's last cell counts, so the probability is below 0.5.
    """
    height, width = size
    begin = (boxes[:, :2].floor() - 1).clamp(min=0).int().tolist()
    end = (boxes[:, 2:].ceil() + 1).int().tolist()
    return [
        (slice(y0, max(min(y1, height), y0)), slice(x0, max(min(x1, width), x0)))
        for (x0, y0), (x1, y1) in zip(begin, end, strict=True)
    ]


def _sampling_positions(start: Tensor, stop: Tensor, first: int, last: int) -> Tensor:
    """Return centres of the pixels [first, last) in [start, stop), scaled to ``grid_sample``'s [-1, 1]."""
    return (torch.arange(first, last, dtype=torch.float32) + 0.5 - start) / (stop - start) * 2 - 1
