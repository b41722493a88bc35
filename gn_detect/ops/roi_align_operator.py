"""``gn_detect::roi_align`` as a PyTorch operator with its backward: all levels at once, without a wait.

The backward adds by atomic operations in no fixed order, as torchvision's does, so its last digits differ
from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LEVELS = 6  # the kernels have arguments for so many


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    """Import the kernels where they run: Triton is not everywhere."""
    from . import roi_align_triton

    return roi_align_triton


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _order(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _forward(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    last = _is_channels_last(features[0])
    features = [f.contiguous(memory_format=_order(last)) for f in features]
    return _kernels().forward(
        features, boxes, image, level, strides, output_size, sampling_ratio, aligned, last
    )


def _forward_fake(features: Sequence[Tensor], boxes: Tensor, *rest: Any) -> Tensor:
    first, side = features[0], rest[3]
    pooled = first.new_empty((boxes.shape[0], first.shape[1], side, side))
    return pooled.contiguous(memory_format=_order(_is_channels_last(first)))


def _backward(
    gradient: Tensor,
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[int],
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> Tensor:
    """Return the gradients of all maps one after the other, each in their memory order."""
    gradient = gradient.contiguous(memory_format=_order(channels_last))
    shapes = list(zip(heights, widths, strict=True))
    maps = _kernels().backward(
        gradient, boxes, image, level, images, shapes, strides, sampling_ratio, aligned, channels_last
    )
    return maps.to(gradient.dtype)


def _backward_fake(gradient: Tensor, *rest: Any) -> Tensor:
    images, heights, widths = rest[3:6]
    return gradient.new_empty(
        images * gradient.shape[1] * sum(h * w for h, w in zip(heights, widths, strict=True))
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, image, level, *ctx.settings = inputs
    ctx.save_for_backward(boxes, image, level)
    ctx.channels_last = _is_channels_last(features[0])
    ctx.shapes = [f.shape for f in features]


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    strides, _, sampling_ratio, aligned = ctx.settings
    images, channels = ctx.shapes[0][:2]
    heights, widths = [s[2] for s in ctx.shapes], [s[3] for s in ctx.shapes]
    flat = torch.ops.gn_detect.roi_align_backward(
        gradient, *ctx.saved_tensors, images, heights, widths, strides, sampling_ratio, aligned,
        ctx.channels_last,
    )  # fmt: skip
    parts = flat.split([images * channels * h * w for h, w in zip(heights, widths, strict=True)])
    if ctx.channels_last:
        maps = [p.view(n, h, w, c).movedim(3, 1) for p, (n, c, h, w) in zip(parts, ctx.shapes, strict=True)]
    else:
        maps = [p.view(shape) for p, shape in zip(parts, ctx.shapes, strict=True)]
    return maps, *[None] * 7


torch.library.define(
    "gn_detect::roi_align",
    "(Tensor[] features, Tensor boxes, Tensor image, Tensor level, int[] strides, int output_size,"
    " int sampling_ratio, bool aligned) -> Tensor",
)
torch.library.define(
    "gn_detect::roi_align_backward",
    "(Tensor gradient, Tensor boxes, Tensor image, Tensor level, SymInt images, SymInt[] heights,"
    " SymInt[] widths, int[] strides, int sampling_ratio, bool aligned, bool channels_last) -> Tensor",
)
torch.library.impl("gn_detect::roi_align", ("cuda", "cpu"), _forward)
torch.library.impl("gn_detect::roi_align_backward", ("cuda", "cpu"), _backward)
torch.library.register_fake("gn_detect::roi_align", _forward_fake)
torch.library.register_fake("gn_detect::roi_align_backward", _backward_fake)
torch.library.register_autograd("gn_detect::roi_align", _gradients, setup_context=_save)
