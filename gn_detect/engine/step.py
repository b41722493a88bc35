"""One training step: from a batch to an update of the weights, without waiting for the device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.profiler import record_function

from ..config.schema import RESNET_BACKBONES
from ..distributed.group import average_gradients, is_distributed
from ..errors import UserError
from ..modeling.mask_rcnn import MaskRCNN
from ..structures import Sample, Target
from ..weights import Checkpoint, CheckpointMetadata, load_weights
from .graphs import StepGraphs, make_graphs
from .optimizer import build_optimizer, clip_gradients, restore_optimizer, step_unless

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """Everything that a step changes. :func:`make_state` builds it."""

    model: nn.Module  # the plain model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss; enabled only in float16 on a GPU
    average: AveragedModel | None  # SOLVER.EMA
    # Scalar on the device. With SOLVER.NON_FINITE stop it becomes 1 at the first loss or gradient that is not
    # finite, and no later step changes the weights.
    broken: Tensor
    graphs: StepGraphs | None = None  # SOLVER.CUDA_GRAPHS
    trained: list[nn.Parameter] = field(init=False)
    statistics: list[Tensor] = field(init=False)  # of BatchNorm, which a forward pass changes

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate and save: the average, if there is one."""
        return self.model if self.average is None else self.average.module

    def metadata(self) -> dict[str, Any]:
        """Return the fields of :class:`CheckpointMetadata` that :meth:`restore` reads."""
        saved: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.scaler.is_enabled():
            saved["scaler"] = self.scaler.state_dict()
        if self.average is not None:
            saved["trained"] = {name: value.cpu() for name, value in self.model.state_dict().items()}
            saved["averaged_steps"] = int(self.average.n_averaged)
        return saved

    def restore(self, metadata: CheckpointMetadata, origin: str) -> None:
        """Undo :meth:`metadata`; the model already holds the checkpoint's weights.

        Raises:
            UserError: the optimiser's state, or the trained weights, belong to other parameters.
        """
        restore_optimizer(self.optimizer, metadata.optimizer or {}, origin)
        if self.scaler.is_enabled() and metadata.scaler is not None:
            if metadata.scaler.keys() != self.scaler.state_dict().keys():
                raise UserError(
                    "other-run", f"{origin}: its 'scaler' is not that of a GradScaler; resume from another"
                )
            self.scaler.load_state_dict(metadata.scaler)
        if self.average is not None:
            self.average.module.load_state_dict(self.model.state_dict())
            self.average.n_averaged.fill_(metadata.averaged_steps or 0)
        if metadata.trained is not None:
            load_weights(self.model, Checkpoint(metadata.trained, path=Path(origin)))


def make_state(cfg: Config, model: nn.Module) -> TrainingState:
    """Build optimiser, scaler and average for a model that is on its device."""
    device = next(model.parameters()).device
    amp, dtype = cfg.solver.amp, mixed_dtype(cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp.enabled and dtype == torch.float16)
    if amp.enabled and dtype != getattr(torch, amp.dtype):
        logger.warning(
            "SOLVER.AMP.DTYPE is %s, in which a step takes minutes on a CPU, so bfloat16 is used; "
            "set SOLVER.AMP.DTYPE bfloat16, or SOLVER.AMP.ENABLED False for float32",
            amp.dtype,
        )
    average = _moving_average(model, cfg.solver.ema.decay) if cfg.solver.ema.enabled else None
    broken = torch.zeros((), device=device)
    optimizer = build_optimizer(cfg, model)
    return TrainingState(model, optimizer, scaler, average, broken, make_graphs(cfg, model))


def _moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of the weights that soon forgets the initial ones.

    Update n multiplies it by ``min(decay, (1 + n) / (10 + n))``, as TensorFlow's
    ``ExponentialMovingAverage`` does with ``num_updates``. With a constant decay, the average of a run much
    shorter than ``1 / (1 - decay)`` would remain near the initial weights.
    """
    average = AveragedModel(model)
    average.requires_grad_(False)

    def update(
        averaged: tuple[Tensor, ...] | list[Tensor],
        current: tuple[Tensor, ...] | list[Tensor],
        _: Tensor | int,
    ) -> None:
        count = int(average.n_averaged)  # on the CPU, so that nothing waits for the device
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))

    average.multi_avg_fn = update
    return average


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Seed the model's random numbers by the iteration.

    An evaluation or an interruption between two iterations cannot change them, and checkpoints need no random
    state.
    """
    torch.manual_seed((seed * 1_000_003 + iteration) * 4093 + rank)


def train_step(
    cfg: Config, model: nn.Module, batch: Sequence[Sample], state: TrainingState
) -> tuple[dict[str, Tensor], Tensor]:
    """Update the weights and running statistics once, or not at all if a loss or gradient is not finite.

    Args:
        cfg: whole config.
        model: ``state.model``, or its wrapper.
        batch: of this process; it goes through the model in ``SOLVER.ACCUMULATE`` parts.
        state: is changed.

    Returns:
        The losses, and 1 if something is not finite (0 if everything is), still on the device. float16
        gradients that are too large do not count: the scaler lowers their scale, and the step is skipped.
    """
    # A graph adds to the gradients' memory, so that stays.
    state.optimizer.zero_grad(set_to_none=state.graphs is None)
    statistics = [value.clone() for value in state.statistics]
    parts = split(batch, cfg.solver.accumulate)
    plain = cast(MaskRCNN, state.model)
    collected = []
    for part in parts:
        images = [sample.image for sample in part]
        targets = [cast(Target, sample.target) for sample in part]
        if state.graphs is not None:
            inputs = plain.prepare(images, targets)
            found = state.graphs.run(inputs, partial(forward_backward, cfg, state, part, plain.static_losses))
        else:
            synchronisation: AbstractContextManager[Any] = nullcontext()
            if isinstance(model, DistributedDataParallel) and part is not parts[-1]:
                synchronisation = model.no_sync()  # processes average their gradients with the last part
            with synchronisation, compile_help():
                found = forward_backward(cfg, state, part, model, images, targets)
        collected.append(found)
    if state.graphs is not None:
        average_gradients(state.trained)
    losses = collected[0]
    if len(collected) > 1:
        losses = {name: torch.stack([each[name] for each in collected]).mean() for name in losses}

    with memory_help(cfg, batch, "in the optimiser's step"), record_function("optimizer"):
        state.scaler.unscale_(state.optimizer)
        norm = clip_gradients(cfg, state.trained)
        broken, skip = judge(state.scaler, torch.stack(list(losses.values())), norm)
        if cfg.solver.non_finite == "stop":
            state.broken = torch.maximum(state.broken, broken)
            skip = torch.maximum(skip, state.broken)
        step_unless(state.optimizer, skip)
        for value, before in zip(state.statistics, statistics, strict=True):
            value.copy_(torch.where(skip.bool(), before, value))
        state.scaler.update()
        if state.average is not None:
            state.average.update_parameters(state.model)
    return losses, broken


def forward_backward(
    cfg: Config,
    state: TrainingState,
    part: Sequence[Sample],
    forward: Callable[..., dict[str, Tensor]],
    *inputs: Any,
) -> dict[str, Tensor]:
    """Add the gradients of the losses ``forward(*inputs)`` of a part of the batch, and return the losses."""
    with memory_help(cfg, part, "in the forward pass"), autocast(cfg, state.broken.device):
        losses = forward(*inputs)
        total = torch.stack(list(losses.values())).sum() / cfg.solver.accumulate
    with memory_help(cfg, part, "in the backward pass"), record_function("backward"):
        state.scaler.scale(total).backward()
    return {name: loss.detach().float() for name, loss in losses.items()}


def split(batch: Sequence[Sample], parts: int) -> list[Sequence[Sample]]:
    """Split a batch into equal parts."""
    size = len(batch) // parts
    return [batch[i * size : (i + 1) * size] for i in range(parts)]


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    """Return the context of ``SOLVER.AMP`` for a forward pass."""
    return torch.autocast(device.type, dtype=mixed_dtype(cfg, device), enabled=cfg.solver.amp.enabled)


def mixed_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of ``SOLVER.AMP``: on a CPU always bfloat16, as float16 convolutions take minutes."""
    dtype: torch.dtype = torch.bfloat16 if device.type == "cpu" else getattr(torch, cfg.solver.amp.dtype)
    return dtype


def judge(scaler: torch.amp.GradScaler, losses: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Return whether the step is broken, and whether to skip it: 0 or 1, the same in all processes.

    ``losses`` (L,) are those of this process; the ``norm`` of the gradients is the same in all.
    """
    bad_loss = 1 - losses.isfinite().all().float()
    if is_distributed():
        dist.all_reduce(bad_loss, op=dist.ReduceOp.MAX)
    bad_gradient = 1 - norm.isfinite().float()
    skip = torch.maximum(bad_loss, bad_gradient)
    if scaler.is_enabled():
        exhausted = scaler.scale(torch.ones_like(bad_loss)) <= 1  # the scale cannot be lowered further
        bad_gradient = bad_gradient * exhausted
    return torch.maximum(bad_loss, bad_gradient), skip


@contextmanager
def memory_help(cfg: Config, batch: Sequence[Sample], doing: str) -> Iterator[None]:
    """Replace CUDA's out-of-memory error by one that names the batch and the keys that reduce memory."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        height, width = max((s.image.shape[-2:] for s in batch), key=lambda size: size[0] * size[1])
        objects = [len(s.target) if s.target is not None else 0 for s in batch]
        raise UserError(
            "out-of-memory",
            f"out of GPU memory {doing}: {len(batch)} images in this process, the largest {width}x{height} "
            f"(width x height), {sum(objects)} instances ({max(objects)} in one image; image ids "
            f"{', '.join(str(s.image_id) for s in batch)}); {memory_remedies(cfg, len(batch))}",
        ) from error


def memory_remedies(cfg: Config, images: int) -> str:
    """List the unused ways to reduce memory, those that change the result least first."""
    solver, model = cfg.solver, cfg.model
    choices = []
    if solver.cuda_graphs is True:
        choices.append("set SOLVER.CUDA_GRAPHS False")
    if images > 1:
        choices.append(
            f"set SOLVER.ACCUMULATE auto, or above {solver.accumulate}, which gives the same update"
        )
    is_resnet = model.backbone.name in RESNET_BACKBONES and model.resnets.norm not in ("BN", "SyncBN")
    if not model.backbone.activation_checkpointing and is_resnet:
        choices.append("set MODEL.BACKBONE.ACTIVATION_CHECKPOINTING True")
    if not solver.amp.enabled:
        choices.append("set SOLVER.AMP.ENABLED True")
    choices.append(
        f"lower INPUT.MAX_SIZE_TRAIN ({cfg.input.max_size_train}) and INPUT.MIN_SIZE_TRAIN "
        f"({max(cfg.input.min_size_train)})"
    )
    choices.append(f"lower MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE ({model.roi_heads.batch_size_per_image})")
    return "; or ".join(choices)


@contextmanager
def compile_help() -> Iterator[None]:
    """Replace a failure of ``torch.compile`` by an error that names the key."""
    try:
        yield
    except RuntimeError as error:
        # The module of the exception takes a second to import, so its name is compared.
        if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            raise
        cause = getattr(error, "inner_exception", error)
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise UserError(
            "cannot-compile",
            f"MODEL.COMPILE True, but PyTorch cannot compile the model here: {reason.strip()}; on a CPU it "
            "needs a C++ compiler, such as Debian's package g++; MODEL.COMPILE False trains without",
        ) from error
