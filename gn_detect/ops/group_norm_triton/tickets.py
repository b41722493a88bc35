"""Counters of programs that have finished. The kernels find them at zero and leave them at zero."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor
from triton.runtime import driver

RESERVE = 2**21
"""Counters of a device, 8 MiB: for 140 captures of all norms of Mask R-CNN with 2 images."""

SHARED = 2**14
"""Counters of a stream."""


def tickets(count: int, device: torch.device) -> Tensor:
    """Return at least ``count`` zeros, in int32, that no other launch uses at the same time.

    A stream runs its launches one after the other, so they share. A CUDA graph may run on any stream, but
    not at the same time as itself, so each captured launch has its own for ever. Both come from memory that
    was zeroed before: to fill it would be one more launch a norm, in every replay. Only where it is used up
    or too small a launch gets new zeros. In a capture these are filled in each replay.
    """
    if device.type != "cuda":
        return _of_stream(device, 0) if count <= SHARED else _zeros(count, device)
    if torch.cuda.is_current_stream_capturing():
        found = [reserve.take(count) for reserve in _reserves(device)]
    else:
        found = [_of_stream(device, driver.active.get_current_stream(device.index))]
    fits = bool(found) and found[0].numel() >= count
    return found[0] if fits else _zeros(count, device)


class _Reserve:
    """Zeros that are handed out once."""

    def __init__(self, device: torch.device):
        # Another thread allocates: cudagraphs of torch.compile lend memory to this one and take it back.
        with ThreadPoolExecutor(1) as thread:
            self.left = thread.submit(_zeros, RESERVE, device).result()
        torch.cuda.default_stream(device).synchronize()
        self.lock = threading.Lock()

    def take(self, count: int) -> Tensor:
        """Return ``count`` zeros, or what is left; whole lines of the cache."""
        with self.lock:
            taken, self.left = self.left.tensor_split([-(-count // 32) * 32])
        return taken


@cache
def _reserves(device: torch.device) -> list[_Reserve]:
    """Return the reserve of a device once a launch outside of captures has made it: a capture must not."""
    return []


@cache
def _of_stream(device: torch.device, stream: int) -> Tensor:
    if device.type != "cuda":
        return _zeros(SHARED, device)
    reserves = _reserves(device)
    if not reserves:
        reserves.append(_Reserve(device))
    return reserves[0].take(SHARED)


def _zeros(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
