"""What a run writes while it goes: log lines, ``metrics.jsonl`` and TensorBoard events."""

from __future__ import annotations

import json
import logging
import logging.handlers
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from ..distributed.group import is_main
from ..files import atomic_write_text, cannot_write
from ..progress import close_bars, fitted
from ..text import LogFormatter, printable

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

LOGGER = "gn_detect"

logger = logging.getLogger(__name__)


class RunLog(logging.handlers.MemoryHandler):
    """Keeps the package's log lines until the run folder exists, then writes them to ``log.txt``."""

    def __init__(self) -> None:
        super().__init__(capacity=0, flushLevel=logging.CRITICAL + 1)

    def shouldFlush(self, record: logging.LogRecord) -> bool:
        """As soon as there is a file."""
        return self.target is not None

    def open(self, path: Path) -> None:
        """Append to ``path`` from now on."""
        handler = _LogFile(path, encoding="utf-8")
        handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
        self.setTarget(handler)
        self.flush()

    def close(self) -> None:
        """Close the file too."""
        file = self.target
        super().close()
        if file is not None:
            file.close()


class _LogFile(logging.FileHandler):
    """A full disk does not end a run for a log line; whatever matters more says so itself."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the line."""


class _Console(logging.StreamHandler):
    """Writes lines above a progress bar; in a terminal lines are short.

    A record's attribute ``short`` takes the place of its message there.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Clear the bars, write, and draw them again."""
        with tqdm.external_write_mode(self.stream):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """Return the text, short and wrapped where the stream is a terminal."""
        if hasattr(record, "short") and self.stream.isatty():
            record = logging.makeLogRecord({**vars(record), "msg": record.short, "args": None})
        return fitted(super().format(record), self.stream)


@contextmanager
def run_log() -> Iterator[RunLog]:
    """Log lines of the package go to standard output, unless somebody listens already, and to the RunLog.

    Of several processes the first one speaks.
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


class MetricsWriter:
    """Scalars by iteration, as lines of ``metrics.jsonl`` and as TensorBoard events.

    Args:
        folder: the run's.
        start: iterations from here on are dropped from an existing file: they are computed again.
        evaluate_first: the evaluation after the iteration before ``start`` is repeated, too.
    """

    def __init__(self, folder: Path, start: int, evaluate_first: bool = False) -> None:
        self._folder, self._path = folder, folder / "metrics.jsonl"
        lines = [] if start == 0 else _lines(self._path)
        kept = [line for line in lines if _iteration(line) < start]
        broken = sum(_iteration(line) == math.inf for line in lines)
        if broken:
            logger.warning("%s: %d lines are damaged, and left out", self._path, broken)
        while evaluate_first and kept and _iteration(kept[-1]) == start - 1 and _is_evaluation(kept[-1]):
            kept.pop()
        atomic_write_text(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._events = _events_in(folder, start)

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        """``scalars`` after ``iteration``; values that are not finite become null.

        Raises:
            UserError: a file cannot be written: the disk is full, or may only be read.
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

    def add_picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """A (H, W, 3) uint8 RGB picture for TensorBoard."""
        if self._events is not None:
            self._events.add_picture(name, picture, iteration)

    def _begin_again(self, iteration: int) -> None:
        """The folder, or the file in it, was deleted while the run goes on."""
        logger.warning(
            "%s was deleted; it is written anew, without what was before iteration %d", self._path, iteration
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file.close()
        self._file = self._path.open("a", encoding="utf-8")
        if self._events is not None:
            self._events.close()
        self._events = _events_in(self._folder, iteration)

    def sync(self) -> None:
        """Make the lines last through a power failure, as the checkpoint that follows them does."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish both files."""
        with suppress(OSError):  # the disk is full, which write() has said
            self._file.close()
        if self._events is not None:
            self._events.close()


class EventsWriter:
    """TensorBoard's file of a run. Its own writer has a thread, where an error of the disk is a traceback.

    Args:
        folder: the run's.
        start: TensorBoard drops what earlier files of the folder hold from this iteration on.

    Raises:
        ImportError: the tensorboard package is not installed.
        UserError: the file cannot be written.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        self._path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        try:
            self._records = RecordWriter(self._path.open("xb"))
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._add(Event(wall_time=now, file_version="brain.Event:2"))
        if start:
            self._add(Event(wall_time=now, step=start, session_log=SessionLog(status=SessionLog.START)))

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        """``scalars`` after ``iteration``.

        Raises:
            UserError: the file cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=printable(key), simple_value=value) for key, value in scalars.items()]
        self._add(Event(wall_time=time.time(), step=iteration, summary=Summary(value=values)))

    def add_picture(self, name: str, picture: np.ndarray, iteration: int) -> None:
        """A (H, W, 3) uint8 RGB picture.

        Raises:
            UserError: the file cannot be written.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import image

        summary = image(printable(name), picture, dataformats="HWC")
        self._add(Event(wall_time=time.time(), step=iteration, summary=summary))

    def close(self) -> None:
        """What is written is in the file already."""
        with suppress(OSError):
            self._records.close()

    def _add(self, event: Event) -> None:
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError as error:
            raise cannot_write(self._path, error, ", then --resume") from error


def _events_in(folder: Path, start: int) -> EventsWriter | None:
    """For the run's folder, or None where the tensorboard package is not installed."""
    try:
        return EventsWriter(folder, start)
    except ImportError:
        return None


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


def _is_evaluation(line: str) -> bool:
    """Return whether an evaluation wrote the line, not training."""
    return "total_loss" not in json.loads(line)


def memory_in_use(device: torch.device) -> float:
    """The most memory that this process has held, in MiB: on the GPU, or as the system counts it on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
