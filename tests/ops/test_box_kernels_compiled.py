"""The kernels for boxes compile for GPUs that are not there, without spills, with wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which PyTorch brings along on Linux")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_kernels_compile(architecture: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("compile_box_kernels.py")), architecture]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    names = {"compare_boxes", "settle", "find_objects", "compare_with_highest", "pool", "add_gradient"}
    names |= {"crop_roi", "normalize"}
    assert {k["kernel"] for k in kernels} == names
    for kernel in kernels:
        assert kernel["spilt"] == 0, kernel
        assert kernel["registers"] * kernel["warps"] * 32 <= 65536, kernel
        if kernel["kernel"] in ("compare_boxes", "find_objects", "compare_with_highest", "crop_roi"):
            assert not kernel["fused"], "torchvision rounds each product"
        if kernel["kernel"] == "normalize":
            assert kernel["store"] == 16, kernel
        elif kernel["channels_last"]:
            assert kernel["load"] == 16, kernel
        if kernel["kernel"] == "add_gradient":
            vector = ".v4" if kernel["channels_last"] and architecture == "90" else ""
            assert kernel["atomics"] == [f"atom.global.gpu.relaxed.add{vector}.f32"], kernel
    kept, _ = (k["atomics"] for k in kernels if k["kernel"] == "find_objects")
    assert kept == ["atom.global.gpu.relaxed.max.s32"]
