"""Functions that the kernels share: the channels, pixels and memory of a program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold(v, BLOCK_GROUPS: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """Sum the channels of each group: (BLOCK_GROUPS * BLOCK_DEPTH,) -> (BLOCK_GROUPS,)."""
    return tl.sum(tl.reshape(v, (BLOCK_GROUPS, BLOCK_DEPTH)), axis=1)


@triton.jit
def spread(v, BLOCK_GROUPS: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """Repeat the value of each group for its channels: (BLOCK_GROUPS,) -> (BLOCK_GROUPS * BLOCK_DEPTH,)."""
    wide = tl.broadcast_to(v[:, None], (BLOCK_GROUPS, BLOCK_DEPTH))
    return tl.reshape(wide, (BLOCK_GROUPS * BLOCK_DEPTH,))


@triton.jit
def tile_channels(
    tile, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_DEPTH: tl.constexpr
):
    """Return channels of a tile, a mask of those that exist, its first group and piece of the group."""
    PIECES: tl.constexpr = (DEPTH + BLOCK_DEPTH - 1) // BLOCK_DEPTH
    group = tile // PIECES * BLOCK_GROUPS
    piece = tile % PIECES
    i = tl.arange(0, BLOCK_GROUPS * BLOCK_DEPTH)
    if BLOCK_GROUPS == 1:  # written apart so that the compiler sees neighbours in memory
        depth = piece * BLOCK_DEPTH + i
        channel = group * DEPTH + depth
        exists = depth < DEPTH
    elif BLOCK_DEPTH == DEPTH:
        channel = group * DEPTH + i
        exists = channel < CHANNELS
    else:
        depth = i % BLOCK_DEPTH
        channel = (group + i // BLOCK_DEPTH) * DEPTH + depth
        exists = (depth < DEPTH) & (channel < CHANNELS)
    return channel, exists, group, piece


@triton.jit
def tile_offsets(
    channel, exists, pixel, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr
):
    """Return offsets of (channels, pixels) in a sample, ``WIDE`` in 64 bits, and a mask of those there."""
    mask = exists[:, None] & (pixel < pixels)[None, :]
    if WIDE:
        channel = channel.to(tl.int64)
        pixel = pixel.to(tl.int64)
    if CHANNELS_LAST:
        return pixel[None, :] * CHANNELS + channel[:, None], mask
    return channel[:, None] * pixels + pixel[None, :], mask


@triton.jit
def group_size(pixels, DEPTH: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr):
    """Return the number of elements of a group; ``WIDE`` ones may need 64 bits."""
    if WIDE:
        return pixels.to(dtype) * DEPTH
    return (pixels * DEPTH).to(dtype)


@triton.jit
def per_channel(pointer, channel, exists, dtype: tl.constexpr, default: tl.constexpr):
    """Load a scale or shift, or return the neutral value if there is none."""
    if pointer is not None:
        return tl.load(pointer + channel, mask=exists, other=0).to(dtype)
    return tl.full(channel.shape, default, dtype)


@triton.jit
def tile_program(tiles, splits, CHANNELS_LAST: tl.constexpr, REVERSE: tl.constexpr):
    """Return sample, tile and split of a program, in the order of memory or from its end.

    The second pass begins with the last data of the first one, which are still in the L2 cache.
    """
    i = tl.program_id(0)
    if REVERSE:
        i = tl.num_programs(0) - 1 - i
    sample = (i // (tiles * splits)).to(tl.int64)
    i = i % (tiles * splits)
    if CHANNELS_LAST:
        return sample, i % tiles, i // tiles
    return sample, i // splits, i % splits


@triton.jit
def is_last(ticket, count):
    """Return whether ``count`` programs have come here, this one the last. It then sees the stores of all.

    The ticket is 0 before the first of them and after the last.
    """
    tl.debug_barrier()  # the program's ticket comes after the stores of all its threads
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def load_statistics(
    statistics, sample, group, samples,
    GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Load mean and rstd for the channels of a tile, (BLOCK_GROUPS * BLOCK_DEPTH,)."""
    g = group + tl.arange(0, BLOCK_GROUPS)
    place = statistics + sample * GROUPS + g
    mean = tl.load(place, mask=g < GROUPS, other=0)
    rstd = tl.load(place + samples.to(tl.int64) * GROUPS, mask=g < GROUPS, other=0)
    return spread(mean, BLOCK_GROUPS, BLOCK_DEPTH), spread(rstd, BLOCK_GROUPS, BLOCK_DEPTH)


@triton.jit
def store_statistics(
    statistics, mean, rstd, sample, group, samples, GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr
):
    """Store mean and rstd of a tile's groups, (BLOCK_GROUPS,), in ``statistics`` (2, samples, GROUPS)."""
    g = group + tl.arange(0, BLOCK_GROUPS)
    place = statistics + sample * GROUPS + g
    tl.store(place, mean, mask=g < GROUPS)
    tl.store(place + samples.to(tl.int64) * GROUPS, rstd, mask=g < GROUPS)
