"""The kernels of every layer compile for GPUs that are not there, without spills, with wide accesses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="needs Triton, which PyTorch brings along on Linux")

from gn_detect.bench.norms import LAYERS

# Kernels that write a tensor of x's size.
WRITERS = {"forward_groups", "normalize", "backward_groups", "input_gradient"}
SPLIT = {"partial_statistics", "normalize", "partial_gradients", "input_gradient"}


def run_script(name: str, cache: Path, *arguments: str) -> list[str]:
    """Return the output of a script in this folder, from a process where Triton compiles."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_the_signature_of_a_launcher_decides_who_launches() -> None:
    """The installed Triton's is known. One of another shape, or that takes anything, is left to Triton."""
    from triton.backends.nvidia.driver import CudaLauncher

    from gn_detect.ops.group_norm_triton.binding import has_known_launcher

    assert has_known_launcher(SimpleNamespace(run=object.__new__(CudaLauncher)))
    for other in (lambda *arguments: None, lambda grid, stream, function, *arguments: None):
        assert not has_known_launcher(SimpleNamespace(run=other))


@pytest.mark.slow
def test_launches_bind_their_arguments(tmp_path: Path) -> None:
    """Also without weight, bias, residual or wanted gradients, whose pointers are None."""
    assert set(run_script("bind_kernels.py", tmp_path)) == WRITERS | SPLIT


@pytest.mark.slow
@pytest.mark.parametrize("order", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_kernels_compile(architecture: str, dtype: str, order: str, tmp_path: Path) -> None:
    lines = run_script("compile_kernels.py", tmp_path, architecture, dtype, order, "1", "2", "4", "8")
    kernels = [json.loads(line) for line in lines]
    assert {k["kernel"] for k in kernels} == WRITERS | SPLIT
    itemsize = 2 if dtype == "bfloat16" else 4
    for kernel in kernels:
        assert kernel["spilt"] == 0, kernel
        assert kernel["registers"] * kernel["warps"] * 32 <= 65536, kernel
        _, _, height, width = LAYERS[kernel["layer"]].shape
        if order == "channels_last" or height * width % (16 // itemsize) == 0:
            assert kernel["load"] == 16, kernel
            assert kernel["store"] == 16 or kernel["kernel"] not in WRITERS, kernel
        if kernel["kernel"] in SPLIT:
            # The copies have 4 bytes or more. Stages but one are copied before the loop.
            wide = order == "channels_last" or height * width * itemsize % 4 == 0
            assert kernel["copies"] >= 3 * wide, kernel
            assert architecture != "90" or efficiency(kernel) >= 0.8, kernel


def efficiency(kernel: dict[str, int]) -> float:
    """The share of a GPU of 132 multiprocessors in use, for kernels that take at least one wave."""
    registers = -(-kernel["registers"] // 8) * 8 * 32 * kernel["warps"]
    resident = min(65536 // registers, 64 // kernel["warps"], 228 * 1024 // (kernel["shared"] + 1024), 32)
    waves = kernel["programs"] / (132 * resident)
    return waves / math.ceil(waves) if waves >= 1 else 1
