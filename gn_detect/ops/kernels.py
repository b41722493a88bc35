"""The devices that Triton's kernels run on."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs its kernels on the CPU, slowly
LEAST_CAPABILITY = (8, 0)  # the kernels are compiled and tested for Ampere and later


@lru_cache(maxsize=64)
def kernels_run_on(device: torch.device) -> bool:
    """Return whether Triton is installed and compiles for the device, or interprets on the CPU."""
    if device.type != "cuda":
        return INTERPRETED
    capable = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    return find_spec("triton") is not None and capable


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make the tensors' device the current one, on which Triton launches."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()
