"""RoIAlign over a pyramid, on the CPU a sparse product but in prediction, against torchvision's loops."""

from __future__ import annotations

import sys

import pytest
import torch
import torchvision
from torch import Tensor

from gn_detect.ops import roi_align, rows_by_value

STRIDES = (4, 8, 16)


def make_case(dtype: torch.dtype, batch: int = 2) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Pyramid, boxes (some outside, empty or upside down), their image and their level."""
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(batch, 8, 32 >> i, 40 >> i, dtype=dtype, generator=generator).requires_grad_()
        for i in range(3)
    ]
    corner = torch.rand(60, 2, dtype=dtype, generator=generator) * 200 - 40
    size = torch.rand(60, 2, dtype=dtype, generator=generator) ** 3 * 300
    boxes = torch.cat([corner, corner + size], dim=1)
    odd = [[5, 5, 5, 5], [1000, 1000, 1100, 1100], [5, 5, 3, 9], [-300, -300, -200, -200], [0, 0, 160, 128]]
    boxes[: len(odd)] = torch.tensor(odd, dtype=dtype)
    image = torch.randint(0, batch, (60,), generator=generator)
    level = torch.randint(0, 3, (60,), generator=generator)
    return features, boxes, image, level


def reference(features: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor, *args) -> Tensor:
    """One box after the other through torchvision."""
    side, sampling_ratio, aligned = args
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    pooled = [
        torchvision.ops.roi_align(features[i], roi[None], side, 1 / STRIDES[i], sampling_ratio, aligned)
        for roi, i in zip(rois, level.tolist(), strict=True)
    ]
    return torch.cat(pooled)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("side", [1, 7, 14])
def test_equals_torchvision(side: int, sampling_ratio: int, aligned: bool) -> None:
    features, boxes, image, level = make_case(torch.float64)
    pooled = roi_align(features, boxes, image, level, STRIDES, side, sampling_ratio, aligned)
    expected = reference(features, boxes, image, level, side, sampling_ratio, aligned)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-12)

    gradient = torch.randn(pooled.shape, dtype=pooled.dtype, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad(pooled, features, gradient),
        torch.autograd.grad(expected, features, gradient),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_float32_is_as_exact_as_torchvision() -> None:
    exact_features, boxes, image, level = make_case(torch.float64)
    exact = reference(exact_features, boxes.float().double(), image, level, 7, 0, True)
    features = [f.detach().float() for f in exact_features]
    ours = roi_align(features, boxes.float(), image, level, STRIDES, 7)
    # Sums of at most some hundred products of values below 5.
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=3e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_memory_format(memory_format: torch.memory_format) -> None:
    features, boxes, image, level = make_case(torch.float32)
    expected = roi_align(features, boxes, image, level, STRIDES, 7)
    moved = [f.detach().contiguous(memory_format=memory_format) for f in features]
    assert torch.equal(roi_align(moved, boxes, image, level, STRIDES, 7), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("threads", [1, 3])
def test_prediction_has_the_bits_of_torchvision(
    threads: int, context: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a pixel of a mask turns over here and there between detectron2 and us."""
    monkeypatch.setattr(sys.modules["gn_detect.ops.roi_align"], "SHARE", 7)
    features, boxes, image, level = make_case(torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with context():
            inside = [f.clone() for f in features]
            found = roi_align(inside, boxes, image, level, STRIDES, 7)
            expected = reference(features, boxes, image, level, 7, 0, True)
            assert torch.equal(found, expected)
            assert found.is_contiguous()
            turned = [f.contiguous(memory_format=torch.channels_last) for f in inside]
            sparse = roi_align(turned, boxes, image, level, STRIDES, 7)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sparse, roi_align(features, boxes, image, level, STRIDES, 7))


def test_without_the_sparse_product(monkeypatch: pytest.MonkeyPatch) -> None:
    features, boxes, image, level = make_case(torch.float32)
    sparse = roi_align(features, boxes, image, level, STRIDES, 7)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    torch.testing.assert_close(
        roi_align(features, boxes, image, level, STRIDES, 7), sparse, rtol=0, atol=1e-5
    )


def test_bfloat16_is_rounded_once() -> None:
    features, boxes, image, level = make_case(torch.float32)
    pooled = roi_align([f.detach().bfloat16() for f in features], boxes, image, level, STRIDES, 7)
    expected = roi_align([f.detach().bfloat16().float() for f in features], boxes, image, level, STRIDES, 7)
    assert torch.equal(pooled, expected.bfloat16())


def test_no_boxes() -> None:
    features, *_ = make_case(torch.float32)
    empty = torch.zeros(0, dtype=torch.int64)
    pooled = roi_align(features, torch.zeros(0, 4), empty, empty, STRIDES, 7)
    assert pooled.shape == (0, 8, 7, 7)
    pooled.sum().backward()
    assert all(f.grad is not None and not f.grad.any() for f in features)
    with torch.inference_mode():
        assert roi_align(features, torch.zeros(0, 4), empty, empty, STRIDES, 7).shape == (0, 8, 7, 7)


@pytest.mark.parametrize("values", [[2, 0, 2, 2, 0], [1], []])
def test_rows_by_value(values: list[int]) -> None:
    """Also of values that do not occur, and as a program that is traced."""
    found = rows_by_value(torch.tensor(values, dtype=torch.int64), 4)
    assert [rows.tolist() for rows in found] == [
        [i for i, v in enumerate(values) if v == n] for n in range(4)
    ]
    traced = torch.jit.trace(lambda v: tuple(rows_by_value(v, 4)), torch.tensor([0, 1]), check_trace=False)
    for ours, theirs in zip(traced(torch.tensor(values, dtype=torch.int64)), found, strict=True):
        assert torch.equal(ours, theirs)
