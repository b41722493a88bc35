"""A batch on its way to an accelerator: one pinned buffer, one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    if device.type != "cuda":
        copied = buffer.to(device)
    else:
        present, own = torch.cuda.current_stream(device), _stream_of_copies(device)
        with torch.cuda.stream(own):
            copied = buffer.to(device, non_blocking=True)
        present.wait_stream(own)
        copied.record_stream(present)
    return dict(zip(tensors, _views(copied, tensors, sizes), strict=True))


def _views(buffer: Tensor, tensors: dict[str, Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Return a view into ``buffer`` for each tensor, of its type and shape."""
    begins = accumulate(sizes, initial=0)
    return [
        buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for begin, tensor in zip(begins, tensors.values(), strict=False)
    ]


@lru_cache(maxsize=8)
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
