"""Waits, copies and launches of a step on a pretended GPU, and the pretended GPU itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function
from torch.utils._pytree import tree_map_only

from benchmarks.pretended_device import (
    DEVICE,
    Event,
    Pretended,
    copies,
    launches,
    pretended_device,
    views,
    waits,
)
from benchmarks.step_trace import describe, make_batch, trace_step
from gn_detect.config import Config, load_config
from gn_detect.engine.graphs import StepGraphs
from gn_detect.engine.step import make_state, train_step
from gn_detect.modeling import build_model
from gn_detect.modeling.mask_rcnn import MaskRCNN
from gn_detect.ops import group_norm
from tests.engine.tiny import write_config

COPIES = {("modeling/inputs.py", "_copy", "pinned"): 1}
# Most launched operators of each phase.
LAUNCHES = {
    "inputs": 4,
    "backbone": 41,
    "fpn": 23,
    "rpn": 183,
    "roi_heads": 91,
    "losses": 55,
    "backward": 219,
    "optimizer": 23,
}
VIEWS = 435  # and allocations, at most
MOST_OUTSIDE_A_GRAPH = 35

MORE_IN_BFLOAT16 = 16  # launched operators: casts of activations and their gradients, and two of all weights

SIZE = (64, 96)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config(write_config(tmp_path_factory.mktemp("trace")))


@pytest.fixture(scope="module")
def events(cfg: Config) -> list[Event]:
    """A step of two images with polygons."""
    return trace_step(cfg, make_batch([3, 2], SIZE, 2))


def on_host(tree: Any) -> Any:
    return tree_map_only(Pretended, lambda x: x.host, tree)


def test_waits_of_a_step(events: list[Event]) -> None:
    assert not waits(events)


def test_copies_of_a_step(events: list[Event]) -> None:
    assert copies(events) == COPIES


def test_launches_of_a_step(events: list[Event]) -> None:
    counts = launches(events)
    assert counts.keys() == LAUNCHES.keys()
    assert {name: count for name, count in counts.items() if count > LAUNCHES[name]} == {}
    assert 0 < views(events) <= VIEWS


def test_a_step_that_is_exact_has_the_same_events(cfg: Config, events: list[Event]) -> None:
    cfg = cfg.replace({"MODEL.DEVICE": DEVICE.type, "MODEL.WEIGHTS": ""})
    with pretended_device() as trace:
        model = build_model(cfg).to(DEVICE).train()
        state = make_state(cfg, model)
        found = trace.record(partial(train_step, cfg, model, make_batch([3, 2], SIZE, 2), state))
    assert [(e.operator, e.phase, e.launches, e.waits) for e in found] == [
        (e.operator, e.phase, e.launches, e.waits) for e in events
    ]


def test_launches_in_bfloat16(cfg: Config, events: list[Event]) -> None:
    amp = {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "bfloat16"}
    found = trace_step(cfg.replace(amp), make_batch([3, 2], SIZE, 2))
    assert not waits(found)
    assert copies(found) == COPIES
    assert launches(found).total() <= launches(events).total() + MORE_IN_BFLOAT16
    products = [e for e in found if e.operator in ("aten.convolution", "aten.addmm", "aten.bmm")]
    assert products
    assert all(e.arguments[0][2] == torch.bfloat16 for e in products)


DEFORMABLE = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True],
    "MODEL.RESNETS.DEFORM_MODULATED": True,
}


def test_deformable_convolutions_wait_for_nothing(cfg: Config) -> None:
    """Also in half precision, in which they stay in float32."""
    amp = {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.DTYPE": "bfloat16"}
    found = trace_step(cfg.replace(DEFORMABLE | amp), make_batch([3, 2], SIZE, 2))
    assert not waits(found)
    assert copies(found) == COPIES
    products = [e for e in found if "deform_conv2d" in e.operator]
    forward, backward = "torchvision.deform_conv2d", "torchvision._deform_conv2d_backward"
    assert Counter(e.operator for e in products) == {forward: 3, backward: 3}
    assert all(a[2] == torch.float32 for e in products for a in e.arguments if isinstance(a, tuple))


def test_waits_with_bitmaps(cfg: Config) -> None:
    found = trace_step(cfg, make_batch([3, 2], SIZE, 2, bitmaps=True))
    assert not waits(found)
    assert copies(found) == COPIES
    shape = (16, *SIZE)  # of the bitmaps; a float32 copy of them could take a GB
    readers = {e.operator for e in found if any(a[0] == shape for a in e.arguments if isinstance(a, tuple))}
    assert readers == {"gn_detect.crop_bitmaps"}


def test_waits_of_a_detection(cfg: Config) -> None:
    """One for the numbers of detections, and one for each image, whose empty boxes are left out."""
    with pretended_device() as trace, torch.no_grad():
        model = build_model(cfg).to(DEVICE).eval()
        images = [s.image for s in make_batch([3, 2], SIZE, 2)]
        found = trace.record(lambda: model.detect(images, paste=False))
    assert waits(found) == {("modeling/static.py", "detect"): 1, ("modeling/mask_rcnn.py", "rescale"): 2}
    assert copies(found) == {**COPIES, ("modeling/static.py", "detect", "pinned"): 1}  # images; their sizes


@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
def test_images_for_detection_are_those_of_the_cpu(cfg: Config, pixels: torch.dtype) -> None:
    batch = [*make_batch([0], SIZE, 2), *make_batch([0], (40, 81), 2, seed=1)]
    images = [sample.image.to(pixels) for sample in batch]
    wanted = build_model(cfg).preprocess(images)
    with pretended_device() as trace:
        model = build_model(cfg).to(DEVICE)
        found: list[Any] = []
        events = trace.record(lambda: found.append(model.preprocess(images)))
    assert torch.equal(found[0].host, wanted)
    assert copies(events) == COPIES
    assert not waits(events)


def test_a_step_equals_that_of_the_cpu(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the order of sums differs: the CPU has its own RoIAlign and group norm."""
    batch = make_batch([3, 0], SIZE, 2)
    monkeypatch.setattr(
        MaskRCNN, "losses", lambda model, *inputs: model.static_losses(model.prepare(*inputs))
    )

    def step(device: torch.device) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        torch.manual_seed(0)
        model = build_model(cfg).to(device).train()
        state = make_state(cfg, model)
        losses, _ = train_step(cfg, model, batch, state)
        return losses, [p.grad for p in state.trained], [p.detach() for p in state.trained]

    losses, gradients, weights = step(torch.device("cpu"))
    with pretended_device():
        found = step(DEVICE)
    assert found[2][0].device == DEVICE
    torch.testing.assert_close(on_host(found[0]), losses)
    torch.testing.assert_close(on_host(found[1]), gradients, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(on_host(found[2]), weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bitmaps", [pytest.param(False, marks=pytest.mark.slow), True])
def test_forward_and_backward_are_capturable(cfg: Config, bitmaps: bool) -> None:
    """Batches of one padded shape with other objects and sizes run the same operators on the same shapes."""
    with pretended_device() as trace:
        model = build_model(cfg).to(DEVICE).train()
        regions = []
        for seed, objects in enumerate(([3, 2], [1, 0], [0, 12] if bitmaps else [50, 9], [0, 0])):
            batch = make_batch(objects, (SIZE[0] - seed, SIZE[1]), 2, bitmaps=bitmaps, seed=seed)
            targets = [s.target for s in batch if s.target is not None]
            inputs = model.prepare([s.image for s in batch], targets)
            model.zero_grad()  # a second gradient would be added to the first
            regions.append(trace.record(lambda x=inputs: sum(model.static_losses(x).values()).backward()))
    if bitmaps:  # a batch without has a graph of its own
        assert regions.pop() != regions[0]
    assert len(regions[0]) > 100
    assert all(region == regions[0] for region in regions)
    assert not waits(regions[0])
    assert not copies(regions[0])


def test_few_operators_are_launched_outside_a_graph(cfg: Config) -> None:
    cfg = cfg.replace({"MODEL.DEVICE": DEVICE.type, "MODEL.WEIGHTS": ""})
    graph = mock.Mock()
    with pretended_device() as trace:
        model = build_model(cfg).to(DEVICE).train()
        state = make_state(cfg, model)
        state.graphs = StepGraphs(capture=lambda work, pool: (graph, work()))
        batches = [
            make_batch(objects, SIZE, 2, seed=seed) for seed, objects in enumerate(([3, 2], [0, 5], [1, 1]))
        ]
        steps = [trace.record(partial(train_step, cfg, model, batch, state)) for batch in batches]
    assert state.graphs.replays == 2
    assert graph.replay.call_count == 2
    counts = launches(steps[2])
    assert counts.keys() == {"inputs", "optimizer"}
    assert 0 < counts.total() <= MOST_OUTSIDE_A_GRAPH
    assert not waits(steps[2])
    assert copies(steps[2]) == COPIES


CPU = torch.arange(4.0)
WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 1),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", torch.float64),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "mask": lambda x: x[x > 1],
    "assigned mask": lambda x: x.index_put_((x > 1,), x[:2] + 1),
    "masked_select": lambda x: x.masked_select(x > 1),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "copied to the host": lambda x: CPU.clone().copy_(x),
    "copied to the device": lambda x: x.copy_(CPU),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "index of the host": lambda x: x[[0, 2]],
}
QUIET: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda x: (x + 1).sum(),
    "index": lambda x: x[x.long()],
    "repeat_interleave": lambda x: x.repeat_interleave(x.long(), output_size=6),
    "factory": lambda x: torch.arange(3, device=x.device),
    "number of the host": lambda x: x * torch.tensor(2.0),
    "non_blocking": lambda x: CPU.to(x.device, non_blocking=True),
    "same device": lambda x: x.to(x.device),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_found(name: str) -> None:
    with pretended_device() as trace:
        x = CPU.to(DEVICE)
        found = trace.record(lambda: WAITING[name](x))
    assert waits(found) == Counter({("test_step_trace.py", "test_a_wait_is_found"): 1})


@pytest.mark.parametrize("name", QUIET)
def test_no_wait_is_found(name: str) -> None:
    with pretended_device() as trace:
        x = CPU.to(DEVICE)
        result: list[Tensor] = []
        found = trace.record(lambda: result.append(QUIET[name](x)))
    assert not waits(found)
    assert result[0].device == DEVICE
    torch.testing.assert_close(on_host(result[0]), QUIET[name](CPU))


def test_memory_of_copies() -> None:
    with pretended_device() as trace:
        pinned, empty = CPU.pin_memory(), torch.empty(3, pin_memory=True)
        assert pinned[1:].is_pinned()
        assert empty.is_pinned()
        assert not CPU.is_pinned()
        found = trace.record(lambda: [x.to(DEVICE, non_blocking=True) for x in (CPU, pinned, empty)])
    assert [event.copied_from for event in found] == ["pageable", "pinned", "pinned"]


def test_counts_and_phases() -> None:
    def region() -> None:
        with record_function("fpn"):
            (x.view(2, 2).t() * 2).add_(1)
        torch.zeros(2, device=DEVICE), torch.empty(2, device=DEVICE)

    with pretended_device() as trace:
        x = CPU.to(DEVICE)
        found = trace.record(region)
    assert launches(found) == {"fpn": 2, "inputs": 1}
    assert views(found) == 3
    assert "operators         3" in describe(found)


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [((1, 32, 4, 4), 1, 1), ((2, 32, 4, 4), 1, 1), ((1, 32, 256, 256), 2, 2)],
)
def test_fused_norm_counts_its_launches(shape: tuple[int, ...], forward: int, backward: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.rand(32), torch.rand(32)
    x, dy = torch.randn(shape), torch.randn(shape)

    def gradients(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        inputs = a, b, c = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = group_norm(a, 8, b, c, residual=x, activation="relu")
        return torch.autograd.grad(y, inputs, dy)

    expected = gradients(x, weight, bias, dy)
    with pretended_device() as trace:
        tensors = [t.to(DEVICE) for t in (x, weight, bias, dy)]
        results: list[Tensor] = []
        found = trace.record(lambda: results.extend(gradients(*tensors)))
    counts = {e.operator: e.launches for e in found if e.operator.startswith("gn_detect.")}
    assert counts == {"gn_detect.group_norm": forward, "gn_detect.group_norm_backward": backward}
    # Sums of up to 65,536 products in another order.
    torch.testing.assert_close(on_host(results), list(expected), rtol=1e-4, atol=2e-3)


def test_autocast_is_that_of_a_gpu() -> None:
    """These operators stay in half precision on a CPU."""
    with pretended_device() as trace:
        x = torch.rand(1, 1, 4, 4).bfloat16().to(DEVICE)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            found = trace.record(lambda: (F.interpolate(x, scale_factor=2.0), x.exp(), x.softmax(dim=3)))
            results = F.interpolate(x, scale_factor=2.0), x.exp(), x.sum(), x.log_softmax(1), x + 1, x @ x
    assert [r.dtype for r in results] == [torch.float32] * 4 + [torch.bfloat16] * 2
    assert sum(e.operator == "aten._to_copy" for e in found) == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.rand(2).bfloat16().exp().dtype == torch.bfloat16  # the lists are undone


def test_devices_cannot_be_mixed() -> None:
    with pretended_device():
        x = CPU.to(DEVICE)
        with pytest.raises(RuntimeError, match="same device"):
            x + CPU
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
    assert not torch.cuda.is_available()
