"""Losses and times of the last iterations. Losses stay on the device until they are reported."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from ..errors import UserError
from ..structures import Sample
from .distributed import gather, mean_over_processes, world_size
from .writers import memory_in_use

logger = logging.getLogger(__name__)


class Meter:
    """Collects what happens in each iteration; :meth:`report` reads it back once for many iterations.

    Args:
        device: of the model.
        start: the first iteration.
        end: ``SOLVER.MAX_ITER``.
        remedy: what to do when training diverges, for the message.
    """

    def __init__(self, device: torch.device, start: int, end: int, remedy: str) -> None:
        self.device, self.end, self.remedy = device, end, remedy
        self._iteration = start
        self._names: list[str] = []
        self._losses: list[Tensor] = []
        self._image_ids: list[list[int]] = []
        self._waiting = 0.0
        self._total_time, self._total_iterations = 0.0, 0
        self._begin = time.perf_counter()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time inside is data time."""
        begin = time.perf_counter()
        yield
        self._waiting += time.perf_counter() - begin

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside, for checkpoints and evaluations, does not count."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def add(self, losses: dict[str, Tensor], batch: Sequence[Sample]) -> None:
        """The losses of one more iteration, which are not read yet."""
        self._names = list(losses)
        self._losses.append(torch.stack([loss.detach().float() for loss in losses.values()]))
        self._image_ids.append([sample.image_id for sample in batch])

    def report(self, learning_rate: float) -> dict[str, float]:
        """Means over the iterations since the last report, logged as one line; empty if there were none.

        Returns:
            each loss and ``total_loss``, ``lr``, ``time`` and ``data_time`` in seconds for an iteration,
            ``images_per_second`` over all processes, ``memory_mb``.

        Raises:
            UserError: a loss is not finite. The message names the iteration, the losses and the images.
        """
        count = len(self._losses)
        if count == 0:
            return {}
        own = torch.stack(self._losses)
        losses = mean_over_processes(own).tolist()
        self._check_finite(losses, own)
        now = time.perf_counter()
        seconds = (now - self._begin) / count
        images = sum(map(len, self._image_ids)) * world_size()
        self._total_time += now - self._begin
        self._total_iterations += count
        means = [sum(column) / count for column in zip(*losses, strict=True)]
        scalars = {
            "total_loss": sum(means),
            **dict(zip(self._names, means, strict=True)),
            "lr": learning_rate,
            "time": seconds,
            "data_time": self._waiting / count,
            "images_per_second": images / max(now - self._begin, 1e-9),
            "memory_mb": memory_in_use(self.device),
        }
        self._iteration += count
        self._log(scalars)
        self._losses, self._image_ids = [], []
        self._waiting, self._begin = 0.0, now
        return scalars

    def _log(self, scalars: dict[str, float]) -> None:
        left = (self.end - self._iteration) * self._total_time / self._total_iterations
        losses = "  ".join(f"{name} {scalars[name]:.4g}" for name in ("total_loss", *self._names))
        logger.info(
            "iter %d/%d  eta %s  %s  lr %.4g  %.3f s/iter  data %.3f s  %.2f images/s  memory %.0f MB",
            self._iteration,
            self.end,
            timedelta(seconds=round(left)),
            losses,
            scalars["lr"],
            scalars["time"],
            scalars["data_time"],
            scalars["images_per_second"],
            scalars["memory_mb"],
        )

    def _check_finite(self, losses: list[list[float]], own: Tensor) -> None:
        """All processes come here with the same means, so all leave together."""
        finite = torch.tensor(losses).isfinite().all(dim=1)
        if finite.all():
            return
        row = int((~finite).nonzero()[0])
        values = ", ".join(f"{n} {v:.4g}" for n, v in zip(self._names, losses[row], strict=True))
        # A process whose own losses are finite has nothing to do with it.
        guilty = [] if own[row].isfinite().all() else self._image_ids[row]
        ids = [image_id for part in gather(guilty) for image_id in part]
        raise UserError(
            f"training diverged at iteration {self._iteration + row}: {values} "
            f"(image ids {', '.join(map(str, ids))}); {self.remedy}"
        )
