"""NMS, matching and RoIAlign on a GPU at the sizes of a training step, in a CUDA graph without a wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gn_detect.ops import keep_best, match_boxes_padded, roi_align

pytestmark = pytest.mark.gpu

STRIDES = (4, 8, 16, 32)


def random_boxes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(*shape, 2, generator=generator) * torch.tensor([1200, 700])
    return torch.cat([corner, corner + torch.rand(*shape, 2, generator=generator) * 400 + 4], dim=-1)


def captured(step) -> tuple[Tensor, ...]:
    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    return results


@pytest.mark.parametrize("count", [2000, 12000])
def test_keep_best(count: int) -> None:
    boxes = random_boxes(4, count)
    valid = torch.rand(4, count, generator=torch.Generator().manual_seed(1)) < 0.9
    on_gpu = boxes.cuda(), valid.cuda()
    (found,) = captured(lambda: (keep_best(*on_gpu, 0.7),))
    assert torch.equal(found.cpu(), keep_best(boxes, valid, 0.7))


@pytest.mark.parametrize(("shared", "count"), [(True, 268_569), (False, 2100)])
def test_match_boxes_padded(shared: bool, count: int) -> None:
    boxes, objects = random_boxes(1 if shared else 2, count), random_boxes(2, 100)
    valid = torch.arange(100) < torch.tensor([[30], [7]])
    inputs = objects, valid, boxes
    on_gpu = [t.cuda() for t in inputs]
    found = captured(lambda: match_boxes_padded(*on_gpu, shared))
    for ours, theirs in zip(found, match_boxes_padded(*inputs, shared), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [7, 14])
def test_roi_align(side: int, order: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 64, 800 // s, 1344 // s, generator=generator) for s in STRIDES]
    boxes = random_boxes(512)
    image, level = (torch.randint(0, n, (512,), generator=generator) for n in (2, 4))
    gradient = torch.randn(512, 64, side, side, generator=generator)

    def pool(features: list[Tensor], *rest: Tensor) -> tuple[Tensor, ...]:
        *rois, gradient = rest
        pooled = roi_align(features, *rois, STRIDES, side)
        return pooled.detach(), *torch.autograd.grad(pooled, features, gradient)

    expected = pool([f.double().requires_grad_() for f in features], boxes, image, level, gradient.double())
    on_gpu = [f.cuda().contiguous(memory_format=order).requires_grad_() for f in features]
    rest = [t.cuda() for t in (boxes, image, level, gradient)]
    for ours, theirs in zip(captured(lambda: pool(on_gpu, *rest)), expected, strict=True):
        assert ours.is_contiguous(memory_format=order)
        error = (ours.cpu().double() - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-5
