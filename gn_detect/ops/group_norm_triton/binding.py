"""Launches compiled kernels again without Triton's binding of arguments.

At every launch Triton looks at the type and alignment of each argument to choose one of its compiled
kernels. This takes 10 to 40 us of the host. Here the caller's key holds the types, and one check covers all
alignments. Hooks that wait for launches, as in Triton's own profiler, see the first launch only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from triton.compiler import CompiledKernel
from triton.runtime import driver

# Bytes by which every pointer must be divisible. Triton compiles another kernel for others.
ALIGNMENT = 16

# Launches a compiled kernel: number of programs, stream, addresses of tensors, and numbers.
Bound = Callable[[int, int, "list[int | None]", "tuple[float, ...]"], None]

# Arguments of Triton's launcher before those of the kernel. Triton 3.7 and later name all of them, 3.3 to 3.6
# name the first five and take the others in the same order.
_GRID = ("gridX", "gridY", "gridZ", "stream", "function")
_METADATA = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")


@lru_cache(maxsize=4096)
def compiled_kernels(key: tuple[Any, ...]) -> dict[int, Bound]:
    """Return the mapping from ``id`` of a kernel to its launch; the launches fill it.

    Args:
        key: the device, the types of all tensors and which there are, and all constants.
    """
    return {}


@dataclass(frozen=True)
class Launch:
    """A grid and constants for kernels.

    Attributes:
        programs: size of the grid.
        constants: name -> value, ``num_warps`` among them.
        compiled: result of :func:`compiled_kernels`; None leaves every launch to Triton.
    """

    programs: int
    constants: dict[str, Any]
    compiled: dict[int, Bound] | None

    def __call__(self, kernel: Any, tensors: tuple[Any, ...], numbers: tuple[float, ...]) -> None:
        """Launch ``kernel`` on the current stream of the current device.

        Args:
            kernel: takes ``tensors``, ``numbers`` and the constants, in this order.
            tensors: tensors of the current device, or None; the first is a tensor.
            numbers: numbers of the same types in every launch of the kernel.
        """
        addresses: list[int | None] = []
        united = 0
        for tensor in tensors:
            address = None
            if tensor is not None:
                address = tensor.data_ptr()
                united |= address
            addresses.append(address)
        known = self.compiled if united % ALIGNMENT == 0 else None
        if known is not None and (bound := known.get(id(kernel))) is not None:
            stream = driver.active.get_current_stream(tensors[0].device.index)
            bound(self.programs, stream, addresses, numbers)
            return
        compiled = kernel[(self.programs,)](*tensors, *numbers, **self.constants)
        if known is not None and isinstance(compiled, CompiledKernel) and has_known_launcher(compiled):
            names = kernel.arg_names[len(tensors) + len(numbers) :]
            bound = _bind(compiled, tuple(self.constants[name] for name in names))
            known.setdefault(id(kernel), bound)


def has_known_launcher(compiled: CompiledKernel) -> bool:
    """Return whether the kernel's launcher takes the arguments that :func:`_bind` gives."""
    parameters = list(inspect.signature(compiled.run).parameters.values())
    names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    takes_more = len(parameters) == len(names) + 1 and parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL
    return takes_more and names in (_GRID, _GRID + _METADATA)


def _bind(compiled: CompiledKernel, constants: tuple[Any, ...]) -> Bound:
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(
        programs: int,
        stream: int,
        addresses: list[int | None],
        numbers: tuple[float, ...],
        kept: CompiledKernel = compiled,  # it takes its code from the GPU when it is deleted
    ) -> None:
        run(programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *numbers, *constants)

    return launch
