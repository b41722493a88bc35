"""Compile the kernels around the norms for a GPU that need not be there, and print JSON lines.

    python tests/ops/compile_box_kernels.py ARCHITECTURE

Each line: kernel, types of its tensors, memory order, registers a thread, bytes spilt, warps, widest load and
store in bytes, whether products and sums are fused, and atomic operations.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from compile_kernels import TYPES, Call, Recorder, resources, widest

from gn_detect.ops import mask_targets_triton, matching_triton, nms_triton, normalize_triton, roi_align_triton

TYPES |= {torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1"}
STRIDES = [4, 8, 16, 32]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def record() -> list[Any]:
    """The launches of a step but for those of the norms, on tensors without memory."""
    calls: list[Any] = []
    for module, names in {
        nms_triton: ("compare_boxes", "settle"),
        matching_triton: ("find_objects", "compare_with_highest"),
        roi_align_triton: ("pool", "add_gradient"),
        mask_targets_triton: ("crop_roi",),
        normalize_triton: ("normalize",),
    }.items():
        for name in names:
            setattr(module, name, Recorder(name, getattr(module, name), calls))
    for count in (2000, 12000):
        nms_triton.keep_best(meta(10, count, 4), meta(10, count, dtype=torch.bool), 0.7)
    for room, count, keep_best in ((100, 268_569, True), (400, 2400, False)):
        objects = meta(2, room, 4), meta(2, room, dtype=torch.bool)
        matching_triton.match_boxes_padded(*objects, meta(1 if keep_best else 2, count, 4), keep_best)
    index = meta(512, dtype=torch.int64)
    mask_targets_triton.crop(meta(256, 800, 1344, dtype=torch.bool), index, meta(512, 4), 28)
    pixels, places = meta(6_400_000, dtype=torch.uint8), meta(2, 3, dtype=torch.int64)
    for last in (False, True):
        order = torch.channels_last if last else torch.contiguous_format
        batch = meta(2, 3, 800, 1344).contiguous(memory_format=order)
        normalize_triton.normalize_images(pixels, places, meta(3, 1, 1), meta(3, 1, 1), batch, last)
    for dtype in (torch.bfloat16, torch.float32):
        for side, last in ((7, False), (7, True), (14, False), (14, True)):
            shapes = [(800 // s, 1344 // s) for s in STRIDES]
            maps = [meta(2, 256, *shape, dtype=dtype) for shape in shapes]
            order = torch.channels_last if last else torch.contiguous_format
            maps = [m.contiguous(memory_format=order) for m in maps]
            boxes = meta(512, 4)
            pooled = roi_align_triton.forward(maps, boxes, index, index, STRIDES, side, 0, True, last)
            roi_align_triton.backward(pooled, boxes, index, index, 2, shapes, STRIDES, 0, True, last)
    return calls


def compile_call(call: Call, architecture: int) -> Any:
    """Compile the kernel that Triton would compile at this launch."""
    kernel, named = call.kernel, call.named
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": call.warps, "enable_fp_fusion": named.get("enable_fp_fusion", True)}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def main(architecture: int) -> None:
    for call in record():
        compiled = compile_call(call, architecture)
        assert compiled.asm["cubin"].startswith(b"\x7fELF")
        ptx = compiled.asm["ptx"]
        registers, spilt = resources(ptx)
        line = {
            "kernel": call.name,
            "types": sorted({TYPES[a.dtype] for a in call.named.values() if isinstance(a, torch.Tensor)}),
            "channels_last": call.named.get("CHANNELS_LAST"),
            "registers": registers,
            "spilt": spilt,
            "warps": call.warps,
            "load": widest(ptx, "ld"),
            "store": widest(ptx, "st"),
            "fused": "fma.rn" in ptx,
            "atomics": sorted(set(re.findall(r"\b(?:red|atom)\.[\w.:]+", ptx))),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
