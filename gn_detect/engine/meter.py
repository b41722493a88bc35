"""Losses and times of the last iterations. Losses stay on the device until they are reported."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from ..distributed.group import is_main, mean_over_processes, world_size
from ..progress import progress_bar
from ..structures import Sample
from .metrics import memory_in_use

logger = logging.getLogger(__name__)


class NotFinite(Exception):
    """A loss or gradient was not finite; in all processes at once.

    Attributes:
        iteration: the first in which that happened, from 0.
        losses: their means over the processes in that iteration.
    """

    def __init__(self, iteration: int, losses: dict[str, float]) -> None:
        super().__init__(iteration)
        self.iteration, self.losses = iteration, losses


class Meter:
    """Collects what happens in each iteration; :meth:`report` reads it back once for many iterations.

    Args:
        device: of the model.
        start: the first iteration.
        end: ``SOLVER.MAX_ITER``.
        history: :meth:`state` of a run that is resumed between two reports.
    """

    def __init__(
        self, device: torch.device, start: int, end: int, history: dict[str, list[float]] | None = None
    ) -> None:
        self.device, self.end = device, end
        self._iteration = start
        self._history = dict(history or {})  # read back already
        self._names: list[str] = []
        self._losses: list[Tensor] = []
        self._images, self._count = 0, 0  # since the last report
        self._waiting = 0.0
        self._total_time, self._total_iterations = 0.0, 0
        self._begin = time.perf_counter()
        self._bar = progress_bar(total=end, initial=start, desc="training", unit="iter", shown=is_main())

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

    def add(self, losses: dict[str, Tensor], broken: Tensor, batch: Sequence[Sample]) -> None:
        """The losses of one more iteration, and 1 if something was not finite; they are not read yet."""
        self._names = list(losses)
        self._losses.append(torch.stack([*losses.values(), broken]))
        self._images += len(batch)
        self._bar.update()

    def state(self) -> dict[str, list[float]]:
        """The losses since the last report, for a checkpoint that is saved between two reports.

        Raises:
            NotFinite: see :meth:`report`.
        """
        self._read()
        return self._history

    def report(self, learning_rate: float) -> dict[str, float]:
        """Means over the iterations since the last report, logged as one line; empty if there were none.

        Iterations with a loss that is not finite, which are left out of training, are left out here.

        Returns:
            each loss and ``total_loss``, ``lr``, ``time`` and ``data_time`` in seconds for an iteration,
            ``images_per_second`` over all processes, ``memory_mb``.

        Raises:
            NotFinite: a loss or gradient of an iteration that was not read before is not finite.
        """
        self._read()
        if not self._history:
            return {}
        count = self._count
        now = time.perf_counter()
        self._total_time += now - self._begin
        self._total_iterations += count
        means = {name: sum(values) / max(len(values), 1) for name, values in self._history.items()}
        scalars = {
            "total_loss": sum(means.values()),
            **means,
            "lr": learning_rate,
            "time": (now - self._begin) / max(count, 1),
            "data_time": self._waiting / max(count, 1),
            "images_per_second": self._images * world_size() / max(now - self._begin, 1e-9),
            "memory_mb": memory_in_use(self.device),
        }
        self._log(scalars, list(means))
        self._bar.set_postfix_str(f"loss {scalars['total_loss']:.4g}, lr {learning_rate:.3g}", refresh=False)
        if self._iteration >= self.end:
            self._bar.close()
        self._history, self._images, self._count = {}, 0, 0
        self._waiting, self._begin = 0.0, now
        return scalars

    def _read(self) -> None:
        """Losses from the device, as means over the processes."""
        count = len(self._losses)
        if count == 0:
            return
        rows = mean_over_processes(torch.stack(self._losses)).tolist()
        first, self._losses = self._iteration, []
        self._iteration += count
        self._count += count
        bad = [index for index, row in enumerate(rows) if row[-1]]
        for index, row in enumerate(rows):
            if index not in bad:
                for name, value in zip(self._names, row, strict=False):
                    self._history.setdefault(name, []).append(value)
        if bad:
            losses = dict(zip(self._names, rows[bad[0]], strict=False))
            raise NotFinite(first + bad[0], losses)

    def _log(self, scalars: dict[str, float], names: list[str]) -> None:
        per_iteration = self._total_time / max(self._total_iterations, 1)
        left = (self.end - self._iteration) * per_iteration
        eta = timedelta(seconds=round(left))
        short = (
            f"iter {self._iteration}/{self.end}  eta {eta}  total_loss {scalars['total_loss']:.4g}  "
            f"lr {scalars['lr']:.4g}  {scalars['time']:.3f} s/iter"
        )
        losses = "  ".join(f"{name} {scalars[name]:.4g}" for name in ("total_loss", *names))
        logger.info(
            "iter %d/%d  eta %s  %s  lr %.4g  %.3f s/iter  data %.3f s  %.2f images/s  memory %.0f MB",
            self._iteration,
            self.end,
            eta,
            losses,
            scalars["lr"],
            scalars["time"],
            scalars["data_time"],
            scalars["images_per_second"],
            scalars["memory_mb"],
            extra={"short": short},
        )
