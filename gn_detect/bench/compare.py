"""Whole training steps with frozen BN, PyTorch's GN and the fused GN in turn, each in its own process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError

# Config overrides and environment of each variant; box and mask heads are the same.
VARIANTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "fused GN": ([], {}),
    "native GN": ([], {"GN_DETECT_FUSED": "0"}),
    "frozen BN": (["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", ""], {}),
}


@dataclass
class Step:
    """Figures of a variant in each round: median seconds of a step, and peak memory above the start, MB."""

    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        times = " ".join(f"{s:.4f}" for s in self.seconds)
        memory = " ".join(f"{m:.0f}" for m in self.megabytes)
        seconds, megabytes = statistics.median(self.seconds), statistics.median(self.megabytes)
        return f"{seconds:8.4f} s ({times}), {megabytes:6.0f} MB ({memory})"


def compare_steps(config: str, arguments: Sequence[str], rounds: int) -> Iterator[dict[str, Step]]:
    """Run ``bench train`` on every variant ``rounds`` times.

    Args:
        config: config file of the model with GN.
        arguments: further flags, then config overrides.
        rounds: number of runs of each variant.

    Yields:
        The same mapping after each run, with the variants that have figures.

    Raises:
        UserError: a run failed; its error is part of the text.
    """
    steps: dict[str, Step] = {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        for _ in range(rounds):
            for name, (keys, environment) in VARIANTS.items():
                command = [sys.executable, "-m", "gn_detect", "bench", "train", "--config-file", config]
                command += ["--output", str(report), *arguments, *keys]
                done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(
                        "process-failed", f"the training step with {name} failed:\n{done.stderr.strip()}"
                    )
                figures = json.loads(report.read_text())
                step = steps.setdefault(name, Step())
                step.seconds.append(statistics.median(figures["seconds"]))
                step.megabytes.append(figures["memory"] / 1e6)
                yield steps
