"""The processes of one machine: started together, and ended together when one of them fails."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch.multiprocessing

from ..errors import UserError

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit statuses of processes that were told to stop."""

SETTLE_SECONDS = 2.0
"""The process that failed and those that only noticed it end at about the same time; their messages too."""


def start_processes(function: Callable[..., None], args: Sequence[Any], count: int) -> None:
    """Call ``function(local_rank, *args)`` in ``count`` new processes and wait for all.

    SIGTERM and SIGINT are passed on to them. When one fails, the others, which would wait for it for ever,
    are killed.

    Args:
        function: importable by name.

    Raises:
        UserError: a process raised one, with its message, or was killed.
        RuntimeError: a process raised another error, with its traceback.
        SystemExit: the processes stopped on request.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(function, rank, args, errors), name=f"rank {rank}")
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        with _passing_on(processes) as received:
            failed = _wait_for(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    stopped = [process.exitcode for process in processes if process.exitcode in STOPPED]
    messages = _drain(errors)
    told = [text for _, is_for_user, text in messages if is_for_user]
    if failed and told:  # even on request: the checkpoint may be what went wrong
        raise UserError(told[0])
    if received or (stopped and not failed):
        raise SystemExit(128 + received[0] if received else stopped[0])
    if failed:
        raise _cause(failed, messages)


def _run(function: Callable[..., None], rank: int, args: Sequence[Any], errors: Any) -> None:
    """In a process of its own: what goes wrong travels to the parent."""
    # The parent may be killed; then this process saves and leaves.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGINT)  # type: ignore[attr-defined]
    try:
        function(rank, *args)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except UserError as error:
        errors.put((rank, True, str(error)))  # before the others see this process leave
        raise SystemExit(2) from None
    except Exception:
        errors.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None


@contextmanager
def _passing_on(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """SIGTERM and SIGINT of this process go to ``processes``, and are noted in the list."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for(processes: Sequence[BaseProcess]) -> dict[int, int]:
    """Wait until all have ended well or on request, or a little longer than the first failure.

    Returns:
        Exit codes of those that failed by then, by rank on this machine.
    """
    running = dict(enumerate(processes))
    failed: dict[int, int] = {}
    deadline = math.inf
    while running and time.monotonic() < deadline:
        wait([process.sentinel for process in running.values()], timeout=0.1 if failed else None)
        for rank, process in list(running.items()):
            code = process.exitcode
            if code is None:
                continue
            del running[rank]
            if code not in (0, *STOPPED):
                failed[rank] = code
                deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
    return failed


def _drain(errors: Any) -> list[tuple[int, bool, str]]:
    """Rank, whether it is meant for the user, and text of each failure."""
    messages = []
    while not errors.empty():
        messages.append(errors.get())
    return messages


def _cause(failed: dict[int, int], messages: list[tuple[int, bool, str]]) -> Exception:
    """Of several failures without a message for the user the one that explains the others: a death first."""
    for rank, code in failed.items():
        if code < 0:
            name = signal.Signals(-code).name
            return UserError(
                f"process {rank} of this machine was killed by {name}, for lack of memory perhaps; "
                f"--resume continues from the last checkpoint"
            )
    text = messages[0][2] if messages else f"exit statuses by process: {failed}"
    return RuntimeError(f"a training process failed\n{text}")
