"""NMS of groups: the kernels, on a CPU by Triton's interpreter, and the operator against torchvision."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

from gn_detect.ops import keep_best, nms

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0 / 0

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_boxes(groups: int, count: int, spread: float, whole: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(groups, count, 2, generator=generator) * spread
    size = torch.rand(groups, count, 2, generator=generator) * 40 + 20
    boxes = torch.cat([corner, corner + size], dim=2)
    return boxes.round() if whole else boxes


def expected(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Greedy suppression as it is written in textbooks, with torchvision for each pair."""
    keep = valid.clone()
    for group in range(len(boxes)):
        for i in range(boxes.shape[1]):
            if keep[group, i]:
                for j in range(i + 1, boxes.shape[1]):
                    pair = boxes[group, [i, j]]
                    if (
                        keep[group, j]
                        and len(torchvision.ops.nms(pair, pair.new_tensor([2, 1]), threshold)) == 1
                    ):
                        keep[group, j] = False
    return keep


def by_kernels(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    nms_triton = pytest.importorskip("gn_detect.ops.nms_triton", exc_type=ImportError)
    return nms_triton.keep_best(boxes.to(DEVICE), valid.to(DEVICE), threshold).cpu()


@pytest.mark.parametrize("whole", [False, True], ids=["real", "whole"])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_kernels_keep_the_boxes_of_torchvision(count: int, whole: bool) -> None:
    """Whole coordinates make ties: equal boxes, and overlaps of exactly the threshold."""
    boxes = random_boxes(3, count, 30 if whole else 100, whole)
    valid = torch.rand(3, count, generator=torch.Generator().manual_seed(0)) < 0.8
    valid[1] = True
    valid[2, :70] = False
    boxes[0, ~valid[0]] = float("nan")
    boxes[2, ~valid[2]] = torch.tensor([-1e9, -1e9, 1e9, 1e9])
    threshold = (0.3, 0.5, 0.7)[count % 3]
    found = by_kernels(boxes, valid, threshold)
    assert torch.equal(found, keep_best(boxes, valid, threshold))
    assert count == 1 or 0 < found.sum() < valid.sum()


def test_the_operator_on_the_cpu_is_greedy() -> None:
    boxes = random_boxes(2, 30, 60, whole=True)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, ::3] = False
    found = keep_best(boxes, valid, 0.5)
    assert torch.equal(found, expected(boxes, valid, 0.5))
    assert 0 < found.sum() < valid.sum()


def test_a_dropped_box_drops_none() -> None:
    """Each box overlaps the next one alone, so every other one stays, over the borders of blocks, too."""
    left = torch.arange(150.0) * 4
    boxes = torch.stack([left, torch.zeros(150), left + 7, torch.ones(150)], dim=1)[None]
    valid = torch.ones(1, 150, dtype=torch.bool)
    assert torch.equal(by_kernels(boxes, valid, 0.2)[0], torch.arange(150) % 2 == 0)


@pytest.mark.parametrize("threshold", [0.6, 0.7])
def test_an_overlap_equal_to_the_threshold_in_float32(threshold: float) -> None:
    """The float32 number next to 0.6 is above it, and that next to 0.7 below."""
    width = threshold * 10
    boxes = torch.tensor([[[0, 0, 10, 1], [0, 0, width, 1]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    found = by_kernels(boxes, valid, threshold)
    assert torch.equal(found, keep_best(boxes, valid, threshold))
    assert found.tolist() == [[True, threshold == 0.7]]


def test_boxes_without_area() -> None:
    boxes = torch.tensor([[[3.0, 3, 3, 3], [3, 3, 3, 3], [0, 0, 5, 5]]])
    assert by_kernels(boxes, torch.ones(1, 3, dtype=torch.bool), 0.5).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing(shape: tuple[int, int]) -> None:
    valid = torch.ones(shape, dtype=torch.bool)
    assert keep_best(torch.zeros(*shape, 4), valid, 0.5).shape == shape
    assert by_kernels(torch.zeros(*shape, 4), valid, 0.5).shape == shape


@pytest.mark.parametrize("kernels", [True, False])
def test_a_gpu_with_and_without_triton(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    nms_triton = pytest.importorskip("gn_detect.ops.nms_triton", exc_type=ImportError)
    calls: list[tuple] = []
    monkeypatch.setattr(nms_triton, "keep_best", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(nms, "kernels_run_on", lambda device: kernels)
    boxes, valid = random_boxes(2, 10, 40), torch.ones(2, 10, dtype=torch.bool)
    found = nms._on_gpu(boxes, valid, 0.5)
    assert len(calls) == kernels
    assert kernels or torch.equal(found, keep_best(boxes.cpu(), valid.cpu(), 0.5))


def test_opcheck() -> None:
    boxes = random_boxes(2, 20, 40).to(DEVICE)
    valid = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(torch.ops.gn_detect.keep_best.default, (boxes, valid, 0.5))
