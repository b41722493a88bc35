"""Launch every kernel up to the GPU that is not there: Triton binds the arguments, specialises and compiles.

    python tests/ops/bind_kernels.py

Prints the names of the kernels, one a line for each launch. A norm with another eps, as each of a converted
model may have, must not have its kernels compiled again. And what ``binding`` launches by itself must be what
Triton launched the first time: the same binary with the same arguments.
"""

from __future__ import annotations

import gc
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


class Launcher:
    """Notes what would be launched."""

    launched: list[tuple[Any, ...]] = []

    def __init__(self, source: Any, metadata: Any):
        self.name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        # Behind the kernel's metadata: those of the launch, and hooks to be called before and after it.
        x, y, z, stream, function, metadata, _, _, _, *own = arguments
        self.launched.append((self.name, (x, y, z), stream, function, metadata, own))


class Utilities:
    """What Triton asks of a GPU before it launches; a kernel's module and function are the same number."""

    def __init__(self) -> None:
        self.loaded = 0
        self.unloaded: set[int] = set()

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        self.loaded += 1
        return self.loaded, self.loaded, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        self.unloaded.add(module)


class Driver:
    """Of a GPU of compute capability 9.0."""

    launcher_cls = Launcher
    utils = Utilities()

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


def check_bound_launches() -> None:
    """A second launch, past Triton, equals the first; Triton gets what is not aligned."""
    for shape, order in SHAPES[:3]:
        last = order == torch.channels_last
        x = torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=order)
        weight = torch.zeros(shape[1])
        shifted = torch.empty_strided(shape, x.stride(), dtype=x.dtype).set_(
            torch.zeros(x.numel() + 1, dtype=x.dtype).untyped_storage(), 1, shape, x.stride()
        )
        for residual in (x, None):
            calls = []
            for image in (x, x, shifted, x):
                Launcher.launched.clear()
                if len(calls) == 3:  # Triton forgets what it compiled; what is bound must stay
                    for module, names in KERNELS.items():
                        for name in names:
                            getattr(module, name).device_caches.clear()
                    gc.collect()
                y, statistics = launch.forward(image, 8, weight, None, 1e-5, residual, True, last)
                saved, needs = (None, (True, False, True)) if residual is None else (y, (True, True, True))
                launch.backward(x, image, saved, weight, None, statistics, True, last, needs)
                calls.append(list(Launcher.launched))
            by_triton, bound, unaligned, again = calls
            assert len(by_triton) == len(bound) == len(again) >= 2
            for one, two, other in zip(by_triton, bound, unaligned, strict=True):
                assert one[:5] == two[:5], "another grid, stream or binary"
                assert len(one[5]) == len(two[5])
                for theirs, ours in zip(one[5], two[5], strict=True):
                    if any(theirs is tensor for tensor in (x, weight)):
                        assert ours == theirs.data_ptr()
                    else:  # results have memory of their own every time
                        assert type(ours) is int if isinstance(theirs, torch.Tensor) else ours == theirs
                assert any(isinstance(a, torch.Tensor) for a in one[5]), "Triton did not launch the first"
                assert any(isinstance(a, torch.Tensor) for a in other[5]), "an unaligned tensor was bound"
            assert [c[:5] for c in again] == [c[:5] for c in bound]
            assert not {c[3] for c in again} & Driver.utils.unloaded, "launched after it left the GPU"


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    check_bound_launches()
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
