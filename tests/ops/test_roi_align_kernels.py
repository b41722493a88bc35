"""RoIAlign by the Triton kernels, on a CPU by Triton's interpreter, against torchvision one box at a time."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which PyTorch brings along on Linux")

from gn_detect.ops import roi_align, roi_align_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STRIDES = [4, 8, 16]
ORDERS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
ODD = [
    [5, 5, 5, 5],  # empty
    [9, 5, 9, 30],
    [1000, 1000, 1010, 1010],
    [5, 5, 3, 9],  # upside down
    [-300, -300, -290, -290],
    [-20, 10, 30, 90],
    [0, 0, 80, 64],
]
module = sys.modules["gn_detect.ops.roi_align"]


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the GPU's way."""
    monkeypatch.setattr(module, "_takes_kernels", lambda features: True)


def make_case(
    dtype: torch.dtype, order: str, count: int = 3
) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Pyramid of two images of 64 x 80 pixels with 5 channels, and boxes with their image and level."""
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(2, 5, 64 // s, 80 // s, generator=generator).to(
            DEVICE, dtype, memory_format=ORDERS[order]
        )
        for s in STRIDES
    ]
    corner = torch.rand(count, 2, generator=generator) * 60 - 5
    size = torch.rand(count, 2, generator=generator) * 20 + 2
    boxes = torch.cat([torch.tensor(ODD, dtype=torch.float32), torch.cat([corner, corner + size], dim=1)])
    image, level = (torch.randint(0, n, (len(boxes),), generator=generator) for n in (2, 3))
    level[: len(ODD)] = torch.tensor([0, 1, 0, 2, 0, 1, 2])  # large boxes take the interpreter long
    return [f.requires_grad_() for f in features], (boxes.to(DEVICE), image.to(DEVICE), level.to(DEVICE))


def reference(features: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor, *args) -> Tensor:
    side, sampling_ratio, aligned = args
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1).double()
    pooled = [
        torchvision.ops.roi_align(features[i], roi[None], side, 1 / STRIDES[i], sampling_ratio, aligned)
        for roi, i in zip(rois, level.tolist(), strict=True)
    ]
    return torch.cat(pooled)


def check(dtype: torch.dtype, order: str, side: int, sampling_ratio: int, aligned: bool) -> None:
    features, rois = make_case(dtype, order)
    pooled = roi_align(features, *rois, STRIDES, side, sampling_ratio, aligned)
    exact = [f.detach().double().contiguous().requires_grad_() for f in features]
    expected = reference(exact, *rois, side, sampling_ratio, aligned)
    gradient = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    found = torch.autograd.grad(pooled, features, gradient)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    # Values up to 4 and gradients up to 20, rounded once; the sums are in float32, or float64.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    for ours, theirs in ((pooled, expected), *zip(found, wanted, strict=True)):
        assert ours.dtype == dtype
        assert ours.is_contiguous(memory_format=ORDERS[order])
        error = (ours.double() - theirs).abs() / theirs.abs().clamp(min=4)
        assert error.max() <= tolerance[dtype]


@pytest.mark.parametrize(
    ("sampling_ratio", "aligned", "order"),
    [
        (0, True, "channels_first"),
        (0, True, "channels_last"),
        (0, False, "channels_first"),
        (2, True, "channels_last"),
        pytest.param(0, False, "channels_last", marks=pytest.mark.slow),
        pytest.param(2, True, "channels_first", marks=pytest.mark.slow),
    ],
)
def test_equals_torchvision(sampling_ratio: int, aligned: bool, order: str) -> None:
    check(torch.float64, order, 3, sampling_ratio, aligned)


@pytest.mark.parametrize(
    ("dtype", "order"),
    [
        (torch.float32, "channels_first"),
        (torch.bfloat16, "channels_first"),
        (torch.bfloat16, "channels_last"),
        (torch.float16, "channels_last"),
    ],
)
def test_sums_are_in_float32(dtype: torch.dtype, order: str) -> None:
    check(dtype, order, 3, 0, True)


@pytest.mark.parametrize(
    ("order", "sampling_ratio"),
    [("channels_first", 1), pytest.param("channels_last", 2, marks=pytest.mark.slow)],
)
def test_several_tiles(order: str, sampling_ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roi_align_triton, "TILE", 32)
    monkeypatch.setattr(roi_align_triton, "NEIGHBOURS", (4, 8))
    check(torch.float64, order, 4, sampling_ratio, True)


@pytest.mark.parametrize("order", ORDERS)
def test_no_boxes(order: str) -> None:
    features, rois = make_case(torch.float32, order)
    pooled = roi_align(features, *(t[:0] for t in rois), STRIDES, 7)
    assert pooled.shape == (0, 5, 7, 7)
    pooled.sum().backward()
    assert all(f.grad is not None and not f.grad.any() for f in features)


def test_one_level_and_levels_in_different_orders() -> None:
    features, (boxes, image, level) = make_case(torch.float32, "channels_first", count=2)
    small = torch.tensor([0, 1, 2, 3, 4, 7, 8])  # large boxes take the interpreter long
    boxes, image, level = boxes[small], image[small], level[small]
    first = torch.zeros_like(level)
    one = roi_align(features[:1], boxes, image, first, STRIDES[:1], 2)
    torch.testing.assert_close(
        one, reference([f.double() for f in features], boxes, image, first, 2, 0, True).float()
    )
    mixed = [features[0], *(f.detach().contiguous(memory_format=torch.channels_last) for f in features[1:])]
    assert torch.equal(
        roi_align(mixed, boxes, image, level, STRIDES, 2),
        roi_align(features, boxes, image, level, STRIDES, 2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_opcheck(order: str) -> None:
    features, (boxes, image, level) = make_case(torch.float32, order, count=0)
    rois = boxes[5:], image[5:], level[5:]
    torch.library.opcheck(torch.ops.gn_detect.roi_align.default, (features, *rois, STRIDES, 2, 1, True))
    shapes = [16, 8, 4], [20, 10, 5]
    gradient = torch.ones(2, 5, 2, 2, device=DEVICE)
    arguments = (gradient, *rois, 2, *shapes, STRIDES, 1, True, order == "channels_last")
    torch.library.opcheck(torch.ops.gn_detect.roi_align_backward.default, arguments)


def test_when_the_kernels_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, unless Triton is missing, sums need a fixed order, or a program is recorded."""
    monkeypatch.undo()
    features = [SimpleNamespace(device=torch.device("cuda", 0))] * 6
    monkeypatch.setattr(module, "kernels_run_on", lambda device: True)
    assert module._takes_kernels(features)
    assert not module._takes_kernels([torch.zeros(1)])
    assert not module._takes_kernels(features + features[:1])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not module._takes_kernels(features)
    monkeypatch.undo()
    monkeypatch.setattr(module, "kernels_run_on", lambda device: False)
    assert not module._takes_kernels(features)
    monkeypatch.setattr(module, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
    assert not module._takes_kernels(features)
