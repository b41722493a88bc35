"""The Triton kernels against float64: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which PyTorch brings along on Linux")

from gn_detect.ops.group_norm_triton import launch, plan
from gn_detect.ops.group_norm_triton.tickets import tickets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1.1e-3, torch.bfloat16: 9e-3}
"""Relative to the largest value: a few roundings of the result, and of the sums in float32."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FOLLOWS = [(False, False), (False, True), (True, True), (True, False)]
"""With a residual, with a ReLU."""

SHAPES = [
    ((2, 8, 6, 7), 4),  # 2 channels in a group
    ((2, 12, 7, 7), 4),  # 3, padded to 4
    ((1, 24, 5, 9), 3),  # 3 groups, which do not fill a tile
    ((1, 40, 4, 6), 1),  # one group, in pieces of its channels
    ((1, 6, 9, 11), 6),  # a channel in a group
    ((5, 4, 9, 8), 2),  # more samples than programs of the gradients
    ((1, 32, 16, 12), 2),  # 16-byte accesses
    ((2, 16, 1, 1), 4),
    ((2, 12, 33), 4),
    ((3, 32), 4),
    ((1, 8, 3, 4, 5), 2),  # video
]


TILES = ["as planned", "small tiles", "split"]


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Small tensors go through every kernel: in one launch with a tile or with loops, and split."""
    monkeypatch.setattr(plan, "GRADIENT_PROGRAMS", 4)  # which run over several samples each
    if request.param != "as planned":
        monkeypatch.setattr(plan, "GROUP_TILE", {"forward": 256, "backward": 128})
        monkeypatch.setattr(plan, "SPLIT_TILE", {"forward": 256, "backward": 256})
        monkeypatch.setattr(plan, "SPLIT_BYTES", 1024)
        monkeypatch.setattr(plan, "LINE", 32)
        monkeypatch.setattr(plan, "PIECE", 8)
        monkeypatch.setattr(plan, "MOST_PARTS", 2)
    if request.param == "split":
        monkeypatch.setattr(plan, "ONE_LAUNCH_BYTES", 0)
    forget_plans()
    torch.use_deterministic_algorithms(True)  # new memory holds NaN: what no kernel writes is seen
    yield request.param
    torch.use_deterministic_algorithms(False)
    forget_plans()


def forget_plans() -> None:
    plan.make_plan.cache_clear()
    launch._recipe.cache_clear()


def in_order(x: Tensor, channels_last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def run(
    x: Tensor,
    groups: int,
    *,
    residual: bool,
    relu: bool,
    channels_last: bool,
    affine: bool = True,
    eps: float = 1e-5,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients by the kernels, and by PyTorch in float64 on the CPU."""
    generator = torch.Generator().manual_seed(1)
    x = in_order(x.to(DEVICE), channels_last)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    extra = in_order(random(*x.shape).to(DEVICE, x.dtype), channels_last) if residual else None
    parameters = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (random(x.shape[1]).to(DEVICE, parameters) if affine else None for _ in range(2))
    dy = in_order(random(*x.shape).to(DEVICE, x.dtype), channels_last)
    y, statistics = launch.forward(x, groups, weight, bias, eps, extra, relu, channels_last)
    saved = y if residual and relu else None
    needs = (True, residual and relu, affine)
    dx, d_residual, d_affine = launch.backward(
        dy, x, saved, weight, bias, statistics, relu, channels_last, needs
    )
    assert y.stride() == x.stride() == dx.stride()
    assert y.dtype == dx.dtype == x.dtype
    ours = {"y": y, "dx": dx, "d_residual": d_residual, "d_affine": d_affine, "statistics": statistics}

    leaves = {"dx": x, "d_residual": extra, "weight": weight, "bias": bias}
    leaves = {k: v.detach().double().cpu().requires_grad_() for k, v in leaves.items() if v is not None}
    z = F.group_norm(leaves["dx"], groups, leaves.get("weight"), leaves.get("bias"), eps)
    z = z + leaves["d_residual"] if residual else z
    expected: dict[str, Tensor] = {"y": z.relu() if relu else z}
    # With a residual the rounded output decides where the ReLU passed, as in PyTorch.
    passed = (y.cpu() > 0 if residual else z > 0) if relu else torch.ones_like(z, dtype=torch.bool)
    found = torch.autograd.grad(z, list(leaves.values()), dy.double().cpu() * passed)
    gradients = dict(zip(leaves, found, strict=True))
    expected["dx"] = gradients["dx"]
    if d_residual is not None:
        expected["d_residual"] = gradients["d_residual"]
    if affine:
        expected["d_affine"] = torch.stack([gradients["weight"], gradients["bias"]])
    rows = leaves["dx"].detach().reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(rows, 2, correction=0)
    expected["statistics"] = torch.stack([mean, (variance + eps).rsqrt()])
    return {k: v for k, v in ours.items() if v is not None}, expected


def check(ours: dict[str, Tensor], expected: dict[str, Tensor], note: Any, factor: float = 1.0) -> None:
    assert ours.keys() == expected.keys(), note
    for name, value in expected.items():
        mine = ours[name].double().cpu()
        assert torch.isfinite(mine).all(), (note, name)
        error = (mine - value.detach()).abs().max() / value.abs().max().clamp(min=1)
        dtype = ours[name].dtype
        assert error <= factor * TOLERANCE[dtype], (note, name, float(error))


@pytest.mark.parametrize(
    ("shape", "groups", "channels_last", "tiles"),
    [  # every shape in both orders, every second one with each choice of tiles
        pytest.param(*case, order, name, marks=[] if (i + j + k) % 2 else pytest.mark.slow)
        for (i, case), (j, order), (k, name) in itertools.product(
            enumerate(SHAPES), enumerate((False, True)), enumerate(TILES)
        )
    ],
    indirect=["tiles"],
)
def test_results_and_gradients(shape: tuple[int, ...], groups: int, channels_last: bool, tiles: str) -> None:
    if channels_last and len(shape) == 2:
        pytest.skip("without pixels there is one order")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 2 + 0.5
    # The interpreter takes 10 ms a program: there a case has one of what follows, and one dtype.
    first = SHAPES.index((shape, groups)) + channels_last + TILES.index(tiles)
    chosen = range(4) if DEVICE == "cuda" else [first % 4]
    for i in chosen:
        residual, relu = FOLLOWS[i]
        dtypes = DTYPES if DEVICE == "cuda" else [DTYPES[(i + shape[1] + channels_last) % 4]]
        for dtype in dtypes:
            found = run(x.to(dtype), groups, residual=residual, relu=relu, channels_last=channels_last)
            # A group of few elements has a large rstd, which magnifies the roundings of x - mean.
            check(*found, (dtype, residual, relu), factor=1 if x[0].numel() // groups > 16 else 10)


@pytest.mark.parametrize("channels_last", [False, True])
def test_without_affine_parameters(channels_last: bool, tiles: str) -> None:
    x = torch.randn(2, 12, 6, 7, generator=torch.Generator().manual_seed(0))
    check(*run(x, 4, residual=False, relu=True, channels_last=channels_last, affine=False), tiles)


@pytest.mark.parametrize("channels_last", [False, True])
def test_large_means_cost_no_more_than_their_rounding(channels_last: bool, tiles: str) -> None:
    """X = 1e4 + noise: float32 holds the mean to 5e-4, and no step may lose more than that."""
    x = torch.randn(1, 4, 24, 25, generator=torch.Generator().manual_seed(0)) + 1e4
    ours, expected = run(x, 2, residual=True, relu=False, channels_last=channels_last)
    torch.testing.assert_close(
        ours["statistics"][0].cpu(), expected["statistics"][0].float(), rtol=1e-7, atol=0
    )
    torch.testing.assert_close(
        ours["statistics"][1].cpu(), expected["statistics"][1].float(), rtol=3e-5, atol=0
    )
    assert (ours["y"].cpu() - expected["y"]).abs().max() < 3e-3


def test_a_first_tile_unlike_the_rest(tiles: str) -> None:
    """The loop subtracts its first tile's mean, here far from the others'."""
    x = torch.randn(1, 2, 40, 40, generator=torch.Generator().manual_seed(0))
    x[:, :, :4] -= 1e5
    ours, expected = run(x, 1, residual=False, relu=False, channels_last=False)
    torch.testing.assert_close(ours["statistics"].cpu(), expected["statistics"].float(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_constant_groups(channels_last: bool, tiles: str) -> None:
    x = torch.full((2, 8, 6, 6), 3.7)
    ours, expected = run(x, 4, residual=False, relu=False, channels_last=channels_last)
    torch.testing.assert_close(ours["statistics"].cpu(), expected["statistics"].float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours["y"].double().cpu(), expected["y"].detach(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_that_are_not_finite_stay_in_their_group(
    value: float, channels_last: bool, tiles: str
) -> None:
    x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))
    x[1, 2, 3, 4] = value
    ours, expected = run(x, 4, residual=False, relu=True, channels_last=channels_last)
    for name in ("y", "dx"):
        mine = ours[name].cpu()
        assert torch.equal(mine.isnan(), expected[name].isnan() if name == "y" else mine.isnan())
        assert mine[1, 2:4].isnan().all()
        mine[1, 2:4] = 0
        assert mine.isfinite().all()
        torch.testing.assert_close(mine[0].double(), expected[name][0].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
def test_the_relu_passes_gradients_at_nan(residual: bool, tiles: str) -> None:
    """PyTorch's ReLU stops the gradient where the output is at most 0; NaN is not."""
    x = torch.randn(1, 4, 6, 5)
    x[0, 0, 0, 0] = float("nan")
    y = torch.full_like(x, float("nan")) if residual else None
    statistics = torch.stack([torch.full((1, 2), float("nan")), torch.ones(1, 2)])
    arguments = (torch.ones_like(x), x, y, None, None, statistics)
    arguments = tuple(None if a is None else a.to(DEVICE) for a in arguments)
    d_bias = launch.backward(*arguments, True, False, (True, residual, True))[2]  # type: ignore[arg-type]
    assert torch.equal(d_bias[1].cpu(), torch.full((4,), 30.0))  # type: ignore[index]


def test_gradients_that_nobody_needs_are_not_computed(tiles: str) -> None:
    x = torch.randn(2, 8, 6, 5, device=DEVICE)
    y, statistics = launch.forward(x, 4, None, None, 1e-5, x, True, False)
    arguments = (x, x, y, None, None, statistics, True, False)
    everything = launch.backward(*arguments, (True, True, True))
    for needs in [(True, False, False), (False, True, False), (False, False, True)]:
        found = launch.backward(*arguments, needs)
        for wanted, one, whole in zip(needs, found, everything, strict=True):
            assert torch.equal(one, whole) if wanted else one is None or not needs[1]  # type: ignore[arg-type]
        assert found[0] is None or needs[0]
        assert found[2] is None or needs[2]


def test_the_same_bits_every_time(tiles: str) -> None:
    x = torch.randn(3, 8, 9, 9, generator=torch.Generator().manual_seed(0))
    runs = [run(x, 4, residual=True, relu=True, channels_last=True)[0] for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("channels_last", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_order_in_which_programs_finish_changes_nothing(
    channels_last: bool, tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program to finish merges the partial results, whichever it is, and leaves its ticket at 0."""
    if DEVICE == "cuda":
        pytest.skip("the order is the GPU's")
    from triton.runtime.interpreter import interpreter_builder

    x = torch.randn(2, 24, 5, 7, generator=torch.Generator().manual_seed(0))
    arguments = {"residual": True, "relu": True, "channels_last": channels_last}
    forwards = run(x, 2, **arguments)[0]
    set_index = interpreter_builder.set_grid_idx

    def from_the_end(i: int, j: int, k: int) -> None:
        set_index(interpreter_builder.grid_dim[0] - 1 - i, j, k)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", from_the_end)
    backwards = run(x, 2, **arguments)[0]
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)
    assert not tickets(1, x.device).any()


def test_more_tickets_than_a_stream_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("gn_detect.ops.group_norm_triton.tickets")
    many = tickets(module.SHARED + 1, torch.device("cpu"))
    assert len(many) > module.SHARED
    assert not many.any()


class Stream:
    """A GPU's current stream, and whether a graph captures it."""

    number, captured = 1, False


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """The tickets' module on a device that looks like a GPU."""
    module = importlib.import_module("gn_detect.ops.group_norm_triton.tickets")
    stream = Stream()
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: stream.number))
    monkeypatch.setattr(module, "driver", driver)
    monkeypatch.setattr(module, "RESERVE", 3 * module.SHARED)
    monkeypatch.setattr(module, "_zeros", lambda count, device: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stream.captured)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(synchronize=list))
    caches = (module._reserves, module._of_stream)
    for cache in caches:
        cache.cache_clear()
    yield stream
    for cache in caches:
        cache.cache_clear()


def test_streams_and_captured_launches_share_no_tickets(stream: Stream) -> None:
    """Launches of one stream do. A graph's have theirs for ever: it may be replayed on any stream."""
    gpu = torch.device("cuda", 0)
    stream.captured = True
    before = tickets(40, gpu)  # nothing is ready: the graph fills its own
    stream.captured = False
    first, again = tickets(40, gpu), tickets(64, gpu)
    stream.number = 2
    other = tickets(40, gpu)
    stream.captured = True
    graphs = [tickets(count, gpu) for count in (40, 40, 64)]
    assert first.data_ptr() == again.data_ptr()
    begins = sorted(t.data_ptr() for t in (first, other, *graphs))
    assert all(b - a >= 4 * 40 for a, b in itertools.pairwise(begins))
    assert all(begin % 16 == begins[0] % 16 for begin in begins)
    assert all(len(t) >= 40 and not t.any() for t in (before, first, other, *graphs))
    while tickets(2**12, gpu).untyped_storage().data_ptr() == first.untyped_storage().data_ptr():
        pass  # until the reserve is used up
    assert len(tickets(40, gpu)) >= 40
