"""Times of each norm of Mask R-CNN R-50-FPN: ours, PyTorch's, frozen BN and a plain copy.

Whole training steps with frozen BN, PyTorch's GN and the fused GN follow, each in its own process.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..ops import group_norm
from ..ops.group_norm_triton.plan import make_plan
from .cases import LAYERS, Layer

GROUPS = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ORDERS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
FLOAT32_WEIGHTS = {"ours", "autocast native"}  # implementations that take them with any x
LARGE_BYTES = 16e6  # a larger tensor's time on a GPU goes to bytes, a smaller one's to launches


@dataclass(frozen=True)
class Timing:
    """Medians for one layer, dtype, memory order and direction.

    Attributes:
        layer, dtype, order: keys of :data:`LAYERS`, :data:`DTYPES` and :data:`ORDERS`.
        images: number of images in the batch.
        backward: forward and backward instead of forward only.
        megabytes: size of x.
        seconds: implementation -> device time; ``"copy"`` is one read and one write of x.
        host: implementation -> seconds until a call returns; empty without a GPU.
        passes: fewest reads and writes of tensors of x's size.
    """

    layer: str
    dtype: str
    order: str
    images: int
    backward: bool
    megabytes: float
    seconds: dict[str, float]
    host: dict[str, float]
    passes: int

    @property
    def bandwidth(self) -> float:
        """Return our fraction of the copy's bandwidth, by the fewest bytes possible."""
        return self.passes / 2 * self.seconds["copy"] / self.seconds["ours"]

    def ratio(self, other: str) -> float:
        """Return the time of ``other`` over ours."""
        return self.seconds[other] / self.seconds["ours"]


def fewest_passes(layer: Layer, itemsize: int, channels_last: bool, backward: bool) -> int:
    """Return the reads and writes of tensors of x's size; a group that stays on the chip is read once."""
    n, c, h, w = layer.shape
    plan = make_plan("forward", n, c, h * w, GROUPS, itemsize, channels_last)
    again = 0 if plan.one_launch else 1
    passes = 2 + layer.residual + again
    if backward:
        # dy, x and dx; with a residual and ReLU also y and the residual's gradient; dy and x again.
        passes += 3 + 2 * (layer.residual and layer.relu) + 2 * again
    return passes


def implementations(layer: Layer, x: Tensor, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """Return functions of (x, residual, weight, bias) that include the layer's ReLU."""
    channels = (1, -1, 1, 1)

    def ours(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        relu = "relu" if layer.relu else None
        return group_norm(x, GROUPS, weight, bias, residual=residual, activation=relu)

    def follow(y: Tensor, residual: Tensor | None) -> Tensor:
        y = y if residual is None else y + residual
        return F.relu(y) if layer.relu else y

    def native(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        return follow(F.group_norm(x, GROUPS, weight, bias), residual)

    def autocast(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=x.dtype):  # which runs group_norm in float32
            return native(x, residual, weight, bias).to(x.dtype)

    def frozen(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        return follow(x * weight.detach().view(channels) + bias.detach().view(channels), residual)

    functions: dict[str, Callable[..., Tensor]] = {"ours": ours, "native": native, "frozen BN": frozen}
    if x.dtype != torch.float32:
        functions["autocast native"] = autocast
    if compiled:
        functions["compiled native"] = torch.compile(native, dynamic=False)
    return functions


def benchmark_norms(
    device: torch.device,
    images: int = 1,
    layers: Iterable[str] = LAYERS,
    dtypes: Iterable[str] = DTYPES,
    orders: Iterable[str] = ORDERS,
    compiled: bool = True,
    rounds: int = 5,
) -> Iterator[Timing]:
    """Time every combination, each implementation in turn, ``rounds`` times."""
    for name, dtype, order in itertools.product(layers, dtypes, orders):
        torch._dynamo.reset()
        yield from _benchmark_layer(name, device, images, dtype, order, compiled, rounds)


def _benchmark_layer(
    name: str, device: torch.device, images: int, dtype: str, order: str, compiled: bool, rounds: int
) -> Iterator[Timing]:
    layer = LAYERS[name].of_images(images)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    x, residual, dy = (normal(*layer.shape).to(DTYPES[dtype], memory_format=ORDERS[order]) for _ in range(3))
    tensors = [x, residual if layer.residual else None]
    parameters = [normal(layer.shape[1]) for _ in range(2)]
    inputs = {"float32": [*tensors, *parameters]}  # as in training
    inputs["own"] = [*tensors, *(p.to(x.dtype) for p in parameters)]  # PyTorch's own takes only x's dtype
    functions = implementations(layer, x, compiled)
    copy = torch.empty_like(x)
    for backward in (False, True):
        for tensor in itertools.chain(*inputs.values()):
            if tensor is not None:
                tensor.requires_grad_(backward)
        calls: dict[str, Callable[[], Any]] = {"copy": lambda: copy.copy_(x.detach())}
        for key, function in functions.items():
            dtypes = "float32" if key in FLOAT32_WEIGHTS else "own"
            calls[key] = _call(function, inputs[dtypes], dy if backward else None)
        seconds = _measure(calls, device, rounds)
        host = _host_seconds(calls, device)
        passes = fewest_passes(layer, x.element_size(), order == "channels_last", backward)
        megabytes = prod(layer.shape) * x.element_size() / 1e6
        yield Timing(name, dtype, order, images, backward, megabytes, seconds, host, passes)


def _call(
    function: Callable[..., Tensor], inputs: list[Tensor | None], dy: Tensor | None
) -> Callable[[], Any]:
    """Return a call of the function, with its backward if there is a ``dy``."""
    if dy is None:
        return lambda: function(*inputs)
    leaves = [tensor for tensor in inputs if tensor is not None]
    return lambda: torch.autograd.grad(function(*inputs), leaves, dy, allow_unused=True)


def _measure(calls: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Return the median seconds of each call; on a GPU those of the device."""
    if device.type == "cuda":
        return {key: _device_seconds(call) for key, call in calls.items()}
    spent: dict[str, list[float]] = {key: [] for key in calls}
    order = list(calls.items())
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for key, call in order:
            call()  # not timed: it allocates memory, which the next call finds
            begin = time.perf_counter()
            call()
            spent[key].append(time.perf_counter() - begin)
    return {key: statistics.median(times) for key, times in spent.items()}


def _device_seconds(call: Callable[[], Any]) -> float:
    """Return the median time of the call as a CUDA graph, without the host, with a cold L2 cache."""
    from triton.testing import do_bench

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return float(do_bench(graph.replay, warmup=5, rep=25, return_mode="median")) / 1e3


def _host_seconds(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int = 50
) -> dict[str, float]:
    """Return the seconds until a call returns, while the device still works."""
    if device.type != "cuda":
        return {}
    spent = {}
    for key, call in calls.items():
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        spent[key] = (time.perf_counter() - begin) / repeats
    torch.cuda.synchronize(device)
    return spent


def _geometric_mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.geometric_mean(found) if found else float("nan")


def row(timing: Timing) -> str:
    """Return a line of the table, under :func:`header`."""
    names = ("native", "autocast native", "compiled native", "frozen BN")
    others = "".join(f"{timing.ratio(k):10.2f}" if k in timing.seconds else f"{'-':>10}" for k in names)
    direction = "fwd+bwd" if timing.backward else "fwd"
    host = "".join(
        f"{timing.host[k] * 1e6:10.0f}" if timing.host else f"{'-':>10}" for k in ("ours", "native")
    )
    return (
        f"{timing.layer:<18} {timing.dtype:<8} {timing.order:<14} {direction:<7}"
        f"{timing.megabytes:7.1f}{timing.seconds['ours'] * 1e3:10.3f}{timing.bandwidth:8.0%}{others}{host}"
    )


def header() -> str:
    """Return the table's first line; the ratios are others' time over ours."""
    columns = f"{'layer':<18} {'dtype':<8} {'order':<14} {'':<7}{'MB':>7}{'ours, ms':>10}{'copy':>8}"
    others = "".join(f"{name:>10}" for name in ("native", "autocast", "compiled", "frozenBN"))
    return f"{columns}{others}{'host, us':>10}{'native':>10}"


def summary(timings: list[Timing]) -> str:
    """Return geometric means over the layers, and the worst ratio to native."""
    lines = []
    for backward, dtype, order in itertools.product((False, True), DTYPES, ORDERS):
        some = [t for t in timings if (t.backward, t.dtype, t.order) == (backward, dtype, order)]
        if not some:
            continue
        worst = min(some, key=lambda t: t.ratio("native"))
        large = _geometric_mean(t.bandwidth for t in some if t.megabytes * 1e6 > LARGE_BYTES)
        small = _geometric_mean(t.bandwidth for t in some if t.megabytes * 1e6 <= LARGE_BYTES)
        means = {
            k: _geometric_mean(t.ratio(k) for t in some) for k in some[0].seconds if k not in ("ours", "copy")
        }
        ratios = ", ".join(f"{k} {v:.2f}" for k, v in means.items())
        lines.append(
            f"{'fwd+bwd' if backward else 'fwd':<7} {dtype:<8} {order:<14} of copy: {large:.0%} over 16 MB, "
            f"{small:.0%} below; time over ours: {ratios}; "
            f"least against native {worst.ratio('native'):.2f} ({worst.layer})"
        )
    return "\n".join(lines)


def as_json(timings: list[Timing]) -> list[dict[str, Any]]:
    """Return the figures as plain data."""
    return [asdict(t) | {"bandwidth": t.bandwidth} for t in timings]


# Config overrides and environment of each variant; box and mask heads are the same.
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "fused GN": ([], {}),
    "native GN": ([], {"GN_DETECT_FUSED": "0"}),
    "frozen BN": (["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""], {}),
}


@dataclass
class Step:
    """Figures of a variant in each round: median seconds of a step, and peak memory above the start, MB."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        times = " ".join(f"{s:.4f}" for s in self.seconds)
        memory = " ".join(f"{m:.0f}" for m in self.megabytes)
        seconds, megabytes = statistics.median(self.seconds), statistics.median(self.megabytes)
        return f"{seconds:8.4f} s ({times}), {megabytes:6.0f} MB ({memory})"


def compare_steps(config: str, arguments: Sequence[str], rounds: int) -> Iterator[dict[str, Step]]:
    """Run ``bench train`` on every variant ``rounds`` times.

    Args:
        config: config file of the model with GN.
        arguments: further flags, then config overrides.
        rounds: number of runs of each variant.

    Yields:
        The same mapping after each run, with the variants that have figures.

    Raises:
        UserError: a run failed; its error is part of the text.
    """
    steps: dict[str, Step] = {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        for _ in range(rounds):
            for name, (keys, environment) in VARIANTS.items():
                command = [sys.executable, "-m", "gn_detect", "bench", "train", "--config-file", config]
                command += ["--output", str(report), *arguments, *keys]
                done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(
                        "process-failed", f"the training step with {name} failed:\n{done.stderr.strip()}"
                    )
                figures = json.loads(report.read_text())
                step = steps.setdefault(name, Step())
                step.seconds.append(statistics.median(figures["seconds"]))
                step.megabytes.append(figures["memory"] / 1e6)
                yield steps
