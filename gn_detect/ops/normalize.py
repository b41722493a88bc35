"""Images of a batch, packed one after the other, to one normalised and padded tensor in a single pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import kernels_run_on


def normalize_images(
    buffer: Tensor, places: Tensor, mean: Tensor, std: Tensor, size: tuple[int, int], channels_last: bool
) -> Tensor:
    """Return ``(image - mean) / std`` of each image, with zeros to the right and below.

    Args:
        buffer: uint8 bytes that hold the images, each (3, H, W).
        places: (N, 3) int64: position of an image's first byte, its height and width.
        mean, std: (3, 1, 1) float32.
        size: height and width of the result, at least those of each image.
        channels_last: memory order of the result.

    Returns:
        (N, 3, height, width) float32.
    """
    return torch.ops.gn_detect.normalize_images(buffer, places, mean, std, *size, channels_last)


def _one_by_one(
    buffer: Tensor, places: Tensor, mean: Tensor, std: Tensor, height: int, width: int, channels_last: bool
) -> Tensor:
    batch = _fake(buffer, places, mean, std, height, width, channels_last).zero_()
    for padded, (begin, h, w) in zip(batch, places.tolist(), strict=True):
        image = buffer[begin : begin + 3 * h * w].view(3, h, w)
        padded[:, :h, :w] = (image - mean) / std
    return batch


def _on_gpu(
    buffer: Tensor, places: Tensor, mean: Tensor, std: Tensor, height: int, width: int, channels_last: bool
) -> Tensor:
    if not kernels_run_on(buffer.device):
        return _one_by_one(buffer, places, mean, std, height, width, channels_last)
    from . import normalize_triton

    batch = _fake(buffer, places, mean, std, height, width, channels_last)
    normalize_triton.normalize_images(buffer, places, mean, std, batch, channels_last)
    return batch


def _fake(
    buffer: Tensor, places: Tensor, mean: Tensor, std: Tensor, height: int, width: int, channels_last: bool
) -> Tensor:
    order = torch.channels_last if channels_last else torch.contiguous_format
    shape = len(places), 3, height, width
    return torch.empty(shape, dtype=torch.float32, device=buffer.device, memory_format=order)


torch.library.define(
    "gn_detect::normalize_images",
    "(Tensor buffer, Tensor places, Tensor mean, Tensor std, int height, int width, bool channels_last)"
    " -> Tensor",
)
torch.library.impl("gn_detect::normalize_images", "cpu", _one_by_one)
torch.library.impl("gn_detect::normalize_images", "cuda", _on_gpu)
torch.library.register_fake("gn_detect::normalize_images", _fake)
