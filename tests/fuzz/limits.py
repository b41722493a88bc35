"""Runs cases in a process of their own, whose processor time and memory are watched: none ends the others."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.fuzz.trial import PATIENCE, SECONDS, Tally

Case = Callable[[int, Tally], None]
"""Tries the case of a number."""

Preparation = Callable[[Path], Case]
"""Makes what the cases of a kind share, in an empty folder; a function of a module, as processes need."""

MOST_MEMORY = 2 << 30
"""Bytes of a case, with Python and PyTorch, which alone take about 0.4e9."""

_ROOM = 3 * MOST_MEMORY
"""Address space, far above the limit: whoever asks for more gets a MemoryError, and the machine survives."""


def run_cases(
    kind: str,
    prepare: Preparation,
    seeds: Sequence[int],
    seconds: int = SECONDS,
    most_memory: int = MOST_MEMORY,
) -> Tally:
    """Try cases in turn; a new process continues after one that ended the process.

    Args:
        seconds: of the processor, for a case; of several commands, each may take as many.
        most_memory: bytes of a case, with Python and PyTorch.
    """
    patience = (PATIENCE + 1) * seconds  # for code that no alarm interrupts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([prepare.__module__])
    total, left = Tally(), list(seeds)
    while left:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(kind, prepare, left, theirs, seconds, most_memory), daemon=True
        )
        process.start()
        theirs.close()
        try:
            while left:
                if not ours.poll(patience * (3 if len(left) == len(seeds) else 1)):
                    raise TimeoutError
                total.add(ours.recv())
                del left[0]
        except (EOFError, TimeoutError) as error:
            process.kill()
            process.join()
            label = f"{kind} {left[0]}"
            hangs = isinstance(error, TimeoutError)
            reason = f"no end after {patience} s" if hangs else f"the process died: {process.exitcode}"
            total.add(Tally(1, failures=[f"{label}: {reason}"], slow=[label] * hangs))
            del left[0]
        process.join()
    return total


def _work(
    kind: str,
    prepare: Preparation,
    seeds: Sequence[int],
    connection: Connection,
    seconds: int,
    most_memory: int,
) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.environ["TMPDIR"] = folder
        tempfile.tempdir = folder  # what a case leaves behind goes with the folder
        case = prepare(Path(folder) / "shared")
        _limit_memory()
        for seed in seeds:
            tally = Tally(seconds=seconds)
            _forget_peak()
            begin = _processor_time()
            case(seed, tally)
            label = f"{kind} {seed}"
            limit = seconds * max(1, tally.commands)
            if (spent := _processor_time() - begin) > limit and not tally.slow:
                tally.slow.append(f"{label} ({spent:.0f} s)")
            if (peak := _peak()) > most_memory:
                tally.large.append(f"{label} ({peak / 2**30:.1f} GB)")
            connection.send(tally)


def _processor_time() -> float:
    """Seconds of this process and of those that it started and awaited."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _limit_memory() -> None:
    """What is mapped already, such as libraries, and :data:`_ROOM`."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _forget_peak() -> None:
    """Linux measures the peak from here on."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """Bytes of memory, since the last :func:`_forget_peak` where the system can tell."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
