"""A batch on its way to an accelerator: one pinned buffer, one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .static import PaddedTargets

ALIGNMENT = 16  # bytes, of each tensor in the buffer


@dataclass
class Inputs:
    """A batch on the model's device.

    Attributes:
        images: (N, 3, H, W) float32, normalised and padded.
        targets: ground truth with fixed shapes.
    """

    images: Tensor
    targets: PaddedTargets

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {"images": self.images, **self.targets.tensors()}

    def with_tensors(self, tensors: dict[str, Tensor]) -> Inputs:
        """Return the same record with the tensors of :meth:`tensors` replaced."""
        return Inputs(tensors["images"], self.targets.with_tensors(tensors))


def send(
    images: Sequence[Tensor], targets: PaddedTargets, device: torch.device
) -> tuple[list[Tensor], PaddedTargets]:
    """Copy images (3, H, W) and targets to ``device`` at once.

    The copy has its own stream. The host is ahead of the device, so the copy runs while the device works on
    the batch before.
    """
    hosted = {f"image {n}": image for n, image in enumerate(images) if image.device.type == "cpu"}
    found = _copy(hosted | targets.tensors(), device)
    return [found.get(f"image {n}", image) for n, image in enumerate(images)], targets.with_tensors(found)


def _copy(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, tensor in zip(_views(buffer, tensors, sizes), tensors.values(), strict=True):
        place.copy_(tensor)
    with _own_stream(device) as stream:
        copied = buffer.to(device, non_blocking=True)
    if stream is not None:
        torch.cuda.current_stream(device).wait_stream(stream)
        copied.record_stream(torch.cuda.current_stream(device))
    return dict(zip(tensors, _views(copied, tensors, sizes), strict=True))


def _views(buffer: Tensor, tensors: dict[str, Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Return a view into ``buffer`` for each tensor, of its type and shape."""
    begins = accumulate(sizes, initial=0)
    return [
        buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for begin, tensor in zip(begins, tensors.values(), strict=False)
    ]


@contextmanager
def _own_stream(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Let copies inside the block run at the same time as computations."""
    if device.type != "cuda":
        yield None
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield stream
