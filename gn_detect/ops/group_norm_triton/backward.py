"""Backward kernels."""

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
    RELU: tl.constexpr, dtype: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return sums of dz * xhat and of dz over pixels ``begin`` to ``end``; store dz where needed."""
    i = tl.arange(0, BLOCK_PIXELS)
    sums = tl.zeros((channel.shape[0], BLOCK_PIXELS), dtype)
    products = tl.zeros((channel.shape[0], BLOCK_PIXELS), dtype)
    for start in tl.range(begin, end, BLOCK_PIXELS, num_stages=STAGES):
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
    RELU: tl.constexpr, dtype: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store dx of pixels ``begin`` to ``end``; ``of_scale`` and ``of_bias`` hold the sums of its formula."""
    i = tl.arange(0, BLOCK_PIXELS)
    for start in tl.range(begin, end, BLOCK_PIXELS, num_stages=STAGES):
        offsets, mask = tile_offsets(channel, exists, start + i, pixels, CHANNELS, CHANNELS_LAST, WIDE)
        centred = tl.load(x + offsets, mask=mask, other=0).to(dtype) - mean[:, None]
        dz = _output_gradient(dy, y, offsets, mask, centred, scale, shift, dtype, RELU)
        d = scale[:, None] * dz - of_bias[:, None] - centred * of_scale[:, None]
        tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _load_sums(sums, channel, exists, CHANNELS: tl.constexpr):
    """Load sums of dz * xhat and of dz, (2, CHANNELS), past the caches of a multiprocessor."""
    a = tl.load(sums + channel, mask=exists, other=0, cache_modifier=".cg")
    return a, tl.load(sums + CHANNELS + channel, mask=exists, other=0, cache_modifier=".cg")


@triton.jit
def _store_sums(sums, a, c, channel, exists, CHANNELS: tl.constexpr):
    tl.store(sums + channel, a, mask=exists)
    tl.store(sums + CHANNELS + channel, c, mask=exists)


@triton.jit
def _merge(partials, count, channel, exists, CHANNELS: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """Return the sums of (count, 2, CHANNELS) over the first axis, in its order."""
    dtype: tl.constexpr = partials.dtype.element_ty
    i = tl.arange(0, BLOCK_PARTS)[None, :]
    a = tl.zeros((channel.shape[0], BLOCK_PARTS), dtype)
    c = tl.zeros((channel.shape[0], BLOCK_PARTS), dtype)
    for start in range(0, count, BLOCK_PARTS):
        rows = partials + (start + i) * (2 * CHANNELS)
        mask = exists[:, None] & (start + i < count)
        more_a, more_c = _load_sums(rows, channel[:, None], mask, CHANNELS)
        a += more_a
        c += more_c
    return tl.sum(a, axis=1), tl.sum(c, axis=1)


@triton.jit(do_not_specialize=["samples", "samples_per_program", "runs", "pixel_units"])
def backward_groups(
    dy, x, y, weight, bias, statistics, dx, d_residual, partials, d_affine, tickets, samples,
    samples_per_program, runs, pixel_units,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr, ONE_TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of whole groups of several samples in one program.

    ``partials``: (runs, 2, CHANNELS) sums of the gradients of weight and bias over the program's samples,
    which the last program of a tile to finish adds up to ``d_affine`` (2, CHANNELS). ``d_affine`` alone, or
    both, may be None, and ``dx``, ``d_residual`` and the output ``y``. ``tickets``: (tiles,) zeros. Grid:
    runs of samples x tiles.
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
    for sample in tl.range(first, tl.minimum(first + samples_per_program, samples), num_stages=STAGES):
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
                scale, b, CHANNELS, BLOCK_PIXELS, CHANNELS_LAST, WIDE, RELU, dtype, 1,
            )  # fmt: skip
            if dx is not None:
                of_bias = fold(w * c, BLOCK_GROUPS, BLOCK_DEPTH) / count
                of_scale = fold(w * a, BLOCK_GROUPS, BLOCK_DEPTH) / count
                of_bias = spread(of_bias, BLOCK_GROUPS, BLOCK_DEPTH) * rstd
                of_scale = spread(of_scale, BLOCK_GROUPS, BLOCK_DEPTH) * rstd * rstd
                _store_input_gradient(
                    dy_here, x_here, y_here, dx + base, channel, exists, 0, pixels, pixels, mean, scale, b,
                    of_scale, of_bias, CHANNELS, BLOCK_PIXELS, CHANNELS_LAST, WIDE, RELU, dtype, 1,
                )  # fmt: skip
        d_weight += a
        d_bias += c
    if partials is not None:
        _store_sums(partials + run * 2 * CHANNELS, d_weight, d_bias, channel, exists, CHANNELS)
        if d_affine is not None:
            if is_last(tickets + tile, runs):
                d_weight, d_bias = _merge(partials, runs, channel, exists, CHANNELS, BLOCK_PARTS)
                _store_sums(d_affine, d_weight, d_bias, channel, exists, CHANNELS)


@triton.jit(do_not_specialize=["samples", "pixel_units", "splits", "split_tiles"])
def partial_gradients(
    dy, x, y, weight, bias, statistics, d_residual, partials, sums, d_affine, tickets, samples, pixel_units,
    splits, split_tiles,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, RELU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum dz * xhat and dz, and store the residual's gradient: split backward, first launch.

    ``partials``: (samples, splits, 2, CHANNELS) sums, which the last program of a sample and tile to finish
    adds up to ``sums`` (samples, 2, CHANNELS). The last one of a tile adds these up to ``d_affine``
    (2, CHANNELS). All may be None, or ``d_affine`` alone. ``tickets``: ((samples + 1) * tiles,) zeros.
    Grid: samples x tiles x splits.
    """
    DEPTH: tl.constexpr = CHANNELS // GROUPS
    PIECES: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    TILES: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS * PIECES
    dtype: tl.constexpr = statistics.dtype.element_ty
    pixels = pixel_units * ALIGNMENT
    sample, tile, split = tile_program(TILES, splits, CHANNELS_LAST, False)
    channel, exists, group, _ = tile_channels(tile, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)
    w = per_channel(weight, channel, exists, dtype, 1)
    b = per_channel(bias, channel, exists, dtype, 0)
    mean, rstd = load_statistics(statistics, sample, group, samples, GROUPS, BLOCK_GROUPS, BLOCK_DEPTH)
    base = sample * CHANNELS * pixels
    x += base
    dy += base
    if y is not None:
        y += base
    begin = split * split_tiles * BLOCK_PIXELS
    end = tl.minimum(begin + split_tiles * BLOCK_PIXELS, pixels)
    a, c = _sum_gradients(
        dy, x, y, d_residual, base, channel, exists, begin, end, pixels, mean, rstd, rstd * w, b,
        CHANNELS, BLOCK_PIXELS, CHANNELS_LAST, WIDE, RELU, dtype, STAGES,
    )  # fmt: skip
    if partials is not None:
        partials += sample * splits * 2 * CHANNELS
        _store_sums(partials + split * 2 * CHANNELS, a, c, channel, exists, CHANNELS)
        if is_last(tickets + sample * TILES + tile, splits):
            a, c = _merge(partials, splits, channel, exists, CHANNELS, BLOCK_PARTS)
            _store_sums(sums + sample * 2 * CHANNELS, a, c, channel, exists, CHANNELS)
            if d_affine is not None:
                if is_last(tickets + samples * TILES + tile, samples):
                    a, c = _merge(sums, samples, channel, exists, CHANNELS, BLOCK_PARTS)
                    _store_sums(d_affine, a, c, channel, exists, CHANNELS)


@triton.jit(do_not_specialize=["samples", "pixel_units", "splits", "split_tiles"])
def input_gradient(
    dy, x, y, weight, bias, statistics, dx, sums, samples, pixel_units, splits, split_tiles,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ALIGNMENT: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
    RELU: tl.constexpr, STAGES: tl.constexpr,
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
    channel, exists, group, piece = tile_channels(tile, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)
    w = per_channel(weight, channel, exists, dtype, 1)
    b = per_channel(bias, channel, exists, dtype, 0)
    mean, rstd = load_statistics(statistics, sample, group, samples, GROUPS, BLOCK_GROUPS, BLOCK_DEPTH)

    of_scale = tl.zeros((BLOCK_GROUPS,), dtype)
    of_bias = tl.zeros((BLOCK_GROUPS,), dtype)
    for i in range(PIECES):
        other, there, _, _ = tile_channels(tile - piece + i, CHANNELS, DEPTH, BLOCK_GROUPS, BLOCK_DEPTH)
        a, c = _load_sums(sums + sample * 2 * CHANNELS, other, there, CHANNELS)
        factor = per_channel(weight, other, there, dtype, 1)
        of_scale += fold(factor * a, BLOCK_GROUPS, BLOCK_DEPTH)
        of_bias += fold(factor * c, BLOCK_GROUPS, BLOCK_DEPTH)
    count = group_size(pixels, DEPTH, WIDE, dtype)
    of_scale = spread(of_scale / count, BLOCK_GROUPS, BLOCK_DEPTH) * rstd * rstd
    of_bias = spread(of_bias / count, BLOCK_GROUPS, BLOCK_DEPTH) * rstd

    base = sample * CHANNELS * pixels
    x += base
    dy += base
    if y is not None:
        y += base
    begin = split * split_tiles * BLOCK_PIXELS
    end = tl.minimum(begin + split_tiles * BLOCK_PIXELS, pixels)
    _store_input_gradient(
        dy, x, y, dx + base, channel, exists, begin, end, pixels, mean, rstd * w, b, of_scale, of_bias,
        CHANNELS, BLOCK_PIXELS, CHANNELS_LAST, WIDE, RELU, dtype, STAGES,
    )  # fmt: skip
