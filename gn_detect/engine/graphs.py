"""CUDA graphs of the forward and backward pass, one for each set of input shapes (``SOLVER.CUDA_GRAPHS``).

A step launches more than a thousand operators, and the host needs longer for that than the GPU for the work.
A graph is launched at once. It repeats the same operators on the same memory, so it fits only inputs of the
same shapes; :mod:`gn_detect.modeling.static` makes these depend on the padded size of the images alone.
Preparation of the batch, clipping and the optimiser stay outside: some 35 operators.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..modeling import static
from ..modeling.inputs import Inputs

if TYPE_CHECKING:
    from ..config import Config
    from ..modeling import MaskRCNN

logger = logging.getLogger(__name__)

MOST_GRAPHS = (
    128  # six scales of COCO need about as many for 2 images; with 24, half of the steps would capture
)
PROVEN: frozenset[str] = frozenset()
"""PyTorch's versions, such as "2.11", in which whole runs with graphs were compared with runs without."""

Losses = dict[str, Tensor]


class Graph(Protocol):
    """The part of :class:`torch.cuda.CUDAGraph` that is used."""

    def replay(self) -> None:
        """Run the captured operators again."""


def capture(work: Callable[[], Losses], pool: Any) -> tuple[Graph, Losses]:
    """Capture ``work`` in a CUDA graph with memory of ``pool``; return it and the result of ``work``."""
    graph, present = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads, such as NCCL's, may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
    finally:
        torch.cuda.set_stream(present)  # PyTorch leaves its own if the capture cannot be ended
    return graph, result


@dataclass
class _Captured:
    graph: Graph
    inputs: dict[str, Tensor]  # the memory that the graph reads
    losses: Losses  # and that it writes


class StepGraphs:
    """Runs the forward and backward pass of a step by a CUDA graph where it has one.

    The first batch of a shape runs eagerly, which compiles kernels and lets libraries choose theirs; the
    second is captured; the least recently used graph makes room. All graphs share the memory of their inputs
    and one pool: they run one after the other, and nothing in the pool but the losses is read after a graph
    has run. Gradients lie outside of the pool, and graphs add to them.

    Args:
        limit: largest number of graphs.
        capture: captures and replays; see :func:`capture`.
    """

    def __init__(
        self, limit: int = MOST_GRAPHS, capture: Callable[..., tuple[Graph, Losses]] = capture
    ) -> None:
        self.limit, self.capture = limit, capture
        self.captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self.seen: set[Hashable] = set()
        self.memory: dict[str, Tensor] = {}  # of each input, for the largest so far
        self.pool: Any = None
        self.failure: str | None = None
        self.replays, self.runs = 0, 0

    def run(self, inputs: Inputs, compute: Callable[[Inputs], Losses]) -> Losses:
        """Return the losses of ``compute(inputs)``, which runs forward and backward.

        Gradients of parameters must exist from the second call on: a graph adds to the memory that it saw.
        """
        self.runs += 1
        tensors = inputs.tensors()
        key = tuple((name, tensor.shape, tensor.stride()) for name, tensor in tensors.items())
        found = self.captured.get(key)
        if found is None and self.failure is None and key in self.seen:
            found = self._capture(key, inputs, compute)
        elif found is not None:
            for name, tensor in tensors.items():
                found.inputs[name].copy_(tensor)
        self.seen.add(key)
        if found is None:
            return compute(inputs)
        self.captured.move_to_end(key)
        self.replays += 1
        found.graph.replay()
        return dict(zip(found.losses, torch.stack(list(found.losses.values())).unbind(), strict=True))

    def _capture(
        self, key: Hashable, inputs: Inputs, compute: Callable[[Inputs], Losses]
    ) -> _Captured | None:
        if self.pool is None and torch.cuda.is_available():
            self.pool = torch.cuda.graph_pool_handle()
        fixed = {name: self._place(name, tensor).copy_(tensor) for name, tensor in inputs.tensors().items()}
        device = inputs.images.device
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                graph, losses = self.capture(lambda: compute(inputs.with_tensors(fixed)), self.pool)
        except (RuntimeError, UserError) as error:
            # Eager steps need less memory than the pool.
            if isinstance(error, UserError) and error.code != "out-of-memory":
                raise
            self.failure = str(error).partition("\n")[0]
            self.captured.clear()
            logger.warning("a CUDA graph cannot be captured, so steps go on without: %s", self.failure)
            return None
        self.captured[key] = _Captured(graph, fixed, losses)
        if len(self.captured) > self.limit:  # after the capture: the pool ends with its last graph
            self.captured.popitem(last=False)
        return self.captured[key]

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        """Return memory like that of ``tensor``, the same for all graphs."""
        memory = self.memory.get(name)
        if memory is None or memory.numel() < tensor.numel():
            memory = self.memory[name] = tensor.new_empty(tensor.numel())
        return memory.as_strided(tensor.shape, tensor.stride())


def make_graphs(cfg: Config, model: nn.Module) -> StepGraphs | None:
    """Return the graphs for the training of a model that is on its device, or None to go without.

    Raises:
        UserError: ``SOLVER.CUDA_GRAPHS`` is True, and the model or a setting cannot be captured.
    """
    choice = cfg.solver.cuda_graphs
    if choice is False:
        return None
    reason = refusal(cfg, cast("MaskRCNN", model))
    if reason is not None:
        if choice is True:
            raise UserError(
                "cannot-capture",
                f"SOLVER.CUDA_GRAPHS True does not fit: {reason}; set SOLVER.CUDA_GRAPHS False",
            )
        return None
    version = ".".join(torch.__version__.split(".")[:2])
    return StepGraphs() if choice is True or version in PROVEN else None


def refusal(cfg: Config, model: MaskRCNN) -> str | None:
    """Return why steps of this config cannot be captured, or None."""
    if cfg.model.backbone.activation_checkpointing:
        return "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING computes blocks again in the backward pass"
    if cfg.model.compile:
        return "MODEL.COMPILE True makes graphs of its own"
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        return "SyncBN communicates inside the model"
    return static.refusal(model)
