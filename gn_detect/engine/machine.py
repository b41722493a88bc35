"""What this machine offers to a training run."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..distributed.group import uses_cuda


@dataclass(frozen=True)
class Machine:
    """Attributes:
    on_gpu: whether the run uses GPUs.
    processes: of the whole run.
    memory: bytes for each process, of the GPU or of this machine; None where it cannot be told.
    cores: of the CPU, for each process on this machine.
    """

    on_gpu: bool
    processes: int
    memory: int | None
    cores: int

    def __str__(self) -> str:
        room = "" if self.memory is None else f", {self.memory / 2**30:.0f} GB"
        kind = "GPU" if self.on_gpu else "CPU"
        count = f"{self.processes} x " if self.processes > 1 else ""
        return f"{count}{kind}{room}" if self.on_gpu else f"{count}{kind} with {self.cores} cores{room}"


def find_machine(device: str, num_gpus: int, num_machines: int) -> Machine:
    """The machine of ``MODEL.DEVICE``, ``--num-gpus`` and ``--num-machines``, or of torchrun."""
    processes = int(os.environ.get("WORLD_SIZE", num_gpus * num_machines))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_gpus))
    cores = max(1, (os.cpu_count() or 1) // max(1, here))
    if uses_cuda(device) and torch.cuda.is_available():
        memory = int(torch.cuda.get_device_properties(0).total_memory)
        return Machine(True, processes, memory, cores)
    return Machine(False, processes, _main_memory(here), cores)


def _main_memory(processes: int) -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(1, processes)
    except (AttributeError, ValueError, OSError):  # not on every system
        return None
