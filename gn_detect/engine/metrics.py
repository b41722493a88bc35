"""The record of a run: log lines, losses and times, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import json
import logging
import logging.handlers
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..distributed.group import is_main, mean_over_processes, world_size
from ..files import atomic_write_text, cannot_write
from ..progress import close_bars, fitted, progress_bar
from ..structures import Sample
from ..text import LogFormatter, printable
from .checkpoint import METRICS
from .loggers import Loggers

LOGGER = "gn_detect"

logger = logging.getLogger(__name__)


class RunLog(logging.handlers.MemoryHandler):
    """Keep the package's log lines until the run folder exists, then write them to ``log.txt``."""

    def __init__(self) -> None:
        super().__init__(capacity=0, flushLevel=logging.CRITICAL + 1)

    def shouldFlush(self, record: logging.LogRecord) -> bool:
        return self.target is not None

    def open(self, path: Path) -> None:
        """Append to ``path`` from now on."""
        handler = _LogFile(path, encoding="utf-8")
        handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
        self.setTarget(handler)
        self.flush()

    def close(self) -> None:
        file = self.target
        super().close()
        if file is not None:
            file.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a line that a full disk refuses; the next checkpoint reports the disk."""


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:  # Python 3.10 cannot subscript it
    _StreamHandler = logging.StreamHandler


class _Console(_StreamHandler):
    """Write lines above a progress bar. A terminal gets a record's attribute ``short`` for its message."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        if hasattr(record, "short") and self.stream.isatty():
            record = logging.makeLogRecord({**vars(record), "msg": record.short, "args": None})
        return fitted(super().format(record), self.stream)


@contextmanager
def run_log() -> Iterator[RunLog]:
    """Send log lines of the package to the RunLog and, unless a handler exists already, to standard output.

    Only the first of several processes writes to standard output.
    """
    logger = logging.getLogger(LOGGER)
    log = RunLog()
    handlers: list[logging.Handler] = [log]
    if not is_main():
        handlers.append(logging.NullHandler())
    elif not logger.hasHandlers():
        console = _Console(sys.stdout)
        console.setFormatter(LogFormatter("%(asctime)s %(message)s", "%H:%M:%S"))
        handlers.append(console)
    level = logger.level
    logger.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield log
    finally:
        close_bars()
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


class NotFinite(Exception):
    """A loss or gradient was not finite in ``iteration``, the first such; all processes raise it together.

    ``losses`` are means over the processes.
    """

    def __init__(self, iteration: int, losses: dict[str, float]) -> None:
        super().__init__(iteration)
        self.iteration, self.losses = iteration, losses


class Meter:
    """Collect losses and times. Losses stay on the device; :meth:`report` reads many iterations at once.

    Args:
        device: of the model.
        start: the first iteration.
        end: ``SOLVER.MAX_ITER``.
        history: :meth:`state` of the checkpoint to resume from, saved between two reports.
    """

    def __init__(
        self, device: torch.device, start: int, end: int, history: dict[str, list[float]] | None = None
    ) -> None:
        self.device, self.end = device, end
        self._iteration = start
        self._history = dict(history or {})  # of the losses that were read from the device
        self._names: list[str] = []
        self._losses: list[Tensor] = []
        self._images, self._count = 0, 0  # since the last report
        self._waiting = 0.0
        self._total_time, self._total_iterations = 0.0, 0
        self._begin = time.perf_counter()
        self._bar = progress_bar(total=end, initial=start, desc="training", unit="iter", shown=is_main())

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as data time."""
        begin = time.perf_counter()
        yield
        self._waiting += time.perf_counter() - begin

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time inside, of checkpoints and evaluations."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def add(self, losses: dict[str, Tensor], broken: Tensor, batch: Sequence[Sample]) -> None:
        """Add the losses of one more iteration, and 1 if something was not finite, without reading them."""
        self._names = list(losses)
        self._losses.append(torch.stack([*losses.values(), broken]))
        self._images += len(batch)
        self._bar.update()

    def state(self) -> dict[str, list[float]]:
        """Return the losses since the last report, or raise NotFinite; see :meth:`report`."""
        self._read()
        return self._history

    def report(self, learning_rate: float) -> dict[str, float]:
        """Return means over the iterations since the last report, and log them; empty if there were none.

        Skipped iterations, whose losses are not finite, are left out.

        Returns:
            each loss and ``total_loss``, ``lr``, ``time`` and ``data_time`` in seconds for an iteration,
            ``images_per_second`` over all processes, ``memory_mb``.

        Raises:
            NotFinite: a loss or gradient of an iteration that was not read before is not finite.
        """
        self._read()
        if not self._history:
            return {}
        count = max(self._count, 1)
        now = time.perf_counter()
        seconds = now - self._begin
        self._total_time += seconds
        self._total_iterations += self._count
        means = {name: sum(values) / max(len(values), 1) for name, values in self._history.items()}
        scalars = {
            "total_loss": sum(means.values()),
            **means,
            "lr": learning_rate,
            "time": seconds / count,
            "data_time": self._waiting / count,
            "images_per_second": self._images * world_size() / max(seconds, 1e-9),
            "memory_mb": memory_in_use(self.device),
        }
        self._log(scalars, list(means))
        self._bar.set_postfix_str(f"loss {scalars['total_loss']:.4g}, lr {learning_rate:.3g}")
        if self._iteration >= self.end:
            self._bar.close()
        self._history, self._images, self._count = {}, 0, 0
        self._waiting, self._begin = 0.0, now
        return scalars

    def _read(self) -> None:
        """Read the losses from the device, as means over the processes."""
        if not self._losses:
            return
        rows = mean_over_processes(torch.stack(self._losses)).tolist()
        first, self._losses = self._iteration, []
        self._iteration += len(rows)
        self._count += len(rows)
        broken = None
        for iteration, row in enumerate(rows, start=first):
            losses = dict(zip(self._names, row, strict=False))  # the last value of a row is no loss
            if not row[-1]:
                for name, value in losses.items():
                    self._history.setdefault(name, []).append(value)
            elif broken is None:
                broken = NotFinite(iteration, losses)
        if broken is not None:
            raise broken

    def _log(self, scalars: dict[str, float], names: list[str]) -> None:
        per_iteration = self._total_time / max(self._total_iterations, 1)
        progress = f"iter {self._iteration}/{self.end}"
        eta = timedelta(seconds=round((self.end - self._iteration) * per_iteration))
        losses = "  ".join(f"{name} {scalars[name]:.4g}" for name in ("total_loss", *names))
        rate = f"lr {scalars['lr']:.4g}  {scalars['time']:.3f} s/iter"
        short = f"{progress}  eta {eta}  total_loss {scalars['total_loss']:.4g}  {rate}"
        logger.info(
            "%s  eta %s  %s  %s  data %.3f s  %.2f images/s  memory %.0f MB",
            progress,
            eta,
            losses,
            rate,
            scalars["data_time"],
            scalars["images_per_second"],
            scalars["memory_mb"],
            extra={"short": short},
        )


def memory_in_use(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: of PyTorch on a GPU, of the system on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class MetricsWriter:
    """Write scalars by iteration: lines of ``metrics.jsonl``, TensorBoard events, rows of ``LOGGERS``.

    Args:
        folder: of the run.
        start: lines from this iteration on are dropped, because the iterations are computed again.
        loggers: get the lines that stay and those to come, and are closed with the writer.
        evaluate_again: drop the evaluation after the iteration before ``start``, too.

    Attributes:
        is_evaluated: the evaluation after the iteration before ``start`` is in the file.
    """

    def __init__(
        self, folder: Path, start: int, loggers: Loggers | None = None, evaluate_again: bool = False
    ) -> None:
        self._folder, self._path = folder, folder / METRICS
        lines = [] if start == 0 else _lines(self._path)
        kept = [line for line in lines if _iteration(line) < start]
        broken = sum(_iteration(line) == math.inf for line in lines)
        if broken:
            logger.warning("%s: %d lines are damaged, and left out", self._path, broken)
        while evaluate_again and _ends_with_evaluation(kept, start):
            kept.pop()
        self.is_evaluated = _ends_with_evaluation(kept, start)
        atomic_write_text(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._events = _events_in(folder, start)
        self._loggers = loggers
        if loggers is not None:
            for scalars in map(json.loads, kept):
                loggers.write(scalars.pop("iteration"), scalars)

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        """Write ``scalars`` after ``iteration``; values that are not finite become null in ``metrics.jsonl``.

        Raises:
            UserError: a file cannot be written: the disk is full, or read-only.
        """
        values = {key: value if math.isfinite(value) else None for key, value in scalars.items()}
        try:
            if not self._path.exists():
                self._begin_again(iteration)
            self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error, ", then --resume") from error
        if self._events is not None:
            self._events.write(iteration, scalars)
        if self._loggers is not None:
            self._loggers.write(iteration, scalars)

    def add_picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Write a (H, W, 3) uint8 RGB picture for TensorBoard."""
        if self._events is not None:
            self._events.add_picture(name, picture, iteration)

    def _begin_again(self, iteration: int) -> None:
        logger.warning(
            "%s was deleted; it is written anew, without what was before iteration %d", self._path, iteration
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file.close()
        self._file = self._path.open("a", encoding="utf-8")
        if self._events is not None:
            self._events.close()
        self._events = _events_in(self._folder, iteration)

    def finish(self) -> None:
        """Let the loggers know that the run is at its end."""
        if self._loggers is not None:
            self._loggers.finish()

    def sync(self) -> None:
        """Make the lines last through a power failure, like the checkpoint that follows them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # a full disk, which write() has reported
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._loggers is not None:
            self._loggers.close()


def _lines(path: Path) -> list[str]:
    """Return the lines, split at line feeds only: a damaged byte may be another separator of lines."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return text.removesuffix("\n").split("\n") if text else []


def _iteration(line: str) -> float:
    """Return the iteration of a line of ``metrics.jsonl``; infinite for a damaged one, which is dropped."""
    try:
        iteration = json.loads(line)["iteration"]
        return float(iteration) if type(iteration) is int and "\ufffd" not in line else math.inf
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def count_evaluations(folder: Path, after: int, until: int) -> int:
    """Return the number of evaluations in a run's ``metrics.jsonl``, ``after`` < iteration <= ``until``."""
    lines = [line for line in _lines(folder / METRICS) if after < _iteration(line) <= until]
    return sum("total_loss" not in json.loads(line) for line in lines)


def _ends_with_evaluation(lines: list[str], start: int) -> bool:
    """Return whether an evaluation, not training, wrote the last line, after iteration ``start - 1``."""
    return bool(lines) and _iteration(lines[-1]) == start - 1 and "total_loss" not in json.loads(lines[-1])


class EventsWriter:
    """Write TensorBoard's file of a run, each event at once.

    TensorBoard's own writers have a thread, which would print a traceback when the disk is full, and import
    TensorFlow where it is installed.

    Args:
        folder: of the run.
        start: TensorBoard drops earlier points of the folder from this iteration on.

    Raises:
        ImportError: the tensorboard package is not installed.
        UserError: the file cannot be written; each method raises it, too.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        try:
            self._records = RecordWriter(self._path.open("xb"))
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._add(file_version="brain.Event:2")
        if start:
            self._add(step=start, session_log=SessionLog(status=SessionLog.START))

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        """Write ``scalars`` after ``iteration``."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=printable(key), simple_value=value) for key, value in scalars.items()]
        self._add(step=iteration, summary=Summary(value=values))

    def add_picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """Write a (H, W, 3) uint8 RGB picture."""
        from torch.utils.tensorboard.summary import image

        self._add(step=iteration, summary=image(printable(name), picture, dataformats="HWC"))

    def close(self) -> None:
        with suppress(OSError):
            self._records.close()

    def _add(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        try:
            self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
            self._records.flush()
        except OSError as error:
            raise cannot_write(self._path, error, ", then --resume") from error


def _events_in(folder: Path, start: int) -> EventsWriter | None:
    """Return a writer, or None without the tensorboard package."""
    try:
        return EventsWriter(folder, start)
    except ImportError:
        return None
