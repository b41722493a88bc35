"""Train a converted model to give its original's outputs, keep its best state, and resume."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_write
from ..layers import GroupNorm
from .anneal import Annealing
from .images import ImageStream
from .objective import Objective

CHECKS = 5  # evaluations on the held-out images after the annealing
ANNEALED = 0.3  # part of the steps over which the statistics go from BatchNorm's to GroupNorm's
WARMED_UP = 0.1  # part of the steps over which the learning rate rises: the model starts at its smallest loss

# Before the first step the model is the original but for rounding: its gradients are about 1e-8, and 1e-3
# after it. With Adam's usual 1e-8 a whole step would go in the direction of the rounding.
ADAM_EPS = 1e-5


@dataclass(frozen=True)
class Rate:
    """The highest learning rate of some parameters."""

    parameters: list[nn.Parameter]
    highest: float


def rates_of(
    model: nn.Module,
    norms: Sequence[GroupNorm],
    learning_rate: float,
    norm_learning_rate: float,
    sizes: Mapping[nn.Module, float],
) -> list[Rate]:
    """Return the rates of all parameters to train: those of ``norms`` have one of their own.

    Adam's steps are of one length however large a weight is. A layer that was rescaled, to ``sizes`` of its
    own size, gets steps in proportion.
    """
    affine = {parameter for norm in norms for parameter in norm.parameters()}
    rescaled = {
        parameter: size for layer, size in sizes.items() for parameter in layer.parameters(recurse=False)
    }
    rates: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = norm_learning_rate if parameter in affine else learning_rate * rescaled.get(parameter, 1.0)
            rates.setdefault(rate, []).append(parameter)
    return [Rate(parameters, highest) for highest, parameters in rates.items()]


def _schedule(done: float) -> float:
    """Return the factor of the learning rate after the part ``done`` of the steps.

    It rises linearly, stays until the end of the annealing, and falls as half a cosine.
    """
    fallen = max(0.0, (done - ANNEALED) / (1 - ANNEALED))
    return min(1.0, (done + 0.1 * WARMED_UP) / WARMED_UP) * 0.5 * (1 + math.cos(math.pi * fallen))


@dataclass
class Distillation:
    """Train ``objective.converted`` for ``steps`` steps; :meth:`run` leaves the best state in it.

    Attributes:
        scales: the kind of scales that the channels were given.
        checkpoint: see :func:`gn_detect.calibrate`.
        given: digest of the images and of the two models before the first change.
    """

    objective: Objective
    stream: ImageStream
    annealing: Annealing
    steps: int
    rates: Sequence[Rate]
    scales: str
    checkpoint: Path | None
    given: str
    progress: bool

    def __post_init__(self) -> None:
        self.model = self.objective.converted
        self.optimizer = torch.optim.Adam(
            [{"params": rate.parameters, "lr": rate.highest} for rate in self.rates], eps=ADAM_EPS
        )
        self.every = max(1, math.ceil(self.steps * (1 - ANNEALED) / CHECKS))

    def run(self) -> None:
        """Take all steps that remain."""
        if not self._resume():
            self.step, self.best_loss, self.best = 0, self._held_out_loss(), copy_of_state(self.model)
        with tqdm(total=self.steps, initial=self.step, desc="calibrating", disable=not self.progress) as bar:
            while self.step < self.steps:
                loss = self._take_step()
                bar.set_postfix(loss=f"{loss:.4f}", best=f"{self.best_loss:.4f}", refresh=False)
                bar.update()
                if (self.steps - self.step) % self.every == 0:
                    self._check()
        self.model.load_state_dict(self.best)

    def _take_step(self) -> float:
        done = self.step / self.steps
        self.annealing.share = min(1.0, done / ANNEALED)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate.highest * _schedule(done)
        with self.annealing.applied():
            outputs, blocks = self.objective.loss(self.stream.next_batch())
            loss = outputs + blocks
        value, output_value = torch.stack([loss, outputs]).tolist()  # one wait for the device
        if not math.isfinite(value):
            raise UserError(
                "diverged",
                f"the calibration's loss is {value} at step {self.step + 1}; lower the learning rate, and "
                "check that the images are prepared as the original expects",
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return output_value

    def _check(self) -> None:
        if self.step >= self.steps * ANNEALED:
            loss = self._held_out_loss()
            if loss < self.best_loss:
                self.best_loss, self.best = loss, copy_of_state(self.model)
        if self.checkpoint is not None:
            content = {
                "identity": self._identity(),
                "step": self.step,
                "best_loss": self.best_loss,
                "best": self.best,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "stream": self.stream.state_dict(),
            }
            with atomic_write(self.checkpoint, "wb") as file:
                torch.save(content, file)

    def _held_out_loss(self) -> float:
        return self.objective.output_loss(self.stream.held_out)

    def _identity(self) -> str:
        """Return a digest of the settings on which a checkpoint must agree with a calibration."""
        settings = (
            self.steps,
            [(rate.highest, len(rate.parameters)) for rate in self.rates],
            (ANNEALED, WARMED_UP, ADAM_EPS, self.objective.block_weight),
            self.stream.identity,
            self.given,
            [(name, tuple(tensor.shape)) for name, tensor in self.model.state_dict().items()],
            [(m.num_groups, m.eps) for m in self.model.modules() if isinstance(m, GroupNorm)],
            self.scales,
        )
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def _resume(self) -> bool:
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        try:
            content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            same = content["identity"] == self._identity()
        except Exception as error:
            raise UserError(
                "other-run",
                f"{self.checkpoint} is no checkpoint of a calibration; choose another file, or none",
            ) from error
        if not same:
            raise UserError(
                "other-run",
                f"{self.checkpoint} belongs to a calibration with other settings, images or model; "
                "if the converted model was calibrated since, make it anew with convert_norm and call again; "
                "else choose another file",
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.stream.load_state_dict(content["stream"])
        self.step, self.best_loss, self.best = content["step"], content["best_loss"], content["best"]
        return True


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict, which does not follow the model's changes."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
