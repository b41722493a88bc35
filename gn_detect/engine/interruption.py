"""SIGTERM and SIGINT: the step is finished and saved before the process leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from .distributed import is_distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)

ECHO_SECONDS = 1.0
"""A terminal and a launcher both pass one Ctrl-C on: what follows within this time is the same request."""


class Interruption:
    """Notes a request to stop, and tells all processes of a group at the same iteration.

    While the context is active, the first SIGTERM or SIGINT is only noted; a second one ends the process at
    once. Outside the main thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._since = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        # Processes compare notes on the CPU, so that no step waits for the GPU.
        self._group: Any = dist.new_group(backend="gloo") if is_distributed() else None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._since = number, now
        elif now - self._since > ECHO_SECONDS:
            os._exit(128 + number)

    def requested(self) -> int:
        """The signal that any process has received, in all of them; 0 if there was none."""
        if self._group is None:
            return self._signal
        number = torch.tensor(self._signal)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return int(number)
