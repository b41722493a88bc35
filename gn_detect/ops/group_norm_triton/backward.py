"""Backward kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    fold,
    group_size,
    load_statistics,
    per_channel,
    spread,
    tile_channels,
    tile_offsets,
    tile_program,
)


@triton.jit
def _output_gradient(dy, y, offsets, mask, centred, scale, shift, dtype: tl.constexpr, RELU: tl.constexpr):
    """Return dz of a tile: dy where the ReLU passed, and at NaN as in PyTorch.

    With a residual the sign of the output y decides; without, z is computed again.
    """
    dz = tl.load(dy + offsets, mask=mask, other=0).to(dtype)
    if RELU:
        if y is not None:
            z = tl.load(y + offsets, mask=mask, other=0).to(dtype)
        else:
            z = centred * scale[:, None] + shift[:, None]
        dz = tl.where(z <= 0, 0, dz)
    return dz


@triton.jit
def _sum_gradients(
    dy, x, y, d_residual, base, channel, exists, begin, end, pixels, mean, rstd, scale, shift,
    CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Return sums of dz * xhat and of dz over pixels ``begin`` to ``end``; store dz where needed."""
    i = tl.arange(0, BLOCK_PIXELS)
    sums = tl.zeros((channel.shape[0], BLOCK_PIXELS), dtype)
    products = tl.zeros((channel.shape[0], BLOCK_PIXELS), dtype)
    for start in range(begin, end, BLOCK_PIXELS):
        offsets, mask = tile_offsets(channel, exists, start + i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
        centred = tl.load(x + offsets, mask=mask, other=0).to(dtype) - mean[:, None]
        dz = _output_gradient(dy, y, offsets, mask, centred, scale, shift, dtype, RELU)
        if d_residual is not None:
            tl.store(d_residual + base + offsets, dz.to(d_residual.dtype.element_ty), mask=mask)
        sums += dz
        products += tl.where(mask, dz * centred, 0)
    return tl.sum(products, axis=1) * rstd, tl.sum(sums, axis=1)


@triton.jit
def _store_input_gradient(
    dy, x, y, dx, channel, exists, begin, end, pixels, mean, scale, shift, of_scale, of_bias,
    CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Store dx of pixels ``begin`` to ``end``; ``of_scale`` and ``of_bias`` hold the sums of its formula."""
    i = tl.arange(0, BLOCK_PIXELS)
    for start in range(begin, end, BLOCK_PIXELS):
        offsets, mask = tile_offsets(channel, exists, start + i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
        centred = tl.load(x + offsets, mask=mask, other=0).to(dtype) - mean[:, None]
        dz = _output_gradient(dy, y, offsets, mask, centred, scale, shift, dtype, RELU)
        d = scale[:, None] * dz - of_bias[:, None] - centred * of_scale[:, None]
        tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples", "samples_per_program", "pixel_units"])
def backward_groups(
    dy, x, y, weight, bias, statistics, dx, d_residual, partials, samples, samples_per_program, pixel_units,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of whole groups of several samples in one program.

    ``partials``: (programs of a tile, 2, CHANNELS) sums of the gradients of weight and bias over the
    program's samples. ``dx``, ``d_residual``, ``partials`` and the output ``y`` may be None. Grid: runs of
    samples x tiles.
    """
    DEPTH: tl.constexpr = CHANNELS // GROUPS
    TILES: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS
    dtype: tl.constexpr = statistics.dtype.element_ty
    pixels = pixel_units * ALIGNMENT
    count = group_size(pixels, DEPTH, WIDE, dtype)
    run, tile, _ = tile_program(TILES, 1, CHANNELS_LAST, False)
    channel, exists, group, _ = tile_channels(tile, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)
    w = per_channel(weight, channel, exists, dtype, 1)
    b = per_channel(bias, channel, exists, dtype, 0)
    i = tl.arange(0, BLOCK_PIXELS)
    d_weight = tl.zeros(channel.shape, dtype)
    d_bias = tl.zeros(channel.shape, dtype)
    first = run * samples_per_program
    for sample in range(first, tl.minimum(first + samples_per_program, samples)):
        base = sample * CHANNELS * pixels
        x_here = x + base
        dy_here = dy + base
        y_here = y
        if y is not None:
            y_here = y + base
        mean, rstd = load_statistics(statistics, sample, group, samples, GROUPS, BLOCK_GROUPS, BLOCK_DEPTH)
        scale = rstd * w
        if ONE_TILE:
            offsets, mask = tile_offsets(channel, exists, i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
            centred = tl.load(x_here + offsets, mask=mask, other=0).to(dtype) - mean[:, None]
            dz = _output_gradient(dy_here, y_here, offsets, mask, centred, scale, b, dtype, RELU)
            if d_residual is not None:
                tl.store(d_residual + base + offsets, dz.to(d_residual.dtype.element_ty), mask=mask)
            a = tl.sum(tl.where(mask, dz * centred, 0), axis=1) * rstd
            c = tl.sum(dz, axis=1)
            if dx is not None:
                of_bias = fold(w * c, BLOCK_GROUPS, BLOCK_DEPTH) / count
                of_scale = fold(w * a, BLOCK_GROUPS, BLOCK_DEPTH) / count
                of_bias = spread(of_bias, BLOCK_GROUPS, BLOCK_DEPTH) * rstd
                of_scale = spread(of_scale, BLOCK_GROUPS, BLOCK_DEPTH) * rstd * rstd
                d = scale[:, None] * dz - of_bias[:, None] - centred * of_scale[:, None]
                tl.store(dx + base + offsets, d.to(dx.dtype.element_ty), mask=mask)
        else:
            a, c = _sum_gradients(
                dy_here, x_here, y_here, d_residual, base, channel, exists, 0, pixels, pixels, mean, rstd,
                scale, b, CHANNELS, BLOCK_PIXELS, CHANNELS_LAST, WIDE, RELU, dtype,
            )  # fmt: skip
            if dx is not None:
                of_bias = fold(w * c, BLOCK_GROUPS, BLOCK_DEPTH) / count
                of_scale = fold(w * a, BLOCK_GROUPS, BLOCK_DEPTH) / count
                of_bias = spread(of_bias, BLOCK_GROUPS, BLOCK_DEPTH) * rstd
                of_scale = spread(of_scale, BLOCK_GROUPS, BLOCK_DEPTH) * rstd * rstd
                _store_input_gradient(
                    dy_here, x_here, y_here, dx + base, channel, exists, 0, pixels, pixels, mean, scale, b,
                    of_scale, of_bias, CHANNELS, BLOCK_PIXELS, CHANNELS_LAST, WIDE, RELU, dtype,
                )  # fmt: skip
        d_weight += a
        d_bias += c
    if partials is not None:
        place = partials + run * 2 * CHANNELS + channel
        tl.store(place, d_weight, mask=exists)
        tl.store(place + CHANNELS, d_bias, mask=exists)


@triton.jit(do_not_specialize=["samples", "pixel_units", "splits", "split_tiles"])
def partial_gradients(
    dy, x, y, weight, bias, statistics, d_residual, partials, group_partials, samples, pixel_units, splits,
    split_tiles,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """Sum a part of each group, and store the residual's gradient: split backward, first launch.

    ``partials``: (samples * splits, 2, CHANNELS) sums of dz * xhat and of dz; ``group_partials``: (samples,
    GROUPS, 2, splits * pieces), the same times weight and summed over the group; either may be None. Grid:
    samples x tiles x splits.
    """
    DEPTH: tl.constexpr = CHANNELS // GROUPS
    PIECES: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    TILES: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS * PIECES
    dtype: tl.constexpr = statistics.dtype.element_ty
    pixels = pixel_units * ALIGNMENT
    sample, tile, split = tile_program(TILES, splits, CHANNELS_LAST, False)
    channel, exists, group, piece = tile_channels(tile, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)
    w = per_channel(weight, channel, exists, dtype, 1)
    b = per_channel(bias, channel, exists, dtype, 0)
    mean, rstd = load_statistics(statistics, sample, group, samples, GROUPS, BLOCK_GROUPS, BLOCK_DEPTH)
    scale = rstd * w
    base = sample * CHANNELS * pixels
    x += base
    dy += base
    if y is not None:
        y += base
    begin = split * split_tiles * BLOCK_PIXELS
    end = tl.minimum(begin + split_tiles * BLOCK_PIXELS, pixels)
    a, c = _sum_gradients(
        dy, x, y, d_residual, base, channel, exists, begin, end, pixels, mean, rstd, scale, b,
        CHANNELS, BLOCK_PIXELS, CHANNELS_LAST, WIDE, RELU, dtype,
    )  # fmt: skip
    if partials is not None:
        place = partials + (sample * splits + split) * 2 * CHANNELS + channel
        tl.store(place, a, mask=exists)
        tl.store(place + CHANNELS, c, mask=exists)
    if group_partials is not None:
        g = group + tl.arange(0, BLOCK_GROUPS)
        parts = splits * PIECES
        place = group_partials + (sample * GROUPS + g) * 2 * parts + split * PIECES + piece
        tl.store(place, fold(w * a, BLOCK_GROUPS, BLOCK_DEPTH), mask=g < GROUPS)
        tl.store(place + parts, fold(w * c, BLOCK_GROUPS, BLOCK_DEPTH), mask=g < GROUPS)


@triton.jit(do_not_specialize=["samples", "pixel_units", "splits", "split_tiles"])
def input_gradient(
    dy, x, y, weight, bias, statistics, dx, group_partials, samples, pixel_units, splits, split_tiles,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """Compute dx: split backward, second launch. Grid: samples x tiles x splits.

    With a residual, ``dy`` is its gradient, to which the first launch applied the ReLU: ``RELU`` is False.
    """
    DEPTH: tl.constexpr = CHANNELS // GROUPS
    PIECES: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    TILES: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS * PIECES
    dtype: tl.constexpr = statistics.dtype.element_ty
    pixels = pixel_units * ALIGNMENT
    sample, tile, split = tile_program(TILES, splits, CHANNELS_LAST, True)
    channel, exists, group, _ = tile_channels(tile, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)
    w = per_channel(weight, channel, exists, dtype, 1)
    b = per_channel(bias, channel, exists, dtype, 0)
    mean, rstd = load_statistics(statistics, sample, group, samples, GROUPS, BLOCK_GROUPS, BLOCK_DEPTH)
    scale = rstd * w

    g = group + tl.arange(0, BLOCK_GROUPS)
    part = tl.arange(0, BLOCK_PARTS)
    parts = splits * PIECES
    given = (g < GROUPS)[:, None] & (part < parts)[None, :]
    place = group_partials + ((sample * GROUPS + g) * 2 * parts)[:, None] + part[None, :]
    count = group_size(pixels, DEPTH, WIDE, dtype)
    of_scale = tl.sum(tl.load(place, mask=given, other=0), axis=1) / count
    of_bias = tl.sum(tl.load(place + parts, mask=given, other=0), axis=1) / count
    of_scale = spread(of_scale, BLOCK_GROUPS, BLOCK_DEPTH) * rstd * rstd
    of_bias = spread(of_bias, BLOCK_GROUPS, BLOCK_DEPTH) * rstd

    base = sample * CHANNELS * pixels
    x += base
    dy += base
    if y is not None:
        y += base
    begin = split * split_tiles * BLOCK_PIXELS
    end = tl.minimum(begin + split_tiles * BLOCK_PIXELS, pixels)
    _store_input_gradient(
        dy, x, y, dx + base, channel, exists, begin, end, pixels, mean, scale, b, of_scale, of_bias,
        CHANNELS, BLOCK_PIXELS, CHANNELS_LAST, WIDE, RELU, dtype,
    )  # fmt: skip
