"""Kills a training run again and again, resumes it, and compares the end with that of an undisturbed run.

``python -m tests.engine.chaos`` kills a run of 60 iterations 20 times with SIGKILL; with ``--every-call`` a
short one at every place that touches its folder, once each; see ``--help``. Attempts are forks of this
process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gn_detect.cli import main
from gn_detect.engine import drawing, trainer
from gn_detect.files import atomic_write_text
from tests.engine.tiny import make_dataset, write_config

TIMINGS = {"time", "data_time", "images_per_second", "memory_mb"}
KEYS = ["SOLVER.LOG_PERIOD", "4", "SOLVER.CHECKPOINT_PERIOD", "3", "CHECKPOINT.KEEP", "2"]


@dataclass
class Outcome:
    """The history of the disturbed run."""

    kills: int = 0  # signals sent
    in_checkpoint: int = 0  # signals sent while a checkpoint was being written
    statuses: list[int] = field(default_factory=list)  # exit status of each attempt; negative for a signal
    steps: int = 0  # computed in all attempts together
    resumed_at: list[int] = field(default_factory=list)  # iterations


def start(
    config: Path, folder: Path, processes: int, keys: Sequence[str], prepare: Callable[[], None] | None = None
) -> list[int]:
    """Fork the processes of one attempt; their output goes to ``folder``.

    Args:
        config: file; the run goes to ``folder/run``, and is resumed if it has begun there.
        folder: of the outputs.
        processes: how many.
        keys: of the config.
        prepare: is called in the first process before it trains.
    """
    resume = ["--resume"] if (folder / "run" / "config.yaml").exists() else []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 70
        try:
            output = os.open(folder / f"output_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            drawing.plot_curves = lambda _, path: atomic_write_text(path, "")  # half of such a run's time
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            if rank == 0:
                count_steps(folder / "steps.txt")
                if prepare is not None:
                    prepare()
            status = main(["train", "--config-file", str(config), *resume, *KEYS, *keys])
        except SystemExit as error:
            status = int(error.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return children


def count_steps(path: Path) -> None:
    """Each training step of this process adds a line."""
    real: Callable[..., Any] = trainer.train_step

    def counted(*args: Any) -> Any:
        result = real(*args)
        with path.open("a") as file:
            file.write("step\n")
        return result

    trainer.train_step = counted  # type: ignore[assignment]


def wait_for(children: Sequence[int]) -> list[int]:
    """Exit statuses, as subprocess gives them."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def is_running(child: int) -> bool:
    """Return whether a child has not ended, without reaping it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def disturb(
    config: Path,
    folder: Path,
    processes: int,
    keys: Sequence[str],
    kills: int,
    number: int,
    seed: int,
    span: tuple[float, int],
) -> Outcome:
    """Attempts until one reaches the end, the first ``kills`` of them ended at a random moment.

    Args:
        number: the signal. SIGKILL goes to one random process first, the others follow.
        span: seconds within which an attempt is killed, or a number of steps: of three attempts one is killed
            after some steps, one after some time, and one as soon as a checkpoint is being written.
    """
    choose, outcome = random.Random(seed), Outcome()
    run = folder / "run"
    while True:
        children = start(config, folder, processes, keys)
        if outcome.kills < kills:
            moment = ("after steps", "after a time", "in a checkpoint")[outcome.kills % 3]
            begin, delay = time.monotonic(), choose.uniform(0, span[0])
            steps = count_of(folder / "steps.txt") + choose.randint(1, span[1])
            while is_running(children[0]):
                writing = moment == "in a checkpoint" and any(run.glob(".model_*.tmp"))
                stepped = moment == "after steps" and count_of(folder / "steps.txt") >= steps
                if writing or stepped or (moment == "after a time" and time.monotonic() - begin > delay):
                    outcome.kills += 1
                    outcome.in_checkpoint += writing
                    choose.shuffle(victims := list(children))
                    for victim in victims:
                        os.kill(victim, number)
                    break
                time.sleep(0.0005)
        statuses = wait_for(children)
        outcome.statuses.append(statuses[0])
        if set(statuses) == {0}:
            break
        if len(outcome.statuses) > 3 * kills + 3:
            raise SystemExit((folder / "output_0.txt").read_text()[-3000:])
    outcome.steps = len((folder / "steps.txt").read_text().splitlines())
    log = (folder / "output_0.txt").read_text().splitlines()
    outcome.resumed_at = [int(line.rsplit(" ", 1)[1]) for line in log if "resuming from" in line]
    return outcome


def count_of(path: Path) -> int:
    """Steps in a file that may not exist."""
    return path.stat().st_size // len("step\n") if path.exists() else 0


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl`` without times and memory."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Return the places where two nested checkpoints are not equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [name]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{name}: {sorted(one.keys() ^ other.keys())}"]
        return [d for key in one for d in differences(one[key], other[key], f"{name}/{key}")]
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differences(a, b, f"{name}/{i}")]
    return [] if one == other else [name]


def compare(
    folder: Path,
    *,
    iterations: int = 60,
    kills: int = 20,
    processes: int = 1,
    number: int = signal.SIGKILL,
    seed: int = 0,
    keys: Sequence[str] = (),
) -> tuple[Outcome, list[str]]:
    """Train undisturbed and disturbed. Returns what happened, and how the results differ."""
    train, val = make_dataset(folder / "train", 6, seed=1), make_dataset(folder / "val", 3, seed=2)
    keys = ["SOLVER.MAX_ITER", str(iterations), "TEST.EVAL_PERIOD", str(iterations // 3), *keys]
    runs, seconds = {}, 0.0
    for name in ("undisturbed", "disturbed"):
        runs[name] = folder / name
        runs[name].mkdir()
        write_config(runs[name], train, val)
    begin = time.monotonic()
    statuses = wait_for(start(runs["undisturbed"] / "tiny.yaml", runs["undisturbed"], processes, keys))
    if set(statuses) != {0}:
        raise SystemExit((runs["undisturbed"] / "output_0.txt").read_text()[-3000:])
    seconds = time.monotonic() - begin
    span = 4 * seconds / max(kills, 1), max(1, iterations // max(kills, 1))
    config = runs["disturbed"] / "tiny.yaml"
    outcome = disturb(config, runs["disturbed"], processes, keys, kills, number, seed, span)
    finals = [torch.load(f / "run" / "model_final.pth", weights_only=True) for f in runs.values()]
    for final in finals:
        del final["config"]  # names the folder
    found = differences(*finals)
    if metrics_of(runs["undisturbed"]) != metrics_of(runs["disturbed"]):
        found.append("metrics.jsonl")
    return outcome, found


def run() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="that train together, with gloo")
    parser.add_argument("--signal", default="SIGKILL", choices=["SIGKILL", "SIGTERM", "SIGINT"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--every-call", action="store_true", help="kill at each call that touches the folder, once each"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="with it: at each Nth alone")
    parser.add_argument("--first", type=int, default=1, metavar="N", help="with it: begin at the Nth")
    parser.add_argument("--twice", action="store_true", help="with it: kill the resumed run, too")
    parser.add_argument("keys", nargs="*", metavar="KEY VALUE", help="config keys")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.every_call:
        from tests.engine.every_call import kill_at_every_call

        return kill_at_every_call(args.processes, args.every, args.twice, args.first)
    with tempfile.TemporaryDirectory() as folder:
        outcome, found = compare(
            Path(folder),
            iterations=args.iterations,
            kills=args.kills,
            processes=args.processes,
            number=signal.Signals[args.signal],
            seed=args.seed,
            keys=args.keys,
        )
    print(f"{args.signal} {outcome.kills} times, {outcome.in_checkpoint} of them in a checkpoint")
    print(f"exit statuses: {outcome.statuses}")
    print(f"resumed at iterations: {outcome.resumed_at}")
    print(f"steps computed: {outcome.steps} for {args.iterations} iterations")
    print(
        "weights, optimiser and metrics.jsonl: " + (f"DIFFERENT {found}" if found else "equal, bit for bit")
    )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(run())
