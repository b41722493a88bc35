"""One training step: from a batch to an update of the weights, without waiting for the device."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.profiler import record_function

from ..distributed.group import is_distributed
from ..errors import UserError
from ..structures import Sample
from ..weights import Checkpoint, CheckpointMetadata, load_weights
from .faults import compile_help, memory_help
from .optimizer import build_optimizer, clip_gradients, restore_optimizer, step_unless

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """All that a step changes. Made by :func:`make_state`.

    Attributes:
        model: the plain model.
        optimizer: over its trained parameters.
        trained: those parameters.
        statistics: what a forward pass changes: the running statistics of BatchNorm.
        scaler: of the loss; switched off unless training is in float16, which it never is on a CPU.
        average: ``SOLVER.EMA``, or None.
        broken: scalar on the device, 1 from the first loss or gradient on that was not finite, where
            ``SOLVER.NON_FINITE`` is ``stop``: from there on the weights stay as they were.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    broken: Tensor
    trained: list[nn.Parameter] = field(init=False)
    statistics: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]

    @property
    def evaluated(self) -> nn.Module:
        """The model whose AP counts: the average where there is one."""
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
                raise UserError(f"{origin}: its 'scaler' is not that of a GradScaler; resume from another")
            self.scaler.load_state_dict(metadata.scaler)
        if self.average is not None:
            self.average.module.load_state_dict(self.model.state_dict())
            self.average.n_averaged.fill_(metadata.averaged_steps or 0)
        if metadata.trained is not None:
            load_weights(self.model, Checkpoint(metadata.trained, path=Path(origin)))


def make_state(cfg: Config, model: nn.Module) -> TrainingState:
    """Optimiser, scaler and average for a model that is on its device."""
    device = next(model.parameters()).device
    amp, dtype = cfg.solver.amp, mixed_dtype(cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp.enabled and dtype == torch.float16)
    if amp.enabled and dtype != getattr(torch, amp.dtype):
        logger.warning(
            "SOLVER.AMP.DTYPE is %s, in which a step takes minutes on a CPU, so bfloat16 is used; "
            "set SOLVER.AMP.DTYPE bfloat16, or SOLVER.AMP.ENABLED False for float32",
            amp.dtype,
        )
    average = None
    if cfg.solver.ema.enabled:
        average = _moving_average(model, cfg.solver.ema.decay)
    broken = torch.zeros((), device=device)
    return TrainingState(model, build_optimizer(cfg, model), scaler, average, broken)


def _moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights that soon forgets those it began with.

    After n updates ``min(decay, (1 + n) / (10 + n))`` of it stays at the next, as in TensorFlow's
    ``ExponentialMovingAverage`` with ``num_updates``: of a run that is short beside ``1 / (1 - decay)``, the
    average would otherwise be the initial weights.
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


def train_step(
    cfg: Config, model: nn.Module, batch: Sequence[Sample], state: TrainingState
) -> tuple[dict[str, Tensor], Tensor]:
    """One update of the weights and running statistics, or none where a loss or gradient is not finite.

    Args:
        cfg: whole config.
        model: ``state.model``, or what wraps it.
        batch: of this process; it goes through the model in ``SOLVER.ACCUMULATE`` parts.
        state: is changed.

    Returns:
        The losses, and 1 where something is not finite (0 where not), still on the device. float16 gradients
        that are too large do not count: the scaler lowers their scale, and the step is left out.
    """
    state.optimizer.zero_grad(set_to_none=True)
    statistics = [value.clone() for value in state.statistics]
    parts = split(batch, cfg.solver.accumulate)
    collected = []
    for part in parts:
        with _communicate(model, part is parts[-1]), compile_help():
            with memory_help(cfg, part, "in the forward pass"), autocast(cfg, state.broken.device):
                losses = model([sample.image for sample in part], [sample.target for sample in part])
                total = torch.stack(list(losses.values())).sum() / len(parts)
            with memory_help(cfg, part, "in the backward pass"), record_function("backward"):
                state.scaler.scale(total).backward()
        collected.append({name: loss.detach().float() for name, loss in losses.items()})
    losses = {name: torch.stack([part[name] for part in collected]).mean() for name in losses}

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


def split(batch: Sequence[Sample], parts: int) -> list[Sequence[Sample]]:
    """A batch in equal parts."""
    size = len(batch) // parts
    return [batch[i * size : (i + 1) * size] for i in range(parts)]


def autocast(cfg: Config, device: torch.device) -> torch.autocast:
    """``SOLVER.AMP`` for a forward pass."""
    return torch.autocast(device.type, dtype=mixed_dtype(cfg, device), enabled=cfg.solver.amp.enabled)


def mixed_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    """Return the dtype of ``SOLVER.AMP``: on a CPU always bfloat16, as float16 convolutions take minutes."""
    dtype: torch.dtype = torch.bfloat16 if device.type == "cpu" else getattr(torch, cfg.solver.amp.dtype)
    return dtype


def judge(scaler: torch.amp.GradScaler, losses: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Whether something is wrong with this step, and whether to skip it: 0 or 1, the same in all processes.

    Args:
        scaler: of the loss.
        losses: (L,) of this process.
        norm: of the gradients, which all processes share.
    """
    bad_loss = 1 - losses.isfinite().all().float()
    if is_distributed():
        dist.all_reduce(bad_loss, op=dist.ReduceOp.MAX)
    bad_gradient = 1 - norm.isfinite().float()
    skip = torch.maximum(bad_loss, bad_gradient)
    if scaler.is_enabled():
        exhausted = scaler.scale(torch.ones_like(bad_loss)) <= 1  # there is no scale left to lower
        bad_gradient = bad_gradient * exhausted
    return torch.maximum(bad_loss, bad_gradient), skip


def _communicate(model: nn.Module, now: bool) -> AbstractContextManager[Any]:
    """Gradients of several parts are summed here, and averaged over the processes with the last part."""
    if now or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()
