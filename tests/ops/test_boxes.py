"""Box arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._sympy.value_ranges import bound_sympy

from gn_detect.ops import box_area, clip_boxes, decode_boxes, encode_boxes, nms_by_group, scale_boxes

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
coordinate = st.floats(-500, 500)
length = st.floats(1, 400)
boxes = st.lists(st.tuples(coordinate, coordinate, length, length), min_size=1, max_size=8).map(
    lambda rows: torch.tensor([[x, y, x + w, y + h] for x, y, w, h in rows], dtype=torch.float64)
)


@settings(deadline=None, max_examples=50)
@given(boxes, st.integers(0, 2**31))
def test_decoding_inverts_encoding(reference: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(reference.shape, generator=generator, dtype=torch.float64)
    target = (
        reference + shift * 0.4 * torch.tensor([-1, -1, 1, 1]) * (reference[:, 2:] - reference[:, :2]).min()
    )
    deltas = encode_boxes(reference, target, WEIGHTS)
    decoded = decode_boxes(deltas, reference, WEIGHTS)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded.double(), target, rtol=1e-5, atol=1e-3)


def test_weights_of_x_and_y_may_differ() -> None:
    """Each coordinate has its own; equal ones are multiplied as numbers, with the same result."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(20, 2, generator=generator) * 50
    reference = torch.cat([corner, corner + torch.rand(20, 2, generator=generator) * 40 + 1], dim=1)
    target = reference + torch.rand(20, 4, generator=generator)
    plain = encode_boxes(reference, target, (1, 1, 1, 1))
    different = encode_boxes(reference, target, (2, 3, 4, 5))
    torch.testing.assert_close(different, plain * torch.tensor([2.0, 3, 4, 5]))
    torch.testing.assert_close(decode_boxes(different, reference, (2, 3, 4, 5)), target)


def test_deltas_of_a_known_pair() -> None:
    reference = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    target = torch.tensor([[5.0, 0.0, 25.0, 20.0]])
    # Centre moves by one width; width doubles.
    expected = torch.tensor([[10.0, 0.0, 5 * math.log(2), 0.0]])
    torch.testing.assert_close(encode_boxes(reference, target, WEIGHTS), expected)


def test_growth_is_limited() -> None:
    grown = decode_boxes(
        torch.tensor([[0.0, 0.0, 100.0, 100.0]]), torch.tensor([[0.0, 0.0, 16.0, 16.0]]), (1, 1, 1, 1)
    )
    torch.testing.assert_close(grown, torch.tensor([[-492.0, -492.0, 508.0, 508.0]]))


def test_a_box_for_each_class() -> None:
    reference = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    deltas = torch.tensor([[0.0, 0, 0, 0, 10.0, 0, 0, 0]])
    expected = torch.tensor([[0.0, 0, 10, 10, 10, 0, 20, 10]])
    torch.testing.assert_close(decode_boxes(deltas, reference, WEIGHTS), expected)


def test_no_boxes() -> None:
    assert decode_boxes(torch.zeros(0, 320), torch.zeros(0, 4), WEIGHTS).shape == (0, 320)


def test_clip_area_and_scale() -> None:
    box = torch.tensor([[-5.0, 3.0, 50.0, 70.0]])
    assert clip_boxes(box, (60, 40)).tolist() == [[0, 3, 40, 60]]
    assert box_area(box).tolist() == [55 * 67]
    assert scale_boxes(box, 2, 0.5).tolist() == [[-10, 1.5, 100, 35]]


@pytest.mark.parametrize("count", [0, 1, 2, 300])
@pytest.mark.parametrize("groups", [1, 5, 80])
def test_nms_in_an_exported_program_keeps_what_torchvision_keeps(
    count: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * 30], dim=1)
    scores = torch.randn(count, generator=generator)
    group = torch.randint(0, groups, (count,), generator=generator)
    expected = torchvision.ops.batched_nms(boxes, scores, group, 0.5).tolist()
    assert nms_by_group(boxes, scores, group, groups, 0.5, 300).tolist() == expected
    assert nms_by_group(boxes, scores, group, groups, 0.5, 10).tolist() == expected[:10]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = nms_by_group(boxes, scores, group, groups, 0.5, 300)
    assert found.tolist() == expected
    assert count < 300 or 20 < len(found) < 300
    assert nms_by_group(boxes, scores, group, groups, 0.5, 10).tolist() == expected[:10]


def test_an_exported_program_knows_how_many_boxes_are_kept() -> None:
    """PyTorch 2.11 multiplies the largest int64 by the number of groups otherwise: too much for ONNX."""

    class Keep(nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor, group: Tensor) -> Tensor:
            return nms_by_group(boxes, scores, group, 5, 0.5, 10)

    boxes, count = torch.rand(300, 4), torch.export.Dim("count", min=3)
    inputs = (boxes, boxes[:, 0], torch.zeros(300, dtype=torch.int64))
    program = torch.export.export(Keep(), inputs, dynamic_shapes=({0: count},) * 3, strict=False)
    kept = program.graph_module.graph.output_node().args[0][0].meta["val"].shape[0]
    assert bound_sympy(kept.node.expr, program.range_constraints).upper == 10
