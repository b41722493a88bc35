"""RoIAlign over a feature pyramid (He et al. 2017, arXiv 1703.06870, section 3).

Every pooled value is a weighted sum of feature cells, and the weights do not depend on the channel. So on a
CPU RoIAlign can be one sparse matrix times the matrix of all cells, and its gradient the transposed product:
both run on all cores and vectorise over the channels, where torchvision's loops visit one channel at a time.
Training and channels-last prediction use it. Prediction in NCHW uses torchvision's loops, for the same bits
as detectron2, and divides the boxes among threads.

On a GPU Triton's kernels pool from all levels in one launch, without a wait. Their gradient is added by
atomic operations, as torchvision's, and differs in the last digits from run to run. torchvision pools where
Triton is missing, in programs, and under ``torch.use_deterministic_algorithms(True)``, for which it has
another way.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import kernels_run_on
from .roi_align_operator import LEVELS

SHARE = 32  # boxes that a thread takes at a time: some milliseconds of work


def roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    strides: Sequence[int],
    output_size: int,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """Pool the features of boxes, each from its own image and pyramid level.

    Args:
        features: levels (N, C, H_l, W_l).
        boxes: (R, 4) ``xyxy`` in pixels of the network's input.
        image: (R,) int64, row of each box in the batch.
        level: (R,) int64, index of each box's level.
        strides: pixels between cells of each level.
        output_size: S, side of the result.
        sampling_ratio: samples along each side of a bin; 0 takes one for each cell that the bin covers.
        aligned: shift by half a cell, so that a cell's value is that of its centre (``ROIAlignV2``).

    Returns:
        (R, C, S, S) in the features' dtype; differentiable with respect to ``features``.
    """
    if _takes_kernels(features):
        arguments = (list(features), boxes, image, level, list(strides), output_size, sampling_ratio, aligned)
        return torch.ops.gn_detect.roi_align(*arguments)
    dtype = features[0].dtype
    if dtype not in (torch.float32, torch.float64):  # half precision cannot tell neighbouring pixels apart
        wide = [f.float() for f in features]
        return roi_align(wide, boxes, image, level, strides, output_size, sampling_ratio, aligned).to(dtype)
    # In this order: an export knows no number of boxes.
    if _takes_sparse_product(features[0]) and len(boxes):
        with torch.no_grad():
            weights = _pooling_matrix(
                [f.shape for f in features],
                boxes,
                image,
                level,
                strides,
                output_size,
                sampling_ratio,
                aligned,
            )
        pooled = _SparsePooling.apply(weights.to(dtype), *features)
        return pooled.view(len(boxes), output_size, output_size, -1).permute(0, 3, 1, 2)
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1).to(dtype)
    jobs = [
        (feature.contiguous(), 1.0 / stride, row)
        for feature, stride, row in zip(features, strides, rows_by_value(level, len(features)), strict=True)
    ]

    def pool(feature: Tensor, scale: float, row: Tensor) -> Tensor:
        return torchvision.ops.roi_align(feature, rois[row], output_size, scale, sampling_ratio, aligned)

    if _takes_threads(features[0]):
        jobs = [(f, s, part) for f, s, row in jobs for part in row.split(SHARE)]
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            pooled = list(threads.map(torch.no_grad()(pool), *zip(*jobs, strict=True)))
    else:
        pooled = [pool(*job) for job in jobs]
    return torch.cat(pooled)[torch.argsort(torch.cat([row for _, _, row in jobs]))]


def rows_by_value(values: Tensor, count: int) -> list[Tensor]:
    """Return the ascending positions of 0, 1, up to ``count`` - 1 in (N,) int64 ``values``.

    A GPU is waited for once and not for each value; a program that is compiled or exported knows no numbers.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return [(values == i).nonzero()[:, 0] for i in range(count)]
    numbers = (values[:, None] == torch.arange(count, device=values.device)).sum(0).tolist()
    return list(torch.argsort(values, stable=True).split(numbers))


def _runs_on_cpu(feature: Tensor) -> bool:
    """Return False also while a program is recorded: it may run elsewhere, and keeps RoIAlign as it is."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not recorded and feature.device.type == "cpu"


def _takes_kernels(features: Sequence[Tensor]) -> bool:
    """Return whether Triton's kernels pool: not for a program, nor where sums must have a fixed order."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    on_gpu = features[0].device.type == "cuda" and kernels_run_on(features[0].device)
    fixed = torch.are_deterministic_algorithms_enabled()
    return on_gpu and not recorded and not fixed and len(features) <= LEVELS


def _takes_threads(feature: Tensor) -> bool:
    """Return whether to divide the boxes among threads: torchvision's loops use one."""
    return _runs_on_cpu(feature) and not torch.is_grad_enabled() and torch.get_num_threads() > 1


def _takes_sparse_product(feature: Tensor) -> bool:
    """Return whether the sparse product is faster and may round otherwise than torchvision.

    Without gradients in NCHW it may not: all else rounds as detectron2 does there, so the same weights find
    the same objects.
    """
    exact = not torch.is_grad_enabled() and feature.is_contiguous()
    return _runs_on_cpu(feature) and torch.backends.mkl.is_available() and not exact


class _SparsePooling(torch.autograd.Function):
    """Computes ``weights @ cells`` for the cells of several (N, C, H, W) maps; keeps only the weights."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *features: Tensor) -> Tensor:
        ctx.weights = weights
        ctx.shapes = [f.shape for f in features]
        channels = features[0].shape[1]
        cells = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels) for f in features])
        with torch.autocast("cpu", enabled=False):  # there is no sparse product in half precision
            return weights @ cells

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cells = ctx.weights.t() @ gradient.contiguous()
        parts = cells.split([n * h * w for n, _, h, w in ctx.shapes])
        maps = [
            part.view(n, h, w, c).permute(0, 3, 1, 2)
            for part, (n, c, h, w) in zip(parts, ctx.shapes, strict=True)
        ]
        return None, *maps


def _pooling_matrix(
    shapes: Sequence[torch.Size],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    strides: Sequence[int],
    side: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Return the weight of each cell in each bin: sparse CSR (R * S * S, cells of all levels).

    Bilinear interpolation is separable, so a bin's weights are the outer product of those along y and x.
    """
    scale = torch.tensor([1.0 / stride for stride in strides], dtype=boxes.dtype)[level]
    height = torch.tensor([shape[2] for shape in shapes])[level]
    width = torch.tensor([shape[3] for shape in shapes])[level]
    sizes = torch.tensor([0, *(n * h * w for n, _, h, w in shapes)])
    base = sizes.cumsum(0)[level] + image * height * width  # the first cell of each box's map

    start, end = (boxes * scale[:, None] - (0.5 if aligned else 0.0)).split(2, dim=1)
    extent = end - start if aligned else (end - start).clamp(min=1.0)
    first_x, count_x, weight_x = _axis_weights(start[:, 0], extent[:, 0], width, side, sampling_ratio)
    first_y, count_y, weight_y = _axis_weights(start[:, 1], extent[:, 1], height, side, sampling_ratio)

    entries = (count_y[:, :, None] * count_x[:, None, :]).flatten()  # of each row (box, bin y, bin x)
    begin = torch.cat([entries.new_zeros(1), entries.cumsum(0)])
    row = torch.repeat_interleave(entries)
    box = row // (side * side)
    y_bin, x_bin = row // side, box * side + row % side
    position = torch.arange(len(row)) - begin[row]
    y = position // count_x.flatten()[x_bin]
    x = position - y * count_x.flatten()[x_bin]
    value = weight_y.flatten(0, 1)[y_bin, y] * weight_x.flatten(0, 1)[x_bin, x]
    cell = base[box] + (first_y.flatten()[y_bin] + y) * width[box] + first_x.flatten()[x_bin] + x
    size = (len(boxes) * side * side, int(sizes.sum()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # 32-bit indices are what MKL's kernels take; with 64-bit ones each product would convert them.
        return torch.sparse_csr_tensor(begin.int(), cell.int(), value, size, check_invariants=False)


def _axis_weights(
    start: Tensor, extent: Tensor, limit: Tensor, side: int, sampling_ratio: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of the cells of each bin on one axis, with torchvision's grid and rounding.

    Args:
        start, extent: (R,) first edge and length of each box in cells.
        limit: (R,) int64 cells of the map.

    Returns:
        For each bin its first cell and number of cells, (R, S) int64, and their weights, (R, S, K).
    """
    size = (extent / side)[:, None, None]
    samples = torch.full_like(extent, sampling_ratio) if sampling_ratio > 0 else torch.ceil(extent / side)
    samples = samples.clamp(min=0)[:, None, None]
    steps = torch.arange(max(int(samples.max()), 1), dtype=extent.dtype)
    bins = torch.arange(side, dtype=extent.dtype)[:, None]
    position = (
        start[:, None, None] + bins * size + (steps + 0.5) * size / samples.clamp(min=1)
    )  # (R, S, samples)
    edge = limit.to(extent.dtype)[:, None, None]
    inside = (steps < samples) & (position >= -1) & (position <= edge)
    position = torch.minimum(position.clamp(min=0), edge - 1)
    cell = position.floor()
    fraction = position - cell

    first = cell[..., 0].long()
    last = torch.maximum(torch.where(inside, cell, 0).amax(dim=2).long(), first) + 1
    count = torch.minimum(last, limit[:, None] - 1) - first + 1
    weights = position.new_zeros(*first.shape, int((last - first).max()) + 1)
    offset = torch.where(inside, cell.long() - first[..., None], 0)
    share = inside / samples.clamp(min=1)
    weights.scatter_add_(2, offset, share * (1 - fraction))
    weights.scatter_add_(2, offset + 1, share * fraction)
    return first, count, weights
