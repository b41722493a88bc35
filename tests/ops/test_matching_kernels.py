"""Matching of boxes with objects: the kernels, on a CPU by Triton's interpreter, and the operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from gn_detect.ops import match_boxes_padded, matching

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0 / 0

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Found = tuple[Tensor, Tensor, Tensor]


def random_boxes(*shape: int, seed: int, grid: bool) -> Tensor:
    """On a grid there are few positions and sizes: many IoUs are the same, and some boxes have no area."""
    generator = torch.Generator().manual_seed(seed)
    if grid:
        corner = torch.randint(0, 8, (*shape, 2), generator=generator) * 4.0
        return torch.cat([corner, corner + torch.randint(0, 4, (*shape, 2), generator=generator) * 7.3], -1)
    corner = torch.rand(*shape, 2, generator=generator) * 100
    return torch.cat([corner, corner + torch.rand(*shape, 2, generator=generator) * 60], -1)


def real_objects(counts: list[int], room: int) -> Tensor:
    return torch.arange(room) < torch.tensor(counts)[:, None]


def expected(objects: Tensor, valid: Tensor, boxes: Tensor, keep_best: bool) -> Found:
    """Each image by its real objects alone."""
    shape = len(objects), boxes.shape[1]
    best, index = torch.full(shape, -1.0), torch.zeros(shape, dtype=torch.int64)
    is_best = torch.zeros(shape, dtype=torch.bool)
    for n, count in enumerate(valid.sum(1).tolist()):
        if count:
            iou = box_iou(objects[n, :count], boxes[n % len(boxes)])
            best[n], index[n] = iou.max(dim=0)
            if keep_best:
                for row in iou:
                    is_best[n] |= (row == row.max()) & (row > 0)
    return best, index, is_best


def by_kernels(objects: Tensor, valid: Tensor, boxes: Tensor, keep_best: bool) -> Found:
    module = pytest.importorskip("gn_detect.ops.matching_triton", exc_type=ImportError)
    tensors = [t.to(DEVICE) for t in (objects, valid, boxes)]
    best, index, is_best = module.match_boxes_padded(*tensors, keep_best)
    return best.cpu(), index.cpu(), is_best.cpu()


def assert_same(found: Found, wanted: Found) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("keep_best", [True, False])
@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize(
    ("counts", "room", "boxes", "shared"),
    [
        ([7], 7, 1, True),
        ([3, 0, 10], 10, 255, False),
        ([5, 1], 100, 256, True),
        ([0, 9, 4, 0, 1], 12, 700, True),
        ([0, 0], 3, 300, False),
    ],
)
def test_kernels_and_operator(
    counts: list[int], room: int, boxes: int, shared: bool, grid: bool, keep_best: bool
) -> None:
    """Rows that are not valid hold boxes, which must not count."""
    objects = random_boxes(len(counts), room, seed=0, grid=grid)
    others = random_boxes(1 if shared else len(counts), boxes, seed=1, grid=grid)
    inputs = objects, real_objects(counts, room), others, keep_best
    wanted = expected(*inputs)
    assert_same(by_kernels(*inputs), wanted)
    assert_same(match_boxes_padded(*inputs), wanted)
    if boxes > 1 and any(counts):
        assert wanted[2].any() == keep_best
        assert wanted[0].isnan().any() == grid


def test_ties_in_several_blocks() -> None:
    """All boxes of the highest IoU are the best ones; of equal objects the first is taken."""
    objects = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10]]])
    boxes = torch.tensor([50.0, 50, 60, 60]).repeat(1, 600, 1)
    boxes[0, [3, 300, 599]] = torch.tensor([8.0, 0, 10, 10])
    boxes[0, [4, 301]] = torch.tensor([0.0, 0, 1, 10])
    boxes[0, 500] = torch.tensor([29.0, 0, 39, 10])
    best, index, is_best = by_kernels(objects, real_objects([3], 3), boxes, True)
    assert is_best[0].nonzero()[:, 0].tolist() == [3, 300, 500, 599]
    assert index[0].nonzero()[:, 0].tolist() == [500]
    assert best[0, [3, 4]].tolist() == pytest.approx([0.2, 0.1])


def test_boxes_without_area() -> None:
    """0 / 0 is no number: it is a box's highest IoU as in PyTorch, and its object has no best box."""
    point, square = [3.0, 3, 3, 3], [0.0, 0, 5, 5]
    objects = torch.tensor([[square, point, point], [square, square, square]])
    boxes = torch.tensor([[square, point, [0.0, 0, 5, 2]]])
    inputs = objects, real_objects([3, 3], 3), boxes, True
    found = by_kernels(*inputs)
    assert_same(found, expected(*inputs))
    assert found[0][0].isnan().tolist() == [False, True, False]
    assert found[1][0].tolist() == [0, 1, 0]
    assert found[2].tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize("kernels", [True, False])
def test_a_gpu_with_and_without_triton(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("gn_detect.ops.matching_triton", exc_type=ImportError)
    calls: list[tuple] = []
    monkeypatch.setattr(module, "match_boxes_padded", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(matching, "kernels_run_on", lambda device: kernels)
    inputs = (
        random_boxes(1, 4, seed=0, grid=True),
        real_objects([3], 4),
        random_boxes(1, 9, seed=1, grid=True),
    )
    found = matching._on_gpu(*inputs, True)
    assert len(calls) == kernels
    assert kernels or torch.equal(found[1], match_boxes_padded(*inputs, True)[1])


@pytest.mark.parametrize("keep_best", [True, False])
def test_opcheck(keep_best: bool) -> None:
    boxes = [random_boxes(2, count, seed=count, grid=False).to(DEVICE) for count in (5, 20)]
    valid = real_objects([3, 5], 5).to(DEVICE)
    operator = torch.ops.gn_detect.match_boxes_padded.default
    torch.library.opcheck(operator, (boxes[0], valid, boxes[1], keep_best))
