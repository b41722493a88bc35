"""SIGTERM and SIGINT: the step is finished and saved before the process leaves."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from ..distributed.group import PATIENCE, is_distributed
from ..evaluation import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# A terminal and a launcher both pass one Ctrl-C on; signals within this time are one request.
ECHO_SECONDS = 1.0

# Numbers of the Interruptions, equal in all processes of a group, which create theirs together.
_numbers = itertools.count()


class Interruption:
    """Note a request to stop, and share it with all processes of a group at the same iteration.

    While the context is active, the first SIGTERM or SIGINT is only noted, except within :meth:`at_once`; a
    second one ends the process at once. Outside the main thread, where Python allows no handlers, nothing is
    noted.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._at_once = False
        self._group: Any = None
        self._store: Any = None
        if is_distributed():
            # The signals are reduced on the CPU, so that no step waits for the GPU.
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
            # Others read the store at any time, while a reduction waits for all processes.
            self._store = dist.distributed_c10d._get_default_store()
        self._key, self._is_stored = f"gn_detect/stop/{next(_numbers)}", False

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._since = number, now
        elif now - self._since > ECHO_SECONDS:
            os._exit(128 + number)
        if self._at_once:
            self._at_once = False
            raise Interrupted

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the block, a long computation that may end anywhere, at once.

        Raises:
            Interrupted: a signal came, before or within.
        """
        if self._signal:
            raise Interrupted
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
        if self._signal:  # Python may have dropped the handler's exception
            raise Interrupted

    def seen(self) -> bool:
        """Return whether this process knows of a signal to any process, without waiting for the others."""
        if self._store is None:
            return bool(self._signal)
        if self._signal and not self._is_stored:
            self._store.set(self._key, str(self._signal))
            self._is_stored = True
        return bool(self._signal) or bool(self._store.check([self._key]))

    def requested(self) -> int:
        """Return the signal that any process has received, in all of them; 0 if there was none."""
        if self._group is None:
            return self._signal
        number = torch.tensor(self._signal)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return int(number)
