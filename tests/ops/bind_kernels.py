"""Launch every kernel up to the GPU that is not there: Triton binds the arguments, specialises and compiles.

    python tests/ops/bind_kernels.py

Prints the names of the kernels, one a line for each launch. A norm with another eps, as each of a converted
model may have, must not have its kernels compiled again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gn_detect.ops.group_norm_triton import backward, forward, launch  # noqa: E402

SHAPES = [
    ((1, 64, 200, 336), torch.channels_last),
    ((2, 256, 50, 84), torch.contiguous_format),
    ((40, 256, 7, 7), torch.channels_last),
    ((3, 32), torch.contiguous_format),
    ((1, 24, 33), torch.contiguous_format),
]
KERNELS = {
    forward: ("forward_groups", "partial_statistics", "normalize"),
    backward: ("backward_groups", "partial_gradients", "input_gradient"),
}


class Driver:
    """Of a GPU of compute capability 9.0."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class Bound:
    """Stands in for a kernel and does all of a launch but the launch."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.binaries: set[str] = set()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def bind(*args: Any, **kwargs: Any) -> None:
            binary = self.kernel.warmup(*args, grid=grid, **kwargs)
            assert binary.asm["ptx"]
            self.binaries.add(binary.hash)
            print(self.kernel.__name__)

        return bind


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    kernels = []
    for module, names in KERNELS.items():
        for name in names:
            kernels.append(Bound(getattr(module, name)))
            setattr(module, name, kernels[-1])
    for shape, order in SHAPES:
        last = order == torch.channels_last
        for dtype in (torch.bfloat16, torch.float64):
            x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=order)
            for weight, residual in ((torch.zeros(shape[1]), x), (None, None)):
                y, statistics = launch.forward(x, 8, weight, weight, 1e-5, residual, True, last)
                compiled = [len(kernel.binaries) for kernel in kernels]
                launch.forward(x, 8, weight, weight, 0.75, residual, True, last)
                assert compiled == [len(kernel.binaries) for kernel in kernels], "compiled again for an eps"
                saved, needs = (None, (True, False, False)) if residual is None else (y, (True, True, True))
                launch.backward(x, x, saved, weight, weight, statistics, True, last, needs)


if __name__ == "__main__":
    main()
