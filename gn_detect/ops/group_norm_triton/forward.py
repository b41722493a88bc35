"""Forward kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    fold,
    group_size,
    is_last,
    load_statistics,
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
    STAGES: tl.constexpr,
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
    for start in tl.range(begin + BLOCK_PIXELS, end, BLOCK_PIXELS, num_stages=STAGES):
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
            CHANNELS, BLOCK_GROUPS, BLOCK_DEPTH, BLOCK_PIXELS, CHANNELS_LAST, WIDE, dtype, 1,
        )  # fmt: skip
        rstd = 1 / tl.sqrt(squares / count + tl.cast(eps, dtype))
        mean_of_channel = spread(mean, BLOCK_GROUPS, BLOCK_DEPTH)
        scale = spread(rstd, BLOCK_GROUPS, BLOCK_DEPTH) * w
        for start in range(0, pixels, BLOCK_PIXELS):
            offsets, mask = tile_offsets(channel, exists, start + i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
            value = tl.load(x + offsets, mask=mask, other=0).to(dtype)
            _write_output(value, mask, offsets, mean_of_channel, scale, b, residual, y, RELU)
    store_statistics(statistics, mean, rstd, sample, group, samples, GROUPS, BLOCK_GROUPS)


@triton.jit
def _merge(
    partials, g, pixels, part_pixels, parts,
    GROUPS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return mean and variance of groups ``g`` of a sample from those of their parts, in the parts' order.

    ``partials``: (GROUPS, 2, parts) of the sample. Other programs wrote them, so caches of a multiprocessor
    are passed.
    """
    PIECES: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    i = tl.arange(0, BLOCK_PARTS)
    place = partials + g * 2 * parts
    some = tl.load(place, mask=g < GROUPS, other=0, cache_modifier=".cg")[:, None]
    count = group_size(pixels, DEPTH, WIDE, dtype)
    sums = tl.zeros((BLOCK_GROUPS, BLOCK_PARTS), dtype)
    squares = tl.zeros((BLOCK_GROUPS, BLOCK_PARTS), dtype)
    offset = tl.zeros((BLOCK_GROUPS,), dtype)
    for step in tl.static_range(2):  # the mean, then the squares about it
        for start in range(0, parts, BLOCK_PARTS):
            part = start + i
            given = (g < GROUPS)[:, None] & (part < parts)[None, :]
            here = place[:, None] + part[None, :]
            left = tl.minimum(part_pixels, pixels - part // PIECES * part_pixels)
            counts = (left * tl.minimum(BLOCK_DEPTH, DEPTH - part % PIECES * BLOCK_DEPTH)).to(dtype)[None, :]
            away = tl.load(here, mask=given, other=0, cache_modifier=".cg") - some - offset[:, None]
            if step == 0:
                sums += tl.where(given, counts * away, 0)
            else:
                within = tl.load(here + parts, mask=given, other=0, cache_modifier=".cg")
                squares += tl.where(given, within + counts * away * away, 0)
        if step == 0:
            offset = tl.sum(sums, axis=1) / count
    return tl.sum(some, axis=1) + offset, tl.sum(squares, axis=1) / count


@triton.jit(do_not_specialize=["samples", "pixel_units", "splits", "split_tiles"])
def partial_statistics(
    x, statistics, partials, tickets, samples, pixel_units, splits, split_tiles, eps: tl.float64,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute mean and rstd of each group from parts of it: split forward, first launch.

    ``partials``: (samples, GROUPS, 2, splits * pieces) means and sums of squares about them, which the last
    program of a group to finish merges. ``tickets``: (samples * tiles,) zeros. Grid: samples x tiles x
    splits.
    """
    DEPTH: tl.constexpr = CHANNELS // GROUPS
    PIECES: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    TILES: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS * PIECES
    dtype: tl.constexpr = partials.dtype.element_ty
    pixels = pixel_units * ALIGNMENT
    sample, tile, split = tile_program(TILES, splits, CHANNELS_LAST, False)
    channel, exists, group, piece = tile_channels(tile, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)
    part_pixels = split_tiles * BLOCK_PIXELS
    begin = split * part_pixels
    end = tl.minimum(begin + part_pixels, pixels)
    mean, squares = _shifted_sums(
        x + sample * CHANNELS * pixels, channel, exists, begin, end, pixels,
        CHANNELS, BLOCK_GROUPS, BLOCK_DEPTH, BLOCK_PIXELS, CHANNELS_LAST, WIDE, dtype, STAGES,
    )  # fmt: skip
    g = group + tl.arange(0, BLOCK_GROUPS)
    parts = splits * PIECES
    partials += sample * GROUPS * 2 * parts
    place = partials + g * 2 * parts + split * PIECES + piece
    tl.store(place, mean, mask=g < GROUPS)
    tl.store(place + parts, squares, mask=g < GROUPS)
    if is_last(tickets + sample * TILES + tile - piece, parts):
        mean, variance = _merge(
            partials, g, pixels, part_pixels, parts,
            GROUPS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH, BLOCK_PARTS, WIDE, dtype,
        )  # fmt: skip
        rstd = 1 / tl.sqrt(variance + tl.cast(eps, dtype))
        store_statistics(statistics, mean, rstd, sample, group, samples, GROUPS, BLOCK_GROUPS)


@triton.jit(do_not_specialize=["samples", "pixel_units", "splits", "split_tiles"])
def normalize(
    x, residual, weight, bias, y, statistics, samples, pixel_units, splits, split_tiles,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Normalise: split forward, second launch. Grid: samples x tiles x splits."""
    DEPTH: tl.constexpr = CHANNELS // GROUPS
    PIECES: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    TILES: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS * PIECES
    dtype: tl.constexpr = statistics.dtype.element_ty
    pixels = pixel_units * ALIGNMENT
    sample, tile, split = tile_program(TILES, splits, CHANNELS_LAST, True)
    channel, exists, group, _ = tile_channels(tile, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)
    mean, rstd = load_statistics(statistics, sample, group, samples, GROUPS, BLOCK_GROUPS, BLOCK_DEPTH)
    scale = rstd * per_channel(weight, channel, exists, dtype, 1)
    shift = per_channel(bias, channel, exists, dtype, 0)
    first = sample * CHANNELS * pixels
    x += first
    y += first
    if residual is not None:
        residual += first
    i = tl.arange(0, BLOCK_PIXELS)
    begin = split * split_tiles * BLOCK_PIXELS
    end = tl.minimum(begin + split_tiles * BLOCK_PIXELS, pixels)
    for start in tl.range(begin, end, BLOCK_PIXELS, num_stages=STAGES):
        offsets, mask = tile_offsets(channel, exists, start + i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
        value = tl.load(x + offsets, mask=mask, other=0, eviction_policy="evict_first").to(dtype)
        _write_output(value, mask, offsets, mean, scale, shift, residual, y, RELU)
