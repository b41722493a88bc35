"""The launches of a norm, and the bytes that they move, counted on tensors without memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs Triton, which PyTorch brings along on Linux")

from gn_detect.bench.norms import LAYERS, Layer, fewest_passes
from gn_detect.ops.group_norm_triton import launch
from gn_detect.ops.group_norm_triton.binding import Launch

CASES = list(itertools.product((1, 2, 4, 8), (torch.bfloat16, torch.float32), (False, True)))


class Called(TorchDispatchMode):
    """Names of PyTorch's operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that each launch reads and writes; it writes partial results and may read them again."""
    found: list[int] = []

    def note(_: Launch, kernel: Any, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> None:
        named = dict(zip(kernel.arg_names, tensors, strict=False))
        twice = named.get("partials")
        tensors = (*(t for name, t in named.items() if name != "tickets"), twice)
        found.append(sum(t.nbytes for t in tensors if t is not None))

    monkeypatch.setattr(Launch, "__call__", note)
    return found


def run(layer: Layer, dtype: torch.dtype, channels_last: bool) -> None:
    """A norm, forward and backward."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(layer.shape, dtype=dtype, device="meta", memory_format=order)
    weight = torch.empty(layer.shape[1], device="meta")
    extra = x if layer.residual else None
    y, statistics = launch.forward(x, 32, weight, weight, 1e-5, extra, layer.relu, channels_last)
    hidden = layer.residual and layer.relu
    needs = (True, hidden, True)
    saved = y if hidden else None
    launch.backward(x, x, saved, weight, weight, statistics, layer.relu, channels_last, needs)


@pytest.mark.parametrize("name", LAYERS)
def test_no_launch_but_the_kernels(name: str, moved: list[int]) -> None:
    """One or two in each direction; nothing fills memory or sums partial gradients."""
    run(LAYERS[name], torch.bfloat16, False)  # the first norm of a stream makes its tickets
    for images, dtype, channels_last in CASES:
        moved.clear()
        with Called() as called:
            run(LAYERS[name].of_images(images), dtype, channels_last)
        assert 2 <= len(moved) <= 4
        assert called.names <= {"empty", "empty_like", "new_empty", "select"}


@pytest.mark.parametrize("name", LAYERS)
def test_bytes_are_those_of_the_passes(name: str, moved: list[int]) -> None:
    """Partial results add less than a twentieth to the reads and writes of tensors of x's size."""
    for images, dtype, channels_last in CASES:
        moved.clear()
        layer = LAYERS[name].of_images(images)
        run(layer, dtype, channels_last)
        x = dtype.itemsize * torch.Size(layer.shape).numel()
        passes = fewest_passes(layer, dtype.itemsize, channels_last, backward=True)
        assert sum(moved) <= 1.05 * passes * x, (images, dtype, channels_last)
