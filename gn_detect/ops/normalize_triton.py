"""The Triton kernel of :func:`gn_detect.ops.normalize_images`: a program writes a third of a row's values."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .kernels import on_device

BLOCK = 1024  # values that a program writes at a time


@triton.jit
def normalize(
    buffer, places, mean, std, output, height, width, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid: rows x images x 3. A third is a channel, or a third of the row's neighbours in memory."""
    row, third = tl.program_id(0), tl.program_id(2)
    image = tl.program_id(1).to(tl.int64)
    begin, real_height = tl.load(places + image * 3), tl.load(places + image * 3 + 1)
    real_width = tl.load(places + image * 3 + 2)
    line = row * 3 + third if CHANNELS_LAST else third * height + row
    output += (image * 3 * height + line) * width
    for first in range(0, width, BLOCK):
        i = first + tl.arange(0, BLOCK)
        if CHANNELS_LAST:
            channel = (third * width + i) % 3
            column = (third * width + i) // 3
        else:
            channel = third
            column = i
        exists = i < width
        real = exists & (column < real_width) & (row < real_height)
        place = begin + (channel * real_height + row) * real_width + column
        pixel = tl.load(buffer + place, mask=real, other=0).to(tl.float32)
        value = tl.div_rn(pixel - tl.load(mean + channel), tl.load(std + channel))
        tl.store(output + i, tl.where(real, value, 0.0), mask=exists)


def normalize_images(
    buffer: Tensor, places: Tensor, mean: Tensor, std: Tensor, output: Tensor, channels_last: bool
) -> None:
    """Fill ``output``, (N, 3, H, W) float32 in its memory order."""
    images, _, height, width = output.shape
    if output.numel() == 0:
        return
    block = min(triton.next_power_of_2(width), BLOCK)
    inputs = buffer, places.contiguous(), mean.contiguous(), std.contiguous()
    with on_device(output.device):
        normalize[(height, images, 3)](
            *inputs, output, height, width, CHANNELS_LAST=channels_last, BLOCK=block, num_warps=4
        )
