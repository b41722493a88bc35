"""A batch on its way to an accelerator: one pinned buffer, one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        images: (N, 3, H, W), normalised and padded.
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
    images: Sequence[Tensor], others: Mapping[str, Tensor], device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Copy uint8 images (3, H, W) and other tensors from the host to ``device`` at once.

    The copy has its own stream. The host is ahead of the device, so the copy runs while the device works on
    the batch before.

    Returns:
        A buffer and the places of the images in it, see :func:`gn_detect.ops.normalize_images`; the others.
    """
    places = torch.empty(len(images), 3, dtype=torch.int64)
    tensors = {"places": places, **others}
    begin = sum(map(_room, tensors.values()))
    for place, image in zip(places, images, strict=True):
        place.copy_(torch.tensor([begin, *image.shape[1:]]))
        begin += _room(image)
    buffer = _copy([*tensors.values(), *images], device)
    found = dict(zip(tensors, _views(buffer, list(tensors.values())), strict=True))
    return buffer, found.pop("places"), found


def _copy(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return all tensors on ``device``, one after the other in a buffer of bytes."""
    buffer = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, tensor in zip(_views(buffer, tensors), tensors, strict=True):
        place.copy_(tensor)
    if device.type != "cuda":
        return buffer.to(device)
    present, own = torch.cuda.current_stream(device), _stream_of_copies(device)
    with torch.cuda.stream(own):
        copied = buffer.to(device, non_blocking=True)
    present.wait_stream(own)
    copied.record_stream(present)
    return copied


def _room(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes in the buffer."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a view into ``buffer`` for each tensor, of its type and shape."""
    begins = accumulate(map(_room, tensors), initial=0)
    return [
        buffer[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for begin, tensor in zip(begins, tensors, strict=False)
    ]


@lru_cache(maxsize=8)
def _stream_of_copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
