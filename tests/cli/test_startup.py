"""A command imports what it needs: help, versions, keys and wrong arguments need no PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "torchvision", "numpy", "matplotlib", "pycocotools", "PIL", "scipy", "tqdm"}

RUN = """
import sys
from gn_detect.cli import main
try:
    main(sys.argv[1:])
finally:
    print("modules", *sys.modules, file=sys.stderr)
"""

# Command line -> most modules of the package that it may import.
LIMITS = {
    "--version": 9,
    "--help": 9,
    "": 9,
    "trian": 9,
    "train --help": 11,
    "train --lr 3": 11,
    "eval --weights": 12,
    "config explain SEED": 19,
    "config explain learning rate": 19,
    "train SOLVER.MAX_ITERS 3": 19,
    "train --config-file quick/demo.yaml SOLVER.MAX_ITERS 3": 19,
    "predict --conf 0.5 a": 12,
    "export --out a": 12,
    "doctor": 10,
    "bench norm --layer stm": 20,
    "zoo lst": 10,
    "plot": 10,
    "compare": 10,
    "report a b": 11,
    "replay": 10,
}


@pytest.mark.parametrize("command", LIMITS)
def test_modules_that_a_command_imports(command: str) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, *command.split()], capture_output=True, text=True)
    modules = done.stderr.rpartition("modules ")[2].split()
    assert HEAVY.isdisjoint(modules), HEAVY & set(modules)
    ours = [name for name in modules if name.partition(".")[0] == "gn_detect"]
    assert 0 < len(ours) <= LIMITS[command], ours
