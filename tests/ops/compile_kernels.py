"""Compile the Triton kernels for a GPU that need not be there, and print what came out as JSON lines.

    python tests/ops/compile_kernels.py ARCHITECTURE DTYPE ORDER [LAYER ...]

ARCHITECTURE is 80 or 90, DTYPE float32 or bfloat16, ORDER channels_first or channels_last. Each line: kernel,
layer, registers a thread, bytes spilt to memory, widest global load and store in bytes, warps, tile.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
INTEGERS = {"samples", "samples_per_program", "pixel_units", "splits", "split_tiles"}


class Recorder:
    """Stands in for a kernel and notes its calls."""

    def __init__(self, name: str, kernel: Any, calls: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]]):
        self.name, self.kernel, self.calls = name, kernel, calls

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.calls.append((self.name, self.kernel, args, kwargs))


def record(layer: Layer, dtype: torch.dtype, channels_last: bool) -> list[Any]:
    """The launches of one norm, forward and backward, on tensors without memory."""
    calls: list[Any] = []
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


def compile_call(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], architecture: int) -> Any:
    """Compile the kernel that Triton would compile at this call."""
    warps = kwargs.pop("num_warps")
    named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = named[name]
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
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


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


def main(architecture: int, dtype: torch.dtype, channels_last: bool, names: list[str]) -> None:
    seen = set()
    for name, layer in LAYERS.items():
        if names and name not in names:
            continue
        for kernel_name, kernel, args, kwargs in record(layer, dtype, channels_last):
            key = (
                kernel_name,
                tuple(a if not isinstance(a, torch.Tensor) else a.dtype for a in args),
                str(kwargs),
            )
            if key in seen:
                continue
            seen.add(key)
            compiled = compile_call(kernel, args, dict(kwargs), architecture)
            assert compiled.asm["cubin"].startswith(b"\x7fELF")
            ptx = compiled.asm["ptx"]
            registers, spilt = resources(ptx)
            line = {
                "kernel": kernel_name,
                "layer": name,
                "registers": registers,
                "spilt": spilt,
                "load": widest(ptx, "ld"),
                "store": widest(ptx, "st"),
                "warps": kwargs["num_warps"],
                "tile": [kwargs["BLOCK_GROUPS"], kwargs["BLOCK_DEPTH"], kwargs["BLOCK_PIXELS"]],
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3] == "channels_last", sys.argv[4:])
