"""Work before and after the model, done beside it: in order, and in bounded memory.

``in_order(pool, draw, (model(image) for image in in_order(pool, read, paths)))`` is a whole pipeline: the
caller's thread runs the model, while others read what comes next and draw what came before.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from ..errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_IMAGES_PER_PROCESS = 16
"""A process takes seconds to start: it is worth it for so many images."""


def default_workers() -> int:
    """As many as there are cores beside the one that runs the model, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores - 1))


@contextmanager
def reading_threads(workers: int) -> Iterator[Executor | None]:
    """Threads that read files: decoders leave the interpreter to others; None for no workers."""
    if workers < 1:
        yield None
        return
    with _closing(ThreadPoolExecutor(workers, "read")) as pool:
        yield pool


@contextmanager
def drawing_processes(workers: int, pictures: int) -> Iterator[Executor | None]:
    """Processes that draw: that is Python's work, which threads would take from the model.

    Args:
        workers: at most so many; None comes for 0.
        pictures: how many there are to draw; for a few, one thread.
    """
    count = min(workers, pictures // _IMAGES_PER_PROCESS)
    if workers < 1:
        yield None
        return
    if count < 1:
        with _closing(ThreadPoolExecutor(1, "draw")) as thread:
            yield thread
        return
    # Not forked: the model's threads hold locks that would stay locked in a copy.
    with _closing(ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))) as pool:
        yield pool


@contextmanager
def _closing(pool: Executor) -> Iterator[Executor]:
    """What waits is not begun when an error, or Ctrl-C, ends the block."""
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(
    pool: Executor | None, function: Callable[[T], R], items: Iterable[T], ahead: int
) -> Iterator[R]:
    """``map`` in a pool, that never holds more than ``ahead`` items and results.

    Args:
        pool: None calls the function here.
        function: of one item; what it raises is raised here, in its turn.
        items: taken in this thread, each when there is room for it.
        ahead: items in work or finished but not yet taken; at least 1.

    Raises:
        UserError: a process of the pool was killed.
    """
    if pool is None:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= max(ahead, 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenExecutor as error:
        raise UserError(
            "a drawing process was killed, mostly for want of memory; use fewer with --workers 1, or 0"
        ) from error
    finally:
        for future in waiting:
            future.cancel()
