"""Launches compiled kernels again without Triton's binding of arguments.

At every launch Triton looks at each argument's type and alignment to choose among what it has compiled, which
takes 10 to 40 us of the host. Here the caller's key says the types, and the alignment is looked at at once.
Hooks that wait for launches, as Triton's own profiler does, see the first one only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

ALIGNMENT = 16
"""Bytes by which every pointer must be divisible: so Triton compiled the kernel. Others it compiles apart."""

HAS_KNOWN_LAUNCHER = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 8)
"""Whether a compiled kernel takes the arguments that :func:`_bind` gives it, as seen in these versions of
Triton. With others every launch is left to it."""

Bound = Callable[[int, int, "list[int | None]", "tuple[float, ...]"], None]
"""What launches a compiled kernel: takes number of programs, stream, addresses of tensors, and numbers."""


@lru_cache(maxsize=4096)
def compiled_kernels(key: tuple[Any, ...]) -> dict[int, Bound]:
    """``id`` of a kernel -> how it is launched, for some types and constants; the launches fill it.

    Args:
        key: the device, the types of all tensors and which there are, and all constants.
    """
    return {}


@dataclass(frozen=True)
class Launch:
    """A grid and constants for kernels.

    Attributes:
        programs: in the grid.
        constants: name -> value, ``num_warps`` among them.
        compiled: by :func:`compiled_kernels`; None leaves every launch to Triton.
    """

    programs: int
    constants: dict[str, Any]
    compiled: dict[int, Bound] | None

    def __call__(self, kernel: Any, tensors: tuple[Any, ...], numbers: tuple[float, ...]) -> None:
        """Launch ``kernel`` on the current stream of the current device.

        Args:
            kernel: takes ``tensors``, ``numbers`` and the constants, in this order.
            tensors: of the current device, or None; the first is a tensor.
            numbers: of the same types in every launch of the kernel.
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
        if known is not None and HAS_KNOWN_LAUNCHER and isinstance(compiled, CompiledKernel):
            names = kernel.arg_names[len(tensors) + len(numbers) :]
            bound = _bind(compiled, tuple(self.constants[name] for name in names))
            known.setdefault(id(kernel), bound)


def _bind(compiled: CompiledKernel, constants: tuple[Any, ...]) -> Bound:
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(
        programs: int,
        stream: int,
        addresses: list[int | None],
        numbers: tuple[float, ...],
        kept: CompiledKernel = compiled,  # it takes its code from the GPU when it goes
    ) -> None:
        run(programs, 1, 1, stream, function, metadata, None, None, None, *addresses, *numbers, *constants)

    return launch
