"""Choice of kernels and tiles for a tensor. It depends only on the shape, so results repeat.

A tile covers ``block_groups`` groups x ``block_depth`` channels of each x ``block_pixels`` pixels. Two plans:

- *one launch*, if the groups of a tile have at most :data:`ONE_LAUNCH_BYTES`: a program normalises whole
  groups. If the tile holds all pixels, they stay in registers, and x is read once and written once. Otherwise
  they are read a second time, from the cache of the multiprocessor. One or a few warps hold each of the many
  small groups of RoIs.
- *split*, for larger groups: 1 or 2 images have only 32 or 64 groups of up to half a million elements, fewer
  than a GPU has multiprocessors. About :data:`SPLIT_PROGRAMS` programs compute the statistics of a part of a
  group each. The last of a group to finish merges them, and a second launch normalises.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

ONE_LAUNCH_BYTES = 72 * 1024
"""Bytes of x in one program: x and its gradient together fit the 192 KiB (A100) or 256 KiB (H100) cache of a
multiprocessor, and one of 32 programs still reads them in about a microsecond."""

SPLIT_PROGRAMS = 396
"""Three programs of 8 warps on each of 132 multiprocessors (H200), for which registers and shared memory
suffice, so that none waits for another to end. With the tiles that are on the way (:data:`STAGES`) they have
48 KB in flight, and 23 KB are needed to hide the latency of the H200's memory."""

SPLIT_BYTES = 16 * 1024
"""Least work of a program, so that small tensors are not cut into crumbs."""

STAGES = 3
"""Tiles of a split's loop on the way from memory at a time: one in work and two that are being copied."""

MERGED, MOST_PARTS = 16, 64
"""Partial results that a thread of the last program, and the whole program, read at a time."""

GROUP_TILE = {"forward": 16384, "backward": 8192}
"""Most elements of a tile of 16 warps: 32 a thread for x, 16 for x and dy. Twice as many spill registers."""

SPLIT_TILE = {"forward": 4096, "backward": 2048}
"""Elements of a split's tile of 8 warps or 4: in the forward 16 or 32 a thread, in the backward 8 of each
tensor."""

TINY_GROUP, TINY_GROUPS = 2048, 1024
"""Largest group in elements, and least number of groups, that few warps hold whole: those of RoIs. There a
program waits for its sums over warps: on an H200 a box head with 1 warp takes a third of the time with 8.
Fewer
groups leave the GPU room for more warps, and float64 leaves too few registers."""

TINY_TILE = {"channels first": 512, "channels last": 2048}
"""Least elements of such a tile: one group, or several smaller ones."""

TINY_BYTES = 128
"""Bytes of x for each thread of such a tile in the forward."""

TINY_SHARE = {"channels first": 32, "channels last": 16}
"""Elements of x for each thread in the backward. It also holds dy, and in channels-last order the sums of
each channel, which more threads share."""

NEIGHBOURS = 16
"""Least channels of a pixel in such a tile, in channels-last order; 32 in the backward of 4-byte types."""

SMALL_BYTES = 20 * 1000**2
"""Largest tensor in channels-last order whose split forward takes 4 warps a program instead of 8: 10 to 25 %
less time on an H200, but 10 % more for larger tensors."""

PIECE = 64
"""Most channels of a group in the tile of a split."""

SECTOR, LINE = 32, 128
"""Bytes of the smallest and of the full transaction of global memory."""

GRADIENT_PROGRAMS = 1024
"""Programs that sum the affine gradients of many samples (RoIs): each runs over several samples and leaves
one partial sum, so that the partial sums stay small against x."""


@dataclass(frozen=True)
class Plan:
    """Tiles and programs for one tensor.

    Attributes:
        one_launch: each program owns whole groups.
        block_groups, block_depth, block_pixels: extent of a tile, powers of two.
        pieces: tiles that cover the channels of one group.
        tiles: programs for one sample and one part of its pixels.
        splits: parts of the pixels; 1 with ``one_launch``.
        split_tiles: tiles of pixels in a part.
        samples: number of samples of one program of the one-launch backward.
        num_warps: warps of a program.
        stages: tiles in work or on their way from memory at a time: in the loops of a split, or in a loop
            over samples whose tiles hold all pixels.
    """

    one_launch: bool
    block_groups: int
    block_depth: int
    block_pixels: int
    pieces: int
    tiles: int
    splits: int
    split_tiles: int
    samples: int
    num_warps: int
    stages: int

    def holds_all(self, pixels: int) -> bool:
        """Return whether a tile holds its groups whole."""
        return self.one_launch and self.block_pixels >= pixels

    @property
    def registers(self) -> int | None:
        """Return the most registers of a thread: in a split, three times 8 warps run at a time with them.

        With 8 warps or more and no number, ptxas aims at more warps and spills a few registers on Ampere.
        """
        if self.one_launch:
            return 128 if self.num_warps == 16 else None
        return 65536 // (3 * 32 * self.num_warps) // 8 * 8

    def block_parts(self, direction: str) -> int:
        """Return how many parts a program merges at a time: means of groups, or sums of channels."""
        rows = self.block_groups * (1 if direction == "forward" else self.block_depth)
        return min(max(MERGED * 32 * self.num_warps // rows, 1), MOST_PARTS)


def power_of_two(n: int) -> int:
    """Return the least power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def alignment(pixels: int, itemsize: int) -> int:
    """Return the largest power of two up to 16 bytes of elements that divides the pixels of a channel."""
    return min(pixels & -pixels, 16 // itemsize)


@lru_cache(maxsize=4096)
def make_plan(
    direction: str, samples: int, channels: int, pixels: int, groups: int, itemsize: int, channels_last: bool
) -> Plan:
    """Return the plan for x of (samples, channels, pixels).

    Args:
        direction: ``"forward"`` or ``"backward"``.
        samples, channels, pixels: N, C and the product of the spatial dimensions, all positive.
        groups: divides ``channels``.
        itemsize: bytes of an element of x.
        channels_last: memory order (N, pixels, C) instead of (N, C, pixels).
    """
    depth = channels // groups
    narrow = 0 if channels_last else _narrowness(pixels, itemsize)
    tiny = samples * groups >= TINY_GROUPS and power_of_two(depth) * power_of_two(pixels) <= TINY_GROUP
    if tiny and itemsize <= 4:
        return _tiny(direction, samples, pixels, groups, depth, itemsize, channels_last, narrow)
    width = _one_launch_groups(pixels, groups, depth, itemsize, channels_last, narrow)
    rows = width * power_of_two(depth)
    if width * depth * pixels * itemsize <= ONE_LAUNCH_BYTES and rows <= GROUP_TILE[direction]:
        block_pixels = min(power_of_two(pixels), max((GROUP_TILE[direction] >> narrow) // rows, 1))
        num_warps = _warps(rows * block_pixels << narrow)
        return _one_launch(direction, samples, pixels, groups, depth, width, block_pixels, num_warps)
    return _split(direction, samples, pixels, groups, depth, itemsize, channels_last, narrow)


def _tiny(
    direction: str,
    samples: int,
    pixels: int,
    groups: int,
    depth: int,
    itemsize: int,
    channels_last: bool,
    narrow: int,
) -> Plan:
    """Let few warps hold their groups whole."""
    area = power_of_two(depth) * power_of_two(pixels)
    backward = direction == "backward"
    order = "channels last" if channels_last else "channels first"
    least = TINY_TILE[order] // area
    if channels_last:
        neighbours = 2 * NEIGHBOURS if backward and itemsize > 2 else NEIGHBOURS
        least = max(least, neighbours // power_of_two(depth))
    share = min(TINY_SHARE[order], TINY_BYTES // itemsize) if backward else TINY_BYTES // itemsize
    share >>= max(narrow - 1, 0)  # narrow accesses have many addresses
    width = min(max(least, 1), max(GROUP_TILE[direction] // area, 1), power_of_two(groups))
    num_warps = min(max(width * area // (32 * share), 1), 16)
    return _one_launch(direction, samples, pixels, groups, depth, width, power_of_two(pixels), num_warps)


def _one_launch_groups(
    pixels: int, groups: int, depth: int, itemsize: int, channels_last: bool, narrow: int
) -> int:
    """Return the groups of a tile: several small ones; channels last, at least a sector of every pixel."""
    area = power_of_two(depth) * power_of_two(pixels)
    if not channels_last:
        return min(max((SPLIT_TILE["forward"] >> narrow) // area, 1), power_of_two(groups))
    least, most = (max(size // itemsize // power_of_two(depth), 1) for size in (SECTOR, LINE))
    return min(max(2 * SPLIT_TILE["forward"] // area, least), most, power_of_two(groups))


def _one_launch(
    direction: str,
    samples: int,
    pixels: int,
    groups: int,
    depth: int,
    width: int,
    block_pixels: int,
    num_warps: int,
) -> Plan:
    tiles = -(-groups // width)
    of_program = -(-samples * tiles // GRADIENT_PROGRAMS) if direction == "backward" else 1
    return Plan(
        one_launch=True,
        block_groups=width,
        block_depth=power_of_two(depth),
        block_pixels=block_pixels,
        pieces=1,
        tiles=tiles,
        splits=1,
        split_tiles=-(-pixels // block_pixels),
        samples=of_program,
        num_warps=num_warps,
        stages=2 if of_program > 1 and block_pixels >= pixels else 1,
    )


def _split(
    direction: str,
    samples: int,
    pixels: int,
    groups: int,
    depth: int,
    itemsize: int,
    channels_last: bool,
    narrow: int,
) -> Plan:
    line = LINE // itemsize
    block_depth = min(power_of_two(depth), PIECE)
    pieces = -(-depth // block_depth)
    # A tile of several groups holds them whole.
    several = channels_last and pieces == 1
    width = min(max(line // block_depth, 1), power_of_two(groups)) if several else 1
    tiles = -(-groups // width) * pieces
    rows = width * block_depth
    wanted = max(SPLIT_PROGRAMS // (samples * tiles), 1)
    small = samples * groups * depth * pixels * itemsize <= SMALL_BYTES
    warps, area = 8, SPLIT_TILE[direction] >> narrow
    if direction == "forward" and channels_last and small:
        warps = 4
    block_pixels = min(max(area // rows, 1), power_of_two(pixels))
    pixel_tiles = -(-pixels // block_pixels)
    least = -(-SPLIT_BYTES // (rows * block_pixels * itemsize))
    split_tiles = min(max(-(-pixel_tiles // wanted), least), pixel_tiles)
    return Plan(
        one_launch=False,
        block_groups=width,
        block_depth=block_depth,
        block_pixels=block_pixels,
        pieces=pieces,
        tiles=tiles,
        splits=-(-pixel_tiles // split_tiles),
        split_tiles=split_tiles,
        samples=1,
        num_warps=warps,
        stages=STAGES,
    )


def _narrowness(pixels: int, itemsize: int) -> int:
    """Return how often tiles are halved if a channel's odd number of pixels forbids 16-byte accesses.

    Each access holds its address in two registers, so narrow ones take many.
    """
    return min((16 // (alignment(pixels, itemsize) * itemsize)).bit_length() - 1, 2)


def _warps(elements: int) -> int:
    """Return warps for 16 elements a thread, 16 at most."""
    return min(max(elements // (32 * 16), 1), 16)
