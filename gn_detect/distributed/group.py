"""Several processes that train together: starting them, talking between them, and configs scaled to them."""

from __future__ import annotations

import os
import socket
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from .launch import start_processes

if TYPE_CHECKING:
    from ..config import Config

T = TypeVar("T")

SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface (netdevice(7))."""

PATIENCE = timedelta(hours=2)
"""So long a process waits for another, which may evaluate alone, or have the larger images of a test set."""

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")
"""In the errors of gloo and NCCL when another process is gone."""


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

    Under torchrun, whose environment variables are recognised, this process joins its group instead. A single
    process runs here, without a group.

    Args:
        function: importable by name; its result is dropped.
        device: ``MODEL.DEVICE``; on a CPU the processes share it.
        num_gpus: processes on this machine.
        num_machines, machine_rank: how many machines there are, and which one this is, from 0.
        dist_url: ``tcp://host:port`` of machine 0; ``auto`` finds a port for a single machine.

    Raises:
        UserError: the flags do not fit together or the machine, or a process raised one or died.
        SystemExit: the processes were told to stop, and did so.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        with _process_group(device, "env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])):
            with lost_peer_help():
                record(function)(*args)  # what went wrong also goes into torchrun's summary
        return
    check_launch(device, num_gpus, num_machines, machine_rank, dist_url)
    world_size = num_gpus * num_machines
    if world_size == 1:
        function(*args)
        return
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    arguments = (function, args, device, dist_url, num_gpus, machine_rank * num_gpus, world_size)
    start_processes(_process, arguments, num_gpus)


def _process(
    local_rank: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    device: str,
    dist_url: str,
    num_processes: int,
    first_rank: int,
    world_size: int,
) -> None:
    """One of the processes that :func:`launch` starts."""
    os.environ["LOCAL_RANK"] = str(local_rank)
    torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    with _process_group(device, dist_url, first_rank + local_rank, world_size):
        function(*args)


@contextmanager
def lost_peer_help() -> Iterator[None]:
    """A process whose peer has failed says so in one line; the peer's message holds the cause.

    Raises:
        UserError: the connection to another process was lost.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in LOST_PEER):
            raise
        raise UserError("another process of the run has failed; its own message names the cause") from None


@contextmanager
def _process_group(device: str, url: str, rank: int, world_size: int) -> Iterator[None]:
    on_gpu = uses_cuda(device)
    if on_gpu:
        torch.cuda.set_device(local_rank())
    interface = _interface_to(urlsplit(url).hostname or os.environ["MASTER_ADDR"])
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store, rank, world_size = next(rendezvous(url, rank, world_size))
    # torchrun's own store outlives the workers that it restarts, and with it the addresses of the dead.
    store = dist.PrefixStore(f"restart_{restart_count()}", store)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: the other processes are not there to take part


def _interface_to(host: str) -> str | None:
    """The network interface on the way to machine 0; None where that cannot be told.

    Left to itself, gloo takes the address of this machine's name, on which other machines may find only
    themselves: it is often 127.0.0.1 or 127.0.1.1.
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


def check_launch(
    device: str, num_gpus: int, num_machines: int = 1, machine_rank: int = 0, dist_url: str = "auto"
) -> None:
    """Refuse numbers of processes and machines that :func:`launch` cannot start; arguments as there.

    Raises:
        UserError: the flags do not fit together or the machine.
    """
    if num_gpus < 1:
        raise UserError(
            f"--num-gpus {num_gpus}: it must be at least 1; MODEL.DEVICE cpu after the command uses the CPU"
        )
    if num_machines < 1:
        raise UserError(f"--num-machines {num_machines}: it must be at least 1")
    if not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--machine-rank {machine_rank} must be from 0 to {num_machines - 1} (--num-machines)"
        )
    if num_machines > 1 and dist_url == "auto":
        raise UserError("--num-machines needs --dist-url tcp://HOST:PORT with the address of machine 0")
    there = torch.cuda.device_count()
    if num_gpus > 1 and device != "cpu" and num_gpus > there:
        limit = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = "" if limit is None else f" (CUDA_VISIBLE_DEVICES is '{limit}')"
        found = f"{there or 'no'} GPU{'' if there == 1 else 's'}"
        fewer = f"ask for {there}" if there else "leave it out"
        raise UserError(
            f"--num-gpus {num_gpus}, but PyTorch finds {found} on this machine{reason}; "
            f"{fewer}, or add MODEL.DEVICE cpu for {num_gpus} processes on the CPU"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def restart_count() -> int:
    """How often torchrun has restarted the workers of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def uses_cuda(device: str) -> bool:
    """Whether ``MODEL.DEVICE`` means a GPU on this machine."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def resolve_device(cfg: Config) -> torch.device:
    """The device of this process.

    Raises:
        UserError: ``MODEL.DEVICE`` names a GPU that is not there.
    """
    name = cfg.model.device
    if not uses_cuda(name):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"MODEL.DEVICE is {name!r} but PyTorch finds no GPU; set it to cpu or auto")
    own = is_distributed() or name in ("auto", "cuda")
    device = torch.device("cuda", local_rank()) if own else torch.device(name)
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"MODEL.DEVICE is {name!r} but there are {torch.cuda.device_count()} GPUs; correct it"
        )
    return device


def is_distributed() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process among all, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """This process among those of this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_distributed() or "RANK" in os.environ else 0


def is_main() -> bool:
    """Whether this process writes files and log lines."""
    return get_rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of a tensor of one shape over all processes."""
    if not is_distributed():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def from_main(value: T) -> T:
    """The value of process 0, in all processes."""
    if not is_distributed():
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values)
    return values[0]


def by_main(function: Callable[[], T]) -> T:
    """Call ``function`` in process 0 alone; all get its value.

    Raises:
        UserError: of the function, in all processes.
    """
    if not is_distributed():
        return function()
    outcome: tuple[Any, str | None] = None, None
    if is_main():
        try:
            outcome = function(), None
        except UserError as error:
            outcome = None, str(error)
    value, failure = from_main(outcome)
    if failure is not None:
        raise UserError(failure)
    return value


def gather(value: T) -> list[T]:
    """The values of all processes, in all processes, in the order of ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def parallelize(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model so that its gradients are averaged over the processes; alone it stays as it is.

    Every loss touches its head even where a batch has no object, so all parameters take part in every step.
    """
    if not is_distributed():
        return model
    # The strides of sides of length 1 mean nothing, and PyTorch compares them all the same.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def share_buffers(model: nn.Module) -> None:
    """Give all processes the running statistics of process 0, those that its checkpoints hold."""
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def check_synchronised_norms(model: nn.Module, device: torch.device) -> None:
    """Refuse SyncBN where there is nothing to synchronise with.

    Raises:
        UserError: the model has SyncBN, and this is a single process or a CPU.
    """
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        if not is_distributed() or device.type != "cuda":
            raise UserError(
                "NORM SyncBN needs several GPU processes; start with --num-gpus 2 or more, or set NORM to GN"
            )


def scale_config(cfg: Config, world_size: int) -> Config:
    """A config for ``SOLVER.REFERENCE_WORLD_SIZE`` processes, for ``world_size`` of them.

    Images in each process stay as they are: the batch and the learning rate grow with the processes, the
    iterations, steps, warm-up and periods shrink (Goyal et al. 2017, arXiv 1706.02677). The rules, rounding
    included, are those of detectron2's ``auto_scale_workers``; a reference of 0 changes nothing.

    Raises:
        UserError: the batch cannot be divided by the reference.
    """
    solver, reference = cfg.solver, cfg.solver.reference_world_size
    if reference in (0, world_size):
        return cfg
    if solver.ims_per_batch % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {solver.ims_per_batch} is not divisible by SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}; correct one of them"
        )
    scale = world_size / reference
    return cfg.replace(
        {
            "SOLVER.IMS_PER_BATCH": round(solver.ims_per_batch * scale),
            "SOLVER.BASE_LR": solver.base_lr * scale,
            "SOLVER.MAX_ITER": round(solver.max_iter / scale),
            "SOLVER.WARMUP_ITERS": round(solver.warmup_iters / scale),
            "SOLVER.STEPS": [round(step / scale) for step in solver.steps],
            "SOLVER.CHECKPOINT_PERIOD": round(solver.checkpoint_period / scale),
            "TEST.EVAL_PERIOD": round(cfg.test.eval_period / scale),
            "SOLVER.REFERENCE_WORLD_SIZE": world_size,
        }
    )
