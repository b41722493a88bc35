"""Kills a worker of torchrun's agent, which restarts all, and compares the end with an undisturbed run's.

``python -m tests.engine.elastic``; see ``--help``. Workers are forks of this process, as in the chaos test.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gn_detect.cli import main
from gn_detect.engine import trainer
from tests.engine.chaos import differences, metrics_of, start, wait_for
from tests.engine.tiny import make_dataset, write_config

KEYS = ["SOLVER.LOG_PERIOD", "1", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "8"]
PROCESSES = 2
STEPS = 5
"""A worker is killed in the last of so many steps."""


def work(config: Path, victim: int, keys: Sequence[str]) -> None:
    """A worker, restarted or not; one of them is killed in its first life."""
    os.dup2(os.open(config.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and int(os.environ["RANK"]) == victim:
        die_in_step()
    sys.exit(main(["train", "--config-file", str(config), *KEYS, *keys]))


def die_in_step() -> None:
    """SIGKILL for this process in the midst of training."""
    real, steps = trainer.train_step, iter(range(STEPS))

    def step(*args: Any) -> Any:
        if next(steps) == STEPS - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    trainer.train_step = step  # type: ignore[assignment]


def compare(folder: Path, victim: int, keys: Sequence[str]) -> tuple[list[int], list[str]]:
    """Train undisturbed and disturbed. Returns where workers resumed, and how the results differ."""
    train, val = make_dataset(folder / "train", 6, seed=1), make_dataset(folder / "val", 3, seed=2)
    folders = [folder / name for name in ("undisturbed", "disturbed")]
    for each in folders:
        each.mkdir()
        write_config(each, train, val)
    if any(wait_for(start(folders[0] / "tiny.yaml", folders[0], PROCESSES, [*KEYS, *keys]))):
        raise SystemExit((folders[0] / "output_0.txt").read_text()[-3000:])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=PROCESSES,
        rdzv_backend="static",  # torchrun's default
        rdzv_endpoint=address,
        rdzv_configs={"rank": 0, "timeout": 60},
        max_restarts=1,
        start_method="fork",
        monitor_interval=0.1,
    )
    elastic_launch(agent, work)(folders[1] / "tiny.yaml", victim, keys)
    log = (folders[1] / "run" / "log.txt").read_text().splitlines()
    resumed_at = [int(line.rsplit(" ", 1)[1]) for line in log if "resuming from" in line]
    finals = [torch.load(each / "run" / "model_final.pth", weights_only=True) for each in folders]
    for final in finals:
        del final["config"]  # names the folder
    found = differences(*finals)
    if metrics_of(folders[0]) != metrics_of(folders[1]):
        found.append("metrics.jsonl")
    return resumed_at, found


def run() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--victim", type=int, default=0, help="rank of the process that is killed")
    parser.add_argument("keys", nargs="*", metavar="KEY VALUE", help="config keys")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        resumed_at, found = compare(Path(folder), args.victim, args.keys)
    print(f"rank {args.victim} killed by SIGKILL; restarted at iterations {resumed_at}")
    print(
        "weights, optimiser and metrics.jsonl: " + (f"DIFFERENT {found}" if found else "equal, bit for bit")
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(run())
