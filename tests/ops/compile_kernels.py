"""Compile the Triton kernels for a GPU that need not be there, and print what came out as JSON lines.

    python tests/ops/compile_kernels.py ARCHITECTURE DTYPE ORDER [IMAGES ...]

ARCHITECTURE is 80 or 90, DTYPE float32 or bfloat16, ORDER channels_first or channels_last. Each line: kernel,
layer, images, registers a thread, bytes spilt to memory, bytes of shared memory, asynchronous copies, widest
global load and store in bytes, warps, programs, tile.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gn_detect.bench.norms import LAYERS, Layer
from gn_detect.ops.group_norm_triton import backward, forward, launch

KERNELS = {
    forward: ("forward_groups", "partial_statistics", "normalize"),
    backward: ("backward_groups", "partial_gradients", "input_gradient"),
}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int32: "i32"}
INTEGERS = {"samples", "samples_per_program", "runs", "pixel_units", "splits", "split_tiles"}


class Call(NamedTuple):
    """A launch.

    Attributes:
        name, kernel: the kernel.
        programs: size of the grid.
        named: argument -> value, constants among them.
        warps: of a program.
        maxnreg: most registers of a thread, or None.
    """

    name: str
    kernel: Any
    programs: int
    named: dict[str, Any]
    warps: int
    maxnreg: int | None

    @property
    def constants(self) -> tuple[Any, ...]:
        """All that decides what is compiled."""
        values = {k: v.dtype if isinstance(v, torch.Tensor) else v for k, v in self.named.items()}
        return (self.name, self.warps, *((k, v) for k, v in values.items() if k not in INTEGERS))


class Recorder:
    """Stands in for a kernel and notes its calls."""

    def __init__(self, name: str, kernel: Any, calls: list[Call]):
        self.name, self.kernel, self.calls = name, kernel, calls

    def __getitem__(self, grid: tuple[int]) -> Any:
        def call(*args: Any, **kwargs: Any) -> None:
            warps, maxnreg = kwargs.pop("num_warps"), kwargs.pop("maxnreg", None)
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.calls.append(Call(self.name, self.kernel, grid[0], named, warps, maxnreg))

        return call


def record(layer: Layer, dtype: torch.dtype, channels_last: bool) -> list[Call]:
    """The launches of one norm, forward and backward, on tensors without memory."""
    calls: list[Call] = []
    originals = [(m, n, getattr(m, n)) for m, names in KERNELS.items() for n in names]
    for module, name, kernel in originals:
        setattr(module, name, Recorder(name, kernel, calls))
    try:
        x = torch.empty(layer.shape, dtype=dtype, device="meta")
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        weight = torch.empty(layer.shape[1], device="meta")
        extra = x if layer.residual else None
        y, statistics = launch.forward(x, 32, weight, weight, 1e-5, extra, layer.relu, channels_last)
        y_saved = y if layer.residual and layer.relu else None
        needs = (True, layer.residual and layer.relu, True)
        launch.backward(y, x, y_saved, weight, weight, statistics, layer.relu, channels_last, needs)
    finally:
        for module, name, kernel in originals:
            setattr(module, name, kernel)
    return calls


def compile_call(call: Call, architecture: int) -> Any:
    """Compile the kernel that Triton would compile at this call."""
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(call.kernel.arg_names):
        value = call.named[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in INTEGERS:
            signature[name] = "i32"
        elif name == "eps":
            signature[name] = "fp64"
        else:
            signature[name] = "constexpr"
            constants[name] = value
    source = ASTSource(call.kernel, signature, constants, attributes)
    options = {"num_warps": call.warps, "maxnreg": call.maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(ptx: str) -> tuple[int, int]:
    """Registers a thread and bytes spilt, from ptxas -v."""
    ptxas = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        gpu = re.search(r"\.target (sm_\w+)", ptx)[1]  # type: ignore[index]
        command = [ptxas, "-v", f"--gpu-name={gpu}", source, "-o", Path(folder) / "kernel.cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilt = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    return int(re.search(r"Used (\d+) registers", text)[1]), spilt  # type: ignore[index]


def widest(ptx: str, instruction: str) -> int:
    """Bytes of the widest access of this kind, for one thread."""
    found = re.findall(rf"{instruction}\.global[\w:.]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max((int(v or 1) * int(bits) // 8 for v, bits in found), default=0)


def copies(ptx: str) -> list[int]:
    """Bytes of each asynchronous copy to shared memory."""
    found = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    return [int(size, 0) for size in found]


def main(architecture: int, dtype: torch.dtype, channels_last: bool, images: list[int]) -> None:
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, (name, layer) in itertools.product(images, LAYERS.items()):
        for call in record(layer.of_images(number), dtype, channels_last):
            if call.constants not in seen:
                compiled = compile_call(call, architecture)
                assert compiled.asm["cubin"].startswith(b"\x7fELF")
                ptx = compiled.asm["ptx"]
                registers, spilt = resources(ptx)
                seen[call.constants] = {
                    "registers": registers,
                    "spilt": spilt,
                    "shared": compiled.metadata.shared,
                    "copies": len(copies(ptx)),
                    "load": max([widest(ptx, "ld"), *copies(ptx)]),
                    "store": widest(ptx, "st"),
                }
            line = {
                "kernel": call.name,
                "layer": name,
                "images": number,
                **seen[call.constants],
                "warps": call.warps,
                "programs": call.programs,
                "tile": [call.named[f"BLOCK_{extent}"] for extent in ("GROUPS", "DEPTH", "PIXELS")],
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    order = sys.argv[3] == "channels_last"
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), order, [int(n) for n in sys.argv[4:] or [1]])
