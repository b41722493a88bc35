"""Start the processes of a run: here, on several machines, or under torchrun."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.rendezvous import rendezvous

from ..errors import UserError
from .group import PATIENCE, local_rank, restart_count, uses_cuda

SIOCGIFADDR = 0x8915  # Linux: request the IPv4 address of an interface, netdevice(7)

# Parts of the errors of gloo and NCCL when another process is gone.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # exit statuses after a signal

# A failure in one process makes the others fail too, at about the same time; their messages are waited for.
SETTLE_SECONDS = 2.0


def launch(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    *,
    device: str,
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> None:
    """Call ``function(*args)`` once in each process of the run; this machine starts ``num_gpus`` of them.

    Under torchrun, which sets environment variables, this process joins torchrun's group instead. A single
    process calls the function directly, without a group.

    Args:
        function: importable by name; its result is dropped.
        device: ``MODEL.DEVICE``; on a CPU the processes share it.
        num_gpus: processes on this machine.
        num_machines: machines that run this command.
        machine_rank: number of this machine, from 0.
        dist_url: ``tcp://host:port`` of machine 0; ``auto`` finds a port for a single machine.

    Raises:
        UserError: the flags do not fit together or the machine, or a process raised one or died.
        SystemExit: the processes stopped on request.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        with _process_group(device, "env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])):
            try:
                record(function)(*args)  # torchrun's summary shows the error, too
            except RuntimeError as error:
                if not any(words in str(error) for words in LOST_PEER):
                    raise
                # The message of the failed process has the cause.
                message = "another process of the run has failed; its own message names the cause"
                raise UserError("process-failed", message) from None
        return
    check_launch(device, num_gpus, num_machines, machine_rank, dist_url)
    if num_gpus * num_machines == 1:
        function(*args)
        return
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    arguments = (function, args, device, dist_url, num_gpus, machine_rank * num_gpus, num_gpus * num_machines)
    _start_processes(_join_and_call, arguments, num_gpus)


def check_launch(
    device: str, num_gpus: int, num_machines: int = 1, machine_rank: int = 0, dist_url: str = "auto"
) -> None:
    """Refuse numbers of processes and machines that :func:`launch`, which has these arguments, cannot start.

    Raises:
        UserError: the flags do not fit together or the machine.
    """
    if num_gpus < 1:
        raise UserError(
            "bad-argument",
            f"--num-gpus {num_gpus}: it must be at least 1; MODEL.DEVICE cpu after the command uses the CPU",
        )
    if num_machines < 1:
        raise UserError("bad-argument", f"--num-machines {num_machines}: it must be at least 1")
    if not 0 <= machine_rank < num_machines:
        raise UserError(
            "bad-argument",
            f"--machine-rank {machine_rank} must be from 0 to {num_machines - 1} (--num-machines)",
        )
    if num_machines > 1 and dist_url == "auto":
        raise UserError(
            "lone-flag", "--num-machines needs --dist-url tcp://HOST:PORT with the address of machine 0"
        )
    available = torch.cuda.device_count()
    if num_gpus > 1 and device != "cpu" and num_gpus > available:
        limit = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = "" if limit is None else f" (CUDA_VISIBLE_DEVICES is '{limit}')"
        found = f"{available or 'no'} GPU{'' if available == 1 else 's'}"
        fewer = f"ask for {available}" if available else "leave it out"
        raise UserError(
            "no-gpu",
            f"--num-gpus {num_gpus}, but PyTorch finds {found} on this machine{reason}; "
            f"{fewer}, or add MODEL.DEVICE cpu for {num_gpus} processes on the CPU",
        )


def _join_and_call(
    local_rank: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    device: str,
    dist_url: str,
    num_processes: int,
    first_rank: int,
    world_size: int,
) -> None:
    os.environ["LOCAL_RANK"] = str(local_rank)
    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    with _process_group(device, dist_url, first_rank + local_rank, world_size):
        function(*args)


@contextmanager
def _process_group(device: str, url: str, rank: int, world_size: int) -> Iterator[None]:
    on_gpu = uses_cuda(device)
    if on_gpu:
        torch.cuda.set_device(local_rank())
    interface = _interface_to(urlsplit(url).hostname or os.environ["MASTER_ADDR"])
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store, rank, world_size = next(rendezvous(url, rank, world_size))
    # torchrun's store outlives the workers that it restarts; without a prefix it holds dead addresses.
    store = dist.PrefixStore(f"restart_{restart_count()}", store)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: the other processes may be gone


def _interface_to(host: str) -> str | None:
    """Return the network interface on the way to machine 0, or None where it cannot be found.

    gloo's default is the address of this machine's name, often 127.0.0.1 or 127.0.1.1, which other machines
    cannot reach.
    """
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect((host, 1))  # sends nothing
        own = socket.inet_aton(probe.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                request = struct.pack("16s24x", name.encode())
                if fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24] == own:
                    return name
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_processes(function: Callable[..., None], args: Sequence[Any], count: int) -> None:
    """Call ``function(local_rank, *args)`` in ``count`` new processes and wait for all.

    SIGTERM and SIGINT are passed on to them. When one fails, the others, which would wait for it for ever,
    are killed.

    Raises:
        UserError: a process raised one, or was killed.
        RuntimeError: a process raised another error; its traceback is in the message.
        SystemExit: the processes stopped on request.
    """
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(function, rank, args, errors), name=f"rank {rank}")
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        with _passing_on(processes) as received:
            failed = _wait_for(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    stopped = [process.exitcode for process in processes if process.exitcode in STOPPED]
    raised: list[UserError] = []
    tracebacks: list[str] = []
    while not errors.empty():
        error = errors.get()
        (raised if isinstance(error, UserError) else tracebacks).append(error)
    if failed and raised:  # even on request: the checkpoint may have failed
        raise raised[0]
    if received or (stopped and not failed):
        raise SystemExit(128 + received[0] if received else stopped[0])
    for rank, code in failed.items():
        if code < 0:  # a death explains the other failures
            raise UserError(
                "process-killed",
                f"process {rank} of this machine was killed by {signal.Signals(-code).name}, for lack of "
                f"memory perhaps; --resume continues from the last checkpoint",
            )
    if failed:
        text = tracebacks[0] if tracebacks else f"exit statuses by process: {failed}"
        raise RuntimeError(f"a training process failed\n{text}")


def _run(function: Callable[..., None], rank: int, args: Sequence[Any], errors: Any) -> None:
    # After the death of the parent this process saves and leaves.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGINT)  # type: ignore[attr-defined]
    try:
        function(rank, *args)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except UserError as error:
        errors.put(error)  # before the others see this process leave
        raise SystemExit(2) from None
    except Exception:
        errors.put(traceback.format_exc())
        raise SystemExit(1) from None


@contextmanager
def _passing_on(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Pass SIGTERM and SIGINT of this process on to ``processes``, and note them in the yielded list."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for(processes: Sequence[BaseProcess]) -> dict[int, int]:
    """Wait until all have ended well or on request, or :data:`SETTLE_SECONDS` after the first failure.

    Returns:
        Exit codes of those that failed by then, by rank on this machine.
    """
    running = dict(enumerate(processes))
    failed: dict[int, int] = {}
    deadline = math.inf
    while running and time.monotonic() < deadline:
        wait([process.sentinel for process in running.values()], timeout=0.1 if failed else None)
        for rank, process in list(running.items()):
            code = process.exitcode
            if code is None:
                continue
            del running[rank]
            if code not in (0, *STOPPED):
                failed[rank] = code
                deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
    return failed
