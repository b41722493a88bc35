"""Steps by graphs: a graph that replays recorded operators on the CPU shows stale inputs and lost memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torchvision.ops import roi_align

from gn_detect.config import Config, load_config
from gn_detect.engine import graphs
from gn_detect.engine.graphs import StepGraphs
from gn_detect.engine.step import make_state, seed_iteration, train_step
from gn_detect.errors import UserError
from gn_detect.modeling import MaskRCNN, build_model, roi_pooling
from gn_detect.structures import Sample, Target
from tests.modeling.conftest import SMALL

TINY = SMALL | {
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "SOLVER.BASE_LR": 0.01,
}


class Recorder(TorchDispatchMode):
    """Records operators; :meth:`replay` runs them again on the same memory, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, result))))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            if any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
                continue  # a view of memory that stays
            again = func(*args, **kwargs)
            for old, new in zip(tensors_of(result), tensors_of(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors_of(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found


def fake_capture(model: MaskRCNN) -> Callable[..., Any]:
    """Return a capture that undoes what the recorded run changed: a real one runs nothing."""

    def capture(work: Callable[[], Any], pool: Any) -> tuple[Recorder, Any]:
        changed = [*model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        before = [tensor.clone() for tensor in changed]
        random = torch.get_rng_state()
        with Recorder() as graph:
            result = work()
        torch.set_rng_state(random)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        return graph, result

    return capture


def pool_all_levels(
    features: list[Tensor], boxes: Tensor, image: Tensor, level: Tensor, strides: Any, *rest: Any
) -> Tensor:
    """RoIAlign of fixed shapes: the CPU's own depends on the boxes."""
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    pooled = torch.zeros(())
    for i, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        found = roi_align(feature.float(), rois, rest[0], 1 / stride, *rest[1:])
        pooled = torch.where((level == i)[:, None, None, None], found, pooled)
    return pooled.to(features[0].dtype)


def make_batch(seed: int, size: tuple[int, int], objects: tuple[int, ...]) -> list[Sample]:
    random = np.random.default_rng(seed)
    batch = []
    for n, count in enumerate(objects):
        corner = random.uniform(0, 0.5, (count, 2)) * size[0]
        boxes = np.concatenate([corner, corner + random.uniform(8, 0.5 * size[0], (count, 2))], axis=1)
        masks: list[Any] = [[np.array([a, b, c, b, c, d, a, d])] for a, b, c, d in boxes]
        labels = torch.from_numpy(random.integers(0, 3, count))
        target = Target(torch.from_numpy(boxes).float(), labels, masks)
        image = torch.from_numpy(random.integers(0, 256, (3, *size), dtype=np.uint8))
        batch.append(Sample(image, n, "", size, target))
    return batch


BATCHES = [  # two padded shapes in turn, other numbers of objects, and sizes of images inside a shape
    make_batch(0, (64, 96), (2, 3)),
    make_batch(1, (64, 96), (0, 5)),
    make_batch(2, (60, 90), (1, 1)),
    make_batch(3, (96, 64), (4, 1)),
    make_batch(4, (96, 64), (0, 0)),
    make_batch(5, (64, 90), (2, 2)),
]


def config(changes: dict[str, Any] | None = None) -> Config:
    return load_config("Base-RCNN-FPN.yaml").replace(TINY | (changes or {}))


def spoiled(batch: list[Sample]) -> list[Sample]:
    """The same batch with a pixel that is not finite, so neither are losses and gradients."""
    image = batch[0].image.float()
    image[0, 3, 3] = torch.inf
    return [replace(batch[0], image=image), *batch[1:]]


@dataclass
class Step:
    """The result of one training step, and the state after it."""

    losses: dict[str, float]
    broken: bool
    weights: dict[str, Tensor]
    momentum: list[Tensor]


def train(
    cfg: Config,
    monkeypatch: pytest.MonkeyPatch,
    graphed: StepGraphs | None,
    batches: Sequence[list[Sample]] = BATCHES,
) -> list[Step]:
    """A training by the path of accelerators."""
    monkeypatch.setattr(MaskRCNN, "losses", lambda self, *batch: self.static_losses(self.prepare(*batch)))
    monkeypatch.setattr(roi_pooling, "roi_align", pool_all_levels)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    state = make_state(cfg, model)
    state.graphs = graphed
    if graphed is not None and graphed.capture is graphs.capture:
        graphed.capture = fake_capture(model)
    steps = []
    for iteration, batch in enumerate(batches):
        seed_iteration(1, iteration, 0)
        losses, broken = train_step(cfg, model, batch, state)
        values = {name: loss.item() for name, loss in losses.items()}
        momenta = tensors_of(list(state.optimizer.state.values()))
        steps.append(Step(values, bool(broken), *deepcopy((model.state_dict(), momenta))))
    return steps


def assert_same(found: Sequence[Step], expected: Sequence[Step]) -> None:
    """To the last bit; a loss that is not finite has no bits to compare."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.broken == theirs.broken
        assert ours.broken or ours.losses == theirs.losses
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=0)
        torch.testing.assert_close(ours.momentum, theirs.momentum, rtol=0, atol=0)


@pytest.fixture(scope="module")
def plain() -> list[Step]:
    """The steps of :func:`config` without graphs."""
    with pytest.MonkeyPatch.context() as patch:
        return train(config(), patch, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"SOLVER.EMA.ENABLED": True, "SOLVER.OPTIMIZER": "AdamW", "SOLVER.BASE_LR": 0.0005}
        | {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "MODEL.CHANNELS_LAST": True},
        pytest.param({"SOLVER.ACCUMULATE": 2}, marks=pytest.mark.slow),
        pytest.param({"SOLVER.AMP.ENABLED": True}, marks=pytest.mark.slow),
        pytest.param({"MODEL.RESNETS.NORM": "BN", "MODEL.BACKBONE.FREEZE_AT": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_training_by_graphs_is_the_same(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, graphed = config(changes), StepGraphs()
    expected = train(cfg, monkeypatch, None)
    check_graphs(train(cfg, monkeypatch, graphed), expected, graphed)


def test_a_training_by_graphs_of_the_default_keys_is_the_same(
    plain: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphed = StepGraphs()
    check_graphs(train(config(), monkeypatch, graphed), plain, graphed)


def check_graphs(found: list[Step], expected: list[Step], graphed: StepGraphs) -> None:
    assert graphed.replays > 2
    assert len(graphed.captured) == 2
    assert not any(step.broken for step in found)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (1, {}),  # the step that is captured
        (2, {"MODEL.RESNETS.NORM": "BN", "SOLVER.OPTIMIZER": "AdamW", "SOLVER.BASE_LR": 0.0005}),
    ],
)
def test_a_step_that_is_not_finite_is_skipped(
    place: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, running statistics and momentum stay, and the next step does not see its gradients."""
    cfg, graphed = config({"SOLVER.NON_FINITE": "skip", **changes}), StepGraphs()
    batches = [BATCHES[i] for i in (0, 1, 2, 5)]
    batches[place] = spoiled(batches[place])
    expected = train(cfg, monkeypatch, None, batches)
    found = train(cfg, monkeypatch, graphed, batches)
    assert graphed.replays == 3
    assert_same(found, expected)
    assert [step.broken for step in found] == [i == place for i in range(4)]
    before, skipped, after = found[place - 1 : place + 2]
    assert not all(math.isfinite(loss) for loss in skipped.losses.values())
    torch.testing.assert_close(skipped.weights, before.weights, rtol=0, atol=0)
    torch.testing.assert_close(skipped.momentum, before.momentum, rtol=0, atol=0)
    assert all(value.isfinite().all() for value in after.weights.values())
    name = "backbone.fpn_output2.weight"
    assert not torch.equal(after.weights[name], skipped.weights[name])


def test_the_least_recently_used_graph_goes_first(plain: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = StepGraphs(limit=1)
    assert_same(train(config(), monkeypatch, graphed), plain)
    assert len(graphed.captured) == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the stream is capturing\nand more"),
        UserError("out-of-memory", "the stream is capturing"),  # eager steps need less
    ],
)
def test_a_capture_that_fails_is_reported_and_steps_go_on(
    error: Exception, plain: list[Step], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(work: Any, pool: Any) -> Any:
        raise error

    graphed = StepGraphs(capture=fail)
    with caplog.at_level(logging.WARNING):
        assert_same(train(config(), monkeypatch, graphed), plain)
    assert [r.message for r in caplog.records] == [
        "a CUDA graph cannot be captured, so steps go on without: the stream is capturing"
    ]


class Stale(StepGraphs):
    """Forgets to bring new inputs."""

    def _capture(self, *inputs: Any) -> Any:
        captured = super()._capture(*inputs)
        captured.inputs = {name: tensor.clone() for name, tensor in captured.inputs.items()}
        return captured


def test_the_fake_graph_shows_stale_inputs(plain: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    found = train(config(), monkeypatch, Stale())
    assert [step.losses for step in found] != [step.losses for step in plain]


@pytest.mark.parametrize(
    "changes", [{}, {"MODEL.BACKBONE.ACTIVATION_CHECKPOINTING": True}, {"MODEL.COMPILE": True}]
)
def test_what_cannot_be_captured_is_refused_by_name(changes: dict[str, Any]) -> None:
    cfg = config(changes | {"SOLVER.CUDA_GRAPHS": True})
    with pytest.raises(UserError, match="SOLVER.CUDA_GRAPHS True does not fit: MODEL"):
        make_state(cfg, build_model(cfg))
    cfg = cfg.replace({"SOLVER.CUDA_GRAPHS": "auto"})
    assert make_state(cfg, build_model(cfg)).graphs is None
