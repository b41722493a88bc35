"""What a run runs on, for whoever reads its numbers later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

_PACKAGES = ("gn-detect", "torch", "torchvision", "numpy", "pillow", "pycocotools", "hotcoco", "triton")


def describe_environment(device: torch.device | str | None = None, processes: int = 1) -> dict[str, Any]:
    """Versions and hardware, as JSON.

    Args:
        device: that the model runs on.
        processes: of the run.
    """
    device = None if device is None else torch.device(device)
    described: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
    }
    if device is not None:
        described["device"] = str(device)
        described["processes"] = processes
    if device is not None and device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    return described


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Linux names the processor in a file alone."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
