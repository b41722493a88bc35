"""The processes of one training: rank, device and collectives. A single process needs no group."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import UserError

T = TypeVar("T")

# A process waits this long for another, which may evaluate alone, or have the larger images of a test set.
PATIENCE = timedelta(hours=2)


def is_distributed() -> bool:
    """Return whether several processes work together."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return the number of this process among all, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """Return the number of this process among those of this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_distributed() or "RANK" in os.environ else 0


def is_main() -> bool:
    """Return whether this is process 0, which writes files and log lines."""
    return get_rank() == 0


def restart_count() -> int:
    """Return how often torchrun has restarted the workers of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def uses_cuda(device: str) -> bool:
    """Return whether ``MODEL.DEVICE`` means a GPU on this machine."""
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def resolve_device(name: str) -> torch.device:
    """Return the device of this process for ``MODEL.DEVICE``.

    Raises:
        UserError: it names a GPU that is not there.
    """
    if not uses_cuda(name):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("no-gpu", f"MODEL.DEVICE is {name!r} but PyTorch finds no GPU; set it to cpu or auto")
    own = is_distributed() or name in ("auto", "cuda")
    device = torch.device("cuda", local_rank()) if own else torch.device(name)
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            "no-gpu", f"MODEL.DEVICE is {name!r} but there are {torch.cuda.device_count()} GPUs; correct it"
        )
    return device


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()


def mean_over_processes(values: Tensor) -> Tensor:
    """Return the mean over all processes of a tensor that has the same shape in each."""
    if not is_distributed():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def from_main(value: T) -> T:
    """Return the value of process 0, in all processes."""
    if not is_distributed():
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values)
    return values[0]


def by_main(function: Callable[[], T]) -> T:
    """Call ``function`` in process 0 alone, and return its value in all processes.

    Raises:
        UserError: the function raised one; every process raises it.
    """
    if not is_distributed():
        return function()
    outcome: tuple[Any, UserError | None] = None, None
    if is_main():
        try:
            outcome = function(), None
        except UserError as error:
            outcome = None, error
    value, failure = from_main(outcome)
    if failure is not None:
        raise failure
    return value


def gather(value: T) -> list[T]:
    """Return the values of all processes by rank, in all processes."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def parallelize(model: nn.Module) -> nn.Module:
    """Wrap a model so that its gradients are averaged over the processes; return it as it is in a single one.

    Each loss uses its head also without an object in the batch, so every parameter takes part in every step.
    The wrapper passes its inputs on as they are: the model brings them to its device in one buffer.
    """
    if not is_distributed():
        return model
    # PyTorch compares the strides of dimensions of length 1, which mean nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # With device_ids its forward would copy image by image, and the host would wait for each copy.
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over the processes in place, where no wrapper of :func:`parallelize` does it."""
    if not is_distributed():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(world_size())
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    shaped = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
    torch._foreach_copy_(gradients, shaped)


def share(tensors: Iterable[Tensor]) -> None:
    """Copy tensors of process 0, such as running statistics, to all processes."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def check_synchronised_norms(model: nn.Module, device: torch.device) -> None:
    """Refuse SyncBN in a single process or on a CPU, where there is nothing to synchronise with."""
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        if not is_distributed() or device.type != "cuda":
            raise UserError(
                "conflicting-keys",
                "NORM SyncBN needs several GPU processes; start with --num-gpus 2 or more, or set NORM to GN",
            )
