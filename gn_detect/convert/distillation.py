"""The distillation of a calibration: its steps, which of its states is kept, and how it is resumed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
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
from .rates import ADAM_EPS, ANNEALED, WARMED_UP, Rate, schedule

CHECKS = 5
"""Evaluations on the held-out images once the norms are what they will be."""


@dataclass
class _Progress:
    """What a resumed calibration starts from.

    Attributes:
        step: number of steps taken.
        best_loss, best: smallest loss on the held-out images, and the model's state there.
    """

    step: int
    best_loss: float
    best: dict[str, Tensor]


class Distillation:
    """``run`` leaves the best state in the model.

    Args:
        rates: what is trained, and how fast.
        scales: the kind of scales that the channels were given.
        checkpoint: see :func:`gn_detect.calibrate`.
        given: digest of the two models before the first change and of the images.
    """

    def __init__(
        self,
        objective: Objective,
        stream: ImageStream,
        annealing: Annealing,
        steps: int,
        rates: Sequence[Rate],
        scales: str,
        checkpoint: str | Path | None,
        given: str,
        progress: bool,
    ) -> None:
        self.objective, self.stream, self.annealing = objective, stream, annealing
        self.model = objective.converted
        self.steps, self.rates, self.scales, self.given = steps, rates, scales, given
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.shows = progress
        self.optimizer = torch.optim.Adam(
            [{"params": rate.parameters, "lr": rate.highest} for rate in rates], eps=ADAM_EPS
        )
        self.every = max(1, math.ceil(steps * (1 - ANNEALED) / CHECKS))

    def run(self) -> None:
        """All steps that remain."""
        state = self._resumed() or _Progress(0, self._held_out_loss(), copy_of_state(self.model))
        with tqdm(total=self.steps, initial=state.step, desc="calibrating", disable=not self.shows) as bar:
            while state.step < self.steps:
                bar.set_postfix(
                    loss=f"{self._step(state.step):.4f}", best=f"{state.best_loss:.4f}", refresh=False
                )
                state.step += 1
                bar.update()
                if (self.steps - state.step) % self.every == 0:
                    self._check(state)
        self.model.load_state_dict(state.best)

    def _step(self, step: int) -> float:
        done = step / self.steps
        self.annealing.share = min(1.0, done / ANNEALED)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate.highest * schedule(done)
        with self.annealing.applied():
            output, blocks = self.objective.loss(self.stream.next_batch())
            loss = output + blocks
        value, of_outputs = torch.stack([loss, output]).tolist()  # one wait for the device
        if not math.isfinite(value):
            raise UserError(
                f"the calibration's loss is {value} at step {step + 1}; lower the learning rate, and see "
                "that the images are prepared as the original expects"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return of_outputs

    def _check(self, state: _Progress) -> None:
        if state.step >= self.steps * ANNEALED:
            loss = self._held_out_loss()
            if loss < state.best_loss:
                state.best_loss, state.best = loss, copy_of_state(self.model)
        if self.checkpoint is not None:
            self._save(state)

    def _held_out_loss(self) -> float:
        """With the norms as they will be."""
        return self.objective.output_loss(self.stream.held_out)

    def _identity(self) -> str:
        """What a checkpoint must agree on to go on from it."""
        shapes = [(name, tuple(tensor.shape)) for name, tensor in self.model.state_dict().items()]
        rates = [(rate.highest, len(rate.parameters)) for rate in self.rates]
        norms = [(m.num_groups, m.eps) for m in self.model.modules() if isinstance(m, GroupNorm)]
        constants = (ANNEALED, WARMED_UP, ADAM_EPS, self.objective.block_weight)
        settings = (
            self.steps,
            rates,
            constants,
            self.stream.identity,
            self.given,
            shapes,
            norms,
            self.scales,
        )
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def _save(self, state: _Progress) -> None:
        assert self.checkpoint is not None
        content = {
            "identity": self._identity(),
            "step": state.step,
            "best_loss": state.best_loss,
            "best": state.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stream": self.stream.state_dict(),
        }
        with atomic_write(self.checkpoint, "wb") as file:
            torch.save(content, file)

    def _resumed(self) -> _Progress | None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        try:
            content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            same = content["identity"] == self._identity()
        except Exception as error:
            raise UserError(
                f"{self.checkpoint} is no checkpoint of a calibration; choose another file, or none"
            ) from error
        if not same:
            raise UserError(
                f"{self.checkpoint} belongs to a calibration with other settings, images or model; "
                "if the converted model was calibrated since, make it anew with convert_norm and call again; "
                "else choose another file"
            )
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.stream.load_state_dict(content["stream"])
        return _Progress(content["step"], content["best_loss"], content["best"])


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, which does not follow the model's changes."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
