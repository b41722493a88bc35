"""Triton kernels of RoIAlign over all levels of a pyramid in one launch.

A program pools a tile of (bins, channels) of one box. The weight of a cell in a bin is the product of those
along y and x, each the sum over the bin's samples on this axis. So a cell is read once for a bin, and its
gradient added once, where a loop over samples would visit it up to four times for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import on_device
from .roi_align_operator import LEVELS

TILE = 2048  # values of a program
NEIGHBOURS = 256, 32  # channels of a tile in channels-last order, else its bins: neighbours in memory

_SIZES = [f"{name}{level}" for name in ("height", "width", "stride") for level in range(LEVELS)]


@triton.jit
def _of_level(level, v0, v1, v2, v3, v4, v5):
    v0 = tl.where(level == 1, v1, v0)
    v0 = tl.where(level == 2, v2, v0)
    v0 = tl.where(level == 3, v3, v0)
    v0 = tl.where(level == 4, v4, v0)
    return tl.where(level == 5, v5, v0)


@triton.jit
def _divide(a, b, dtype: tl.constexpr):
    """Round to the nearest: the number of samples depends on it."""
    if dtype == tl.float32:
        return tl.div_rn(a.to(dtype), b.to(dtype))
    else:  # noqa: RET505, the compiler takes only one branch
        return a.to(dtype) / b.to(dtype)


@triton.jit
def _tile(
    CHANNELS: tl.constexpr, BINS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_BINS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return bins and channels of a program, one a column and the other a row, their places and a mask."""
    roi = tl.program_id(0).to(tl.int64)
    bins = tl.program_id(1) * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    channel = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    if CHANNELS_LAST:
        bins = bins[:, None]
        channel = channel[None, :]
        place = (roi * BINS + bins) * CHANNELS + channel
    else:
        bins = bins[None, :]
        channel = channel[:, None]
        place = (roi * CHANNELS + channel) * BINS + bins
    return bins, channel, place, (bins < BINS) & (channel < CHANNELS)


@triton.jit
def _axis(
    corner, bins, limit, stride,
    SIDE: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return the grid of torchvision on one axis.

    Args:
        corner: pointer to the box's first coordinate, two before its second.
        bins: positions of the bins on this axis.
        limit: cells of the map.

    Returns:
        Samples of a bin and the distance between them; for each bin the position of its edge and its first
        cell; the largest number of cells of a bin.
    """
    one = tl.full((), 1, dtype)
    scale = _divide(one, stride, dtype)
    shift = one * (0.5 if ALIGNED else 0.0)
    start = tl.load(corner).to(dtype) * scale - shift
    extent = tl.load(corner + 2).to(dtype) * scale - shift - start
    if not ALIGNED:
        extent = tl.maximum(extent, one)
    size = _divide(extent, one * SIDE, dtype)
    if SAMPLES > 0:
        samples = tl.full((), SAMPLES, tl.int32)
    else:
        samples = tl.maximum(tl.ceil(size), one * 0).to(tl.int32)
    step = size / tl.maximum(samples, 1).to(dtype)
    edge = start + bins.to(dtype) * size
    a = _clamped(edge + 0.5 * step, limit, dtype).to(tl.int32)
    b = _clamped(edge + (samples.to(dtype) - 0.5) * step, limit, dtype).to(tl.int32)
    cells = tl.max(tl.maximum(a, b) - tl.minimum(a, b)) + 2
    return samples, step, edge, tl.minimum(a, b), tl.where(samples > 0, cells, 0)


@triton.jit
def _clamped(position, limit, dtype: tl.constexpr):
    zero = tl.full((), 0, dtype)
    return tl.minimum(tl.maximum(position, zero), (limit - 1).to(dtype))


@triton.jit
def _weight(cells, samples, step, edge, size, dtype: tl.constexpr):
    """Return the weight of one cell in each bin, summed over the samples on an axis."""
    total = tl.full(edge.shape, 0, dtype)
    cell = cells.to(dtype)
    limit = size.to(dtype)
    for i in range(samples):
        position = edge + (tl.cast(i, dtype) + 0.5) * step
        inside = (position >= -1) & (position <= limit)
        away = tl.abs(tl.minimum(tl.maximum(position, 0.0), limit - 1.0) - cell)
        total += tl.where(inside, tl.maximum(1.0 - away, 0.0), 0.0)
    return total


@triton.jit(do_not_specialize=_SIZES)
def pool(
    feature0, feature1, feature2, feature3, feature4, feature5, boxes, image, level, output,
    height0, height1, height2, height3, height4, height5, width0, width1, width2, width3, width4, width5,
    stride0, stride1, stride2, stride3, stride4, stride5,
    CHANNELS: tl.constexpr, SIDE: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, dtype: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Pool a tile. Grid: boxes x tiles of bins x tiles of channels."""
    bins, channel, place, exists = _tile(CHANNELS, SIDE * SIDE, CHANNELS_LAST, BLOCK_BINS, BLOCK_CHANNELS)
    roi = tl.program_id(0)
    own = tl.load(level + roi)
    height = _of_level(own, height0, height1, height2, height3, height4, height5)
    width = _of_level(own, width0, width1, width2, width3, width4, width5)
    stride = _of_level(own, stride0, stride1, stride2, stride3, stride4, stride5)
    feature = _of_level(own, feature0, feature1, feature2, feature3, feature4, feature5)
    n = tl.load(image + roi).to(tl.int64)
    corner = boxes + roi.to(tl.int64) * 4
    samples_y, step_y, edge_y, first_y, rows = _axis(
        corner + 1, bins // SIDE, height, stride, SIDE, SAMPLES, ALIGNED, dtype
    )
    samples_x, step_x, edge_x, first_x, columns = _axis(
        corner, bins % SIDE, width, stride, SIDE, SAMPLES, ALIGNED, dtype
    )
    if CHANNELS_LAST:
        feature += n * height * width * CHANNELS + channel
    else:
        feature += (n * CHANNELS + channel) * height * width
    total = tl.zeros(exists.shape, dtype)
    for y in range(rows):
        weight_y = _weight(first_y + y, samples_y, step_y, edge_y, height, dtype)
        row = (first_y + y).to(tl.int64) * width + first_x
        for x in range(columns):
            weight = weight_y * _weight(first_x + x, samples_x, step_x, edge_x, width, dtype)
            cell = (row + x) * (CHANNELS if CHANNELS_LAST else 1)
            value = tl.load(feature + cell, mask=exists & (weight > 0), other=0)
            total += weight * value.to(dtype)
    total /= tl.maximum(samples_y * samples_x, 1).to(dtype)
    tl.store(output + place, total.to(output.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["images", *_SIZES])
def add_gradient(
    gradient, boxes, image, level, maps, images,
    height0, height1, height2, height3, height4, height5, width0, width1, width2, width3, width4, width5,
    stride0, stride1, stride2, stride3, stride4, stride5,
    CHANNELS: tl.constexpr, SIDE: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, dtype: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Add the gradient of a tile to ``maps``, all levels one after the other. Grid as of ``pool``."""
    bins, channel, place, exists = _tile(CHANNELS, SIDE * SIDE, CHANNELS_LAST, BLOCK_BINS, BLOCK_CHANNELS)
    roi = tl.program_id(0)
    own = tl.load(level + roi)
    height = _of_level(own, height0, height1, height2, height3, height4, height5)
    width = _of_level(own, width0, width1, width2, width3, width4, width5)
    stride = _of_level(own, stride0, stride1, stride2, stride3, stride4, stride5)
    end0 = images.to(tl.int64) * height0 * width0
    end1 = end0 + images.to(tl.int64) * height1 * width1
    end2 = end1 + images.to(tl.int64) * height2 * width2
    end3 = end2 + images.to(tl.int64) * height3 * width3
    end4 = end3 + images.to(tl.int64) * height4 * width4
    before = _of_level(own, tl.zeros_like(end0), end0, end1, end2, end3, end4)
    n = tl.load(image + roi).to(tl.int64)
    corner = boxes + roi.to(tl.int64) * 4
    samples_y, step_y, edge_y, first_y, rows = _axis(
        corner + 1, bins // SIDE, height, stride, SIDE, SAMPLES, ALIGNED, dtype
    )
    samples_x, step_x, edge_x, first_x, columns = _axis(
        corner, bins % SIDE, width, stride, SIDE, SAMPLES, ALIGNED, dtype
    )
    if CHANNELS_LAST:
        maps += (before + n * height * width) * CHANNELS + channel
    else:
        maps += before * CHANNELS + (n * CHANNELS + channel) * height * width
    value = tl.load(gradient + place, mask=exists, other=0).to(dtype)
    value /= tl.maximum(samples_y * samples_x, 1).to(dtype)
    for y in range(rows):
        weight_y = _weight(first_y + y, samples_y, step_y, edge_y, height, dtype)
        row = (first_y + y).to(tl.int64) * width + first_x
        for x in range(columns):
            weight = weight_y * _weight(first_x + x, samples_x, step_x, edge_x, width, dtype)
            cell = (row + x) * (CHANNELS if CHANNELS_LAST else 1)
            tl.atomic_add(maps + cell, weight * value, mask=exists & (weight > 0), sem="relaxed")


def forward(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    strides: Sequence[int],
    side: int,
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> Tensor:
    """Return (R, C, S, S) in the memory order of the features, all dense in this order."""
    first = features[0]
    order = torch.channels_last if channels_last else torch.contiguous_format
    shape = (len(boxes), first.shape[1], side, side)
    output = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=order)
    sizes = _sizes([f.shape[2:] for f in features], strides)
    grid, constants = _launch(output, sampling_ratio, aligned, channels_last)
    maps = [*features, *[first] * (LEVELS - len(features))]
    if output.numel():
        with on_device(first.device):
            pool[grid](*maps, *_dense(boxes, image, level), output, *sizes, **constants)
    return output


def backward(
    gradient: Tensor,
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    images: int,
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> Tensor:
    """Return the gradients of all maps one after the other, in float32 (float64 for float64).

    Args:
        gradient: (R, C, S, S), dense in the order of the maps.
        images: N of the maps.
        shapes: (H, W) of each level.
    """
    grid, constants = _launch(gradient, sampling_ratio, aligned, channels_last)
    cells = images * sum(h * w for h, w in shapes)
    dtype = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    maps = gradient.new_zeros(cells * gradient.shape[1], dtype=dtype)
    if gradient.numel():
        sizes = _sizes(shapes, strides)
        with on_device(gradient.device):
            rois = _dense(boxes, image, level)
            add_gradient[grid](gradient, *rois, maps, images, *sizes, **constants)
    return maps


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def _sizes(shapes: Sequence[Sequence[int]], strides: Sequence[int]) -> list[int]:
    """Return heights, widths and strides, each for as many levels as the kernels take."""
    heights, widths = zip(*shapes, strict=True)
    missing = [1] * (LEVELS - len(shapes))
    return [*heights, *missing, *widths, *missing, *strides, *missing]


def _launch(
    pooled: Tensor, sampling_ratio: int, aligned: bool, channels_last: bool
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the grid and the constants of both kernels."""
    count, channels, side, _ = pooled.shape
    most_channels, most_bins = triton.next_power_of_2(channels), triton.next_power_of_2(side * side)
    if channels_last:
        block_channels = min(most_channels, NEIGHBOURS[0])
        block_bins = min(most_bins, TILE // block_channels)
    else:
        block_bins = min(most_bins, NEIGHBOURS[1])
        block_channels = min(most_channels, TILE // block_bins)
    constants = {
        "CHANNELS": channels,
        "SIDE": side,
        "SAMPLES": max(sampling_ratio, 0),
        "ALIGNED": aligned,
        "CHANNELS_LAST": channels_last,
        "dtype": tl.float64 if pooled.dtype == torch.float64 else tl.float32,
        "BLOCK_BINS": block_bins,
        "BLOCK_CHANNELS": block_channels,
        "num_warps": 4,
    }
    return (count, triton.cdiv(side * side, block_bins), triton.cdiv(channels, block_channels)), constants
