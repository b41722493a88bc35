"""Launch every kernel up to the GPU that is not there: Triton binds the arguments, specialises and compiles.

    python tests/ops/bind_kernels.py

Prints the names of the kernels, one a line for each launch. A norm with another eps, as each norm of a
converted model may have, must not have its kernels compiled again. A launch by ``binding`` must equal
Triton's first one: the same binary with the same arguments. A launcher of another signature is left to
Triton.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gn_detect.ops.group_norm_triton import backward, forward, launch
from gn_detect.ops.group_norm_triton.binding import compiled_kernels, has_known_launcher

SHAPES = [
    ((1, 64, 200, 336), torch.channels_last),
    ((2, 256, 50, 84), torch.contiguous_format),
    ((1, 256, 50, 84), torch.contiguous_format),  # whose sums over its one sample are those of all
    ((40, 256, 7, 7), torch.channels_last),
    ((3, 32), torch.contiguous_format),
    ((1, 24, 33), torch.contiguous_format),
]
KERNELS = {
    forward: ("forward_groups", "partial_statistics", "normalize"),
    backward: ("backward_groups", "partial_gradients", "input_gradient"),
}


class Launcher:
    """Notes the launches that it would do. Its signature is that of Triton 3.7 and later."""

    launched: list[tuple[Any, ...]] = []

    def __init__(self, source: Any, metadata: Any):
        self.name = metadata.name

    def __call__(
        self, gridX, gridY, gridZ, stream, function, kernel_metadata, launch_metadata, launch_enter_hook,
        launch_exit_hook, *args,
    ) -> None:  # fmt: skip
        self.launched.append((self.name, (gridX, gridY, gridZ), stream, function, kernel_metadata, args))


class OlderLauncher(Launcher):
    """Has the signature of Triton 3.3 to 3.6."""

    def __call__(self, gridX, gridY, gridZ, stream, function, *args) -> None:
        super().__call__(gridX, gridY, gridZ, stream, function, *args)


class OtherLauncher(Launcher):
    """Has a signature that nobody has seen yet."""

    def __call__(self, grid, stream, function, *args) -> None:
        raise AssertionError("called with the arguments of another launcher")


class UnknownLauncher(Launcher):
    """Takes anything, as that of Triton 3.2."""

    def __call__(self, *args) -> None:
        super().__call__(*args)


class Utilities:
    """Answers Triton's questions to a GPU; a kernel's module and function are the same number."""

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
    """Stands in for a GPU of compute capability 9.0."""

    launcher_cls: type[Launcher] = Launcher
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


def check_unknown_launcher() -> None:
    """Every launch is Triton's: its launcher gets tensors, not addresses."""
    x = torch.zeros(1, 8, 4, 4)
    Driver.launcher_cls = UnknownLauncher
    Launcher.launched.clear()
    for _ in range(2):
        launch.forward(x, 8, None, None, 1e-5, None, True, False)
    assert len(Launcher.launched) == 2
    assert all(call[5][0] is x for call in Launcher.launched)
    forget()


def check_signatures() -> None:
    launchers = (Launcher, OlderLauncher, OtherLauncher, UnknownLauncher)
    known = [
        has_known_launcher(SimpleNamespace(run=kind(None, SimpleNamespace(name="")))) for kind in launchers
    ]
    assert known == [True, True, False, False]


def forget() -> None:
    """Let Triton and the launches compile and bind anew."""
    for module, names in KERNELS.items():
        for name in names:
            getattr(module, name).device_caches.clear()
    for cache in (compiled_kernels, launch._recipe):
        cache.cache_clear()


def check_bound_launches(launcher: type[Launcher]) -> None:
    """A second launch, past Triton, equals the first; Triton gets what is not aligned."""
    Driver.launcher_cls = launcher
    forget()
    for shape, order in SHAPES[:4]:
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
    check_signatures()
    check_unknown_launcher()
    check_bound_launches(OlderLauncher)
    check_bound_launches(Launcher)
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
