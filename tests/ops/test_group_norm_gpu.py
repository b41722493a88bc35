"""The fused norm on a GPU, at the sizes for which it was made."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gn_detect.bench.norms import LAYERS
from gn_detect.layers import Conv2d, GroupNorm
from gn_detect.ops import group_norm

pytestmark = pytest.mark.gpu


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, order: torch.memory_format) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, device="cuda", generator=generator)
    return x.to(dtype, memory_format=order)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer(layer: str, images: int, dtype: torch.dtype, order: torch.memory_format) -> None:
    shape, with_residual, relu, _ = astuple(LAYERS[layer].of_images(images))
    x, extra, dy = (random(shape, dtype, i, order) for i in range(3))
    weight, bias = (random((shape[1],), torch.float32, 3 + i, torch.contiguous_format) for i in range(2))
    leaves = [t.requires_grad_() for t in (x, weight, bias, *([extra] if with_residual else []))]
    residual = extra if with_residual else None
    y = group_norm(x, 32, weight, bias, residual=residual, activation="relu" if relu else None)
    assert y.is_contiguous(memory_format=order)
    found = [y, *torch.autograd.grad(y, leaves, dy)]

    exact = [t.detach().double().requires_grad_() for t in leaves]
    z = F.group_norm(exact[0], 32, exact[1], exact[2])
    z = z + exact[3] if with_residual else z
    passed = (y > 0 if with_residual else z > 0) if relu else torch.ones_like(y, dtype=torch.bool)
    expected = [z.relu() if relu else z, *torch.autograd.grad(z, exact, dy.double() * passed)]
    tolerance = 1e-5 if dtype == torch.float32 else 9e-3
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_cuda_graph() -> None:
    block = Conv2d(64, 64, 3, padding=1, norm=GroupNorm(32, 64), activation="relu").cuda()
    x = torch.randn(1, 64, 200, 336, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(block, (x,))
    for seed in range(3):
        y = random((1, 64, 200, 336), torch.float32, seed, torch.contiguous_format).requires_grad_()
        ours = torch.autograd.grad(graphed(y).square().sum(), y)[0]
        torch.testing.assert_close(ours, torch.autograd.grad(block(y).square().sum(), y)[0])


def test_graphs_and_streams_at_the_same_time() -> None:
    """Neither shares the counters of arrived programs with another, so each result is that of one alone."""
    shape = (1, 64, 200, 336)
    images = [random(shape, torch.bfloat16, seed, torch.channels_last) for seed in range(4)]
    expected = [group_norm(x, 32, activation="relu") for x in images]
    streams = [torch.cuda.Stream() for _ in images]
    graphs, outputs = [], []
    for x in images[:2]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(group_norm(x, 32, activation="relu"))
        graphs.append(graph)
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, graph in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        for stream, x in zip(streams[2:], images[2:], strict=True):
            with torch.cuda.stream(stream):
                outputs.append(group_norm(x, 32, activation="relu"))
    torch.cuda.synchronize()
    for i, y in enumerate(outputs):
        assert torch.equal(y, expected[i if i < 2 else 2 + i % 2])


def test_inductor() -> None:
    block = Conv2d(64, 64, 3, padding=1, norm=GroupNorm(32, 64), activation="relu").cuda()
    x = torch.randn(1, 64, 50, 84, device="cuda")
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 32, 4800, 4800), (1, 64, 6000, 6000)])
def test_more_elements_than_32_bits_count(shape: tuple[int, ...], order: torch.memory_format) -> None:
    """In all, and in one sample."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
    x = x.contiguous(memory_format=order).requires_grad_()
    assert x.numel() > 2**31
    y = group_norm(x, 16, activation="relu")
    dy = torch.ones_like(y)
    dx = torch.autograd.grad(y, x, dy)[0]
    for sample, group in ((0, 0), (shape[0] - 1, 15)):
        depth = shape[1] // 16
        part = (slice(sample, sample + 1), slice(group * depth, (group + 1) * depth))
        own = x.detach()[part].float().contiguous().requires_grad_()
        z = F.group_norm(own, 1)
        torch.testing.assert_close(y[part].float(), z.relu(), rtol=1e-2, atol=1e-2)
        # Of so many values some are 0 but for the rounding of the statistics: there y says what passed.
        passed = y[part] > 0
        assert not (passed != (z > 0))[z.abs() > 1e-5].any()
        expected = torch.autograd.grad(z, own, passed.float())[0]
        torch.testing.assert_close(dx[part].float(), expected, rtol=1e-2, atol=1e-2)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(2, 32, 9, 9, device="cuda:1")
    torch.testing.assert_close(group_norm(x, 8), F.group_norm(x, 8), rtol=1e-4, atol=1e-5)
