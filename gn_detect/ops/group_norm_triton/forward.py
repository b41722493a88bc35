"""Forward kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    fold,
    group_size,
    per_channel,
    spread,
    store_statistics,
    tile_channels,
    tile_offsets,
    tile_program,
)


@triton.jit
def _shifted_sums(
    x, channel, exists, begin, end, pixels,
    CHANNELS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return mean of each group's pixels ``begin`` to ``end`` in a tile, and sum of squares about it."""
    i = tl.arange(0, BLOCK_PIXELS)
    here = tl.maximum(fold(exists.to(tl.int32), BLOCK_GROUPS, BLOCK_DEPTH), 1).to(dtype)
    offsets, mask = tile_offsets(channel, exists, begin + i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
    first = tl.load(x + offsets, mask=mask, other=0).to(dtype)
    total = fold(tl.sum(first, axis=1), BLOCK_GROUPS, BLOCK_DEPTH)
    shift = total / (here * tl.minimum(end - begin, BLOCK_PIXELS).to(dtype))
    shift_of_channel = spread(shift, BLOCK_GROUPS, BLOCK_DEPTH)[:, None]
    difference = tl.where(mask, first - shift_of_channel, 0)
    sums = difference
    squares = difference * difference
    for start in range(begin + BLOCK_PIXELS, end, BLOCK_PIXELS):
        offsets, mask = tile_offsets(channel, exists, start + i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
        value = tl.load(x + offsets, mask=mask, other=0).to(dtype)
        difference = tl.where(mask, value - shift_of_channel, 0)
        sums += difference
        squares += difference * difference
    count = here * (end - begin).to(dtype)
    sum_of_group = fold(tl.sum(sums, axis=1), BLOCK_GROUPS, BLOCK_DEPTH)
    square_of_group = fold(tl.sum(squares, axis=1), BLOCK_GROUPS, BLOCK_DEPTH)
    rest = square_of_group - sum_of_group * (sum_of_group / count)
    return shift + sum_of_group / count, tl.where(rest < 0, 0, rest)


@triton.jit
def _write_output(value, mask, offsets, mean, scale, shift, residual, y, RELU: tl.constexpr):
    """Store relu((x - mean) * scale + shift + residual) of a tile."""
    z = (value - mean[:, None]) * scale[:, None] + shift[:, None]
    if residual is not None:
        z += tl.load(residual + offsets, mask=mask, other=0).to(z.dtype)
    if RELU:
        z = tl.where(z <= 0, 0, z)  # NaN stays
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples", "pixel_units"])
def forward_groups(
    x, residual, weight, bias, y, statistics, samples, pixel_units, eps: tl.float64,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Normalise whole groups in one program and one launch. Grid: samples x tiles."""
    DEPTH: tl.constexpr = CHANNELS // GROUPS
    TILES: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS
    dtype: tl.constexpr = statistics.dtype.element_ty
    pixels = pixel_units * ALIGNMENT
    sample, tile, _ = tile_program(TILES, 1, CHANNELS_LAST, False)
    channel, exists, group, _ = tile_channels(tile, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)
    first = sample * CHANNELS * pixels
    x += first
    y += first
    if residual is not None:
        residual += first
    w = per_channel(weight, channel, exists, dtype, 1)
    b = per_channel(bias, channel, exists, dtype, 0)
    i = tl.arange(0, BLOCK_PIXELS)
    count = group_size(pixels, DEPTH, WIDE, dtype)
    if ONE_TILE:
        offsets, mask = tile_offsets(channel, exists, i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
        value = tl.load(x + offsets, mask=mask, other=0).to(dtype)
        mean = fold(tl.sum(value, axis=1), BLOCK_GROUPS, BLOCK_DEPTH) / count
        rounded = spread(mean, BLOCK_GROUPS, BLOCK_DEPTH)[:, None]
        centred = tl.where(mask, value - rounded, 0)
        # The rest from rounding a large sum, so that a large mean costs no digits.
        rest = fold(tl.sum(centred, axis=1), BLOCK_GROUPS, BLOCK_DEPTH) / count
        squares = fold(tl.sum(centred * centred, axis=1), BLOCK_GROUPS, BLOCK_DEPTH)
        mean += rest
        rstd = 1 / tl.sqrt(squares / count - rest * rest + tl.cast(eps, dtype))
        mean_of_channel = spread(mean, BLOCK_GROUPS, BLOCK_DEPTH)
        scale = spread(rstd, BLOCK_GROUPS, BLOCK_DEPTH) * w
        _write_output(value, mask, offsets, mean_of_channel, scale, b, residual, y, RELU)
    else:
        mean, squares = _shifted_sums(
            x, channel, exists, 0, pixels, pixels,
            CHANNELS, BLOCK_GROUPS, BLOCK_DEPTH, BLOCK_PIXELS, CHANNELS_LAST, WIDE, dtype,
        )  # fmt: skip
        rstd = 1 / tl.sqrt(squares / count + tl.cast(eps, dtype))
        mean_of_channel = spread(mean, BLOCK_GROUPS, BLOCK_DEPTH)
        scale = spread(rstd, BLOCK_GROUPS, BLOCK_DEPTH) * w
        for start in range(0, pixels, BLOCK_PIXELS):
            offsets, mask = tile_offsets(channel, exists, start + i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
            value = tl.load(x + offsets, mask=mask, other=0).to(dtype)
            _write_output(value, mask, offsets, mean_of_channel, scale, b, residual, y, RELU)
    store_statistics(statistics, mean, rstd, sample, group, samples, GROUPS, BLOCK_GROUPS)


@triton.jit(do_not_specialize=["pixel_units", "splits", "split_tiles"])
def partial_statistics(
    x, partials, pixel_units, splits, split_tiles,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute mean and sum of squares about it of a part of each group: split forward, first launch.

    ``partials``: (samples, GROUPS, 2, splits * pieces). Grid: samples x tiles x splits.
    """
    DEPTH: tl.constexpr = CHANNELS // GROUPS
    PIECES: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    TILES: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS * PIECES
    dtype: tl.constexpr = partials.dtype.element_ty
    pixels = pixel_units * ALIGNMENT
    sample, tile, split = tile_program(TILES, splits, CHANNELS_LAST, False)
    channel, exists, group, piece = tile_channels(tile, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)
    begin = split * split_tiles * BLOCK_PIXELS
    end = tl.minimum(begin + split_tiles * BLOCK_PIXELS, pixels)
    mean, squares = _shifted_sums(
        x + sample * CHANNELS * pixels, channel, exists, begin, end, pixels,
        CHANNELS, BLOCK_GROUPS, BLOCK_DEPTH, BLOCK_PIXELS, CHANNELS_LAST, WIDE, dtype,
    )  # fmt: skip
    g = group + tl.arange(0, BLOCK_GROUPS)
    parts = splits * PIECES
    place = partials + (sample * GROUPS + g) * 2 * parts + split * PIECES + piece
    tl.store(place, mean, mask=g < GROUPS)
    tl.store(place + parts, squares, mask=g < GROUPS)


@triton.jit(do_not_specialize=["samples", "pixel_units", "splits", "split_tiles"])
def normalize(
    x, residual, weight, bias, y, statistics, partials, samples, pixel_units, splits, split_tiles,
    eps: tl.float64,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Merge partial statistics, normalise: split forward, second launch. Grid: samples x tiles x splits."""
    DEPTH: tl.constexpr = CHANNELS // GROUPS
    PIECES: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    TILES: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS * PIECES
    dtype: tl.constexpr = statistics.dtype.element_ty
    pixels = pixel_units * ALIGNMENT
    sample, tile, split = tile_program(TILES, splits, CHANNELS_LAST, True)
    channel, exists, group, piece = tile_channels(tile, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)

    g = group + tl.arange(0, BLOCK_GROUPS)
    part = tl.arange(0, BLOCK_PARTS)
    parts = splits * PIECES
    given = (g < GROUPS)[:, None] & (part < parts)[None, :]
    place = partials + ((sample * GROUPS + g) * 2 * parts)[:, None] + part[None, :]
    means = tl.load(place, mask=given, other=0)
    squares = tl.load(place + parts, mask=given, other=0)
    left = tl.minimum(split_tiles * BLOCK_PIXELS, pixels - part // PIECES * (split_tiles * BLOCK_PIXELS))
    counts = (left * tl.minimum(BLOCK_DEPTH, DEPTH - part % PIECES * BLOCK_DEPTH)).to(dtype)[None, :]
    count = group_size(pixels, DEPTH, WIDE, dtype)
    some = tl.sum(tl.where(part[None, :] == 0, means, 0), axis=1)
    away = tl.where(given, means - some[:, None], 0)
    offset = tl.sum(counts * away, axis=1) / count
    mean = some + offset
    away = tl.where(given, away - offset[:, None], 0)
    rstd = 1 / tl.sqrt(tl.sum(squares + counts * away * away, axis=1) / count + tl.cast(eps, dtype))

    mean_of_channel = spread(mean, BLOCK_GROUPS, BLOCK_DEPTH)
    w = per_channel(weight, channel, exists, dtype, 1)
    scale = spread(rstd, BLOCK_GROUPS, BLOCK_DEPTH) * w
    shift = per_channel(bias, channel, exists, dtype, 0)
    first = sample * CHANNELS * pixels
    x += first
    y += first
    if residual is not None:
        residual += first
    i = tl.arange(0, BLOCK_PIXELS)
    begin = split * split_tiles * BLOCK_PIXELS
    for start in range(begin, tl.minimum(begin + split_tiles * BLOCK_PIXELS, pixels), BLOCK_PIXELS):
        offsets, mask = tile_offsets(channel, exists, start + i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
        value = tl.load(x + offsets, mask=mask, other=0, eviction_policy="evict_first").to(dtype)
        _write_output(value, mask, offsets, mean_of_channel, scale, shift, residual, y, RELU)
    if (split == 0) & (piece == 0):
        store_statistics(statistics, mean, rstd, sample, group, samples, GROUPS, BLOCK_GROUPS)
