"""Batches from DataLoader's processes, and what is said when one of them dies.

PyTorch tells of a death from a signal handler, so it raises wherever the program is: in the middle of a
checkpoint's writing, too. Here it is told where it matters, when the next batch is waited for.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from ..errors import UserError

GRACE_SECONDS = 2.0
"""A process closes its connections a moment before it counts as dead."""


def batches_of_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """What ``loader`` gives.

    Args:
        loader: has at least one worker; errors of its dataset are raised as they are.

    Raises:
        UserError: a worker died.
    """
    told_by_signals = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGCHLD) if told_by_signals else None
    others = multiprocessing.active_children()
    batches = iter(loader)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    if told_by_signals:
        signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)
    while True:
        try:
            with _told_of_deaths(workers) if told_by_signals else nullcontext():
                batch = next(batches)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:
            # Its connection may break first, and PyTorch notices by itself where there are no signals.
            if "in DataLoader worker process" not in str(error):
                gone = wait([worker.sentinel for worker in workers], GRACE_SECONDS)
                for worker in workers:
                    if worker.sentinel in gone:
                        worker.join()
                _check(workers)
            raise
        yield batch


@contextmanager
def _told_of_deaths(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """Raises as soon as a worker dies, from whatever wait: a message that it began is never completed."""

    def handler(number: int, frame: FrameType | None) -> None:
        if callable(previous):
            previous(number, frame)
        _check(workers)

    previous = signal.signal(signal.SIGCHLD, handler)
    try:
        _check(workers)
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous)


def _check(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.exitcode:
            code = worker.exitcode
            how = f"signal {-code}: {signal.strsignal(-code)}" if code < 0 else f"exit status {code}"
            raise UserError(
                f"a data-loader worker died (process {worker.pid}, {how}); if the machine ran out of memory, "
                f"lower DATALOADER.NUM_WORKERS ({len(workers)}); --resume continues from the last checkpoint"
            )
