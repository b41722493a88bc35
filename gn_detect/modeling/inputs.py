"""A batch on its way to an accelerator: one pinned buffer, one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ..structures import Sample
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
    images: Sequence[Tensor], targets: PaddedTargets, device: torch.device
) -> tuple[Tensor, Tensor, PaddedTargets]:
    """Copy uint8 images (3, H, W) and targets from the host to ``device`` at once.

    The copy has its own stream. The host is ahead of the device, so the copy runs while the device works on
    the batch before.

    Returns:
        A buffer and the places of the images in it, see :func:`gn_detect.ops.normalize_images`; the targets.
    """
    places = torch.empty(len(images), 3, dtype=torch.int64)
    tensors = {"places": places, **targets.tensors()}
    begin = sum(map(_room, tensors.values()))
    for place, image in zip(places, images, strict=True):
        place.copy_(torch.tensor([begin, *image.shape[1:]]))
        begin += _room(image)
    buffer = _arrived(*_copy([*tensors.values(), *images], device))
    found = dict(zip(tensors, _views(buffer, list(tensors.values())), strict=True))
    return buffer, found["places"], targets.with_tensors(found)


def send_images(images: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return images on ``device``; to a GPU those of the host go in one pinned buffer, without a wait."""
    if device.type != "cuda" or any(image.device.type != "cpu" for image in images):
        return [image.to(device, non_blocking=True) for image in images]
    return _views(_arrived(*_copy(images, device)), images)


def send_ahead(batches: Iterable[list[Sample]], device: torch.device) -> Iterator[list[Sample]]:
    """Yield batches with their images on ``device``.

    A GPU gets the next batch while it computes on the one that was yielded. A CPU gets batches as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    sent: tuple[list[Sample], Tensor, torch.cuda.Event | None] | None = None
    for batch in batches:
        following = batch, *_copy([sample.image for sample in batch], device)
        if sent is not None:
            yield _with_images(*sent)
        sent = following
    if sent is not None:
        yield _with_images(*sent)


def _with_images(batch: list[Sample], buffer: Tensor, copied: torch.cuda.Event | None) -> list[Sample]:
    images = _views(_arrived(buffer, copied), [sample.image for sample in batch])
    return [replace(sample, image=image) for sample, image in zip(batch, images, strict=True)]


def _copy(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
    """Return all tensors on ``device``, one after the other in a buffer of bytes, for :func:`_arrived`.

    PyTorch keeps the pinned buffer until its copy has ended.
    """
    buffer = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for place, tensor in zip(_views(buffer, tensors), tensors, strict=True):
        place.copy_(tensor)
    if device.type != "cuda":
        return buffer.to(device), None
    own = _stream_of_copies(device)
    with torch.cuda.stream(own):
        return buffer.to(device, non_blocking=True), own.record_event()


def _arrived(buffer: Tensor, copied: torch.cuda.Event | None) -> Tensor:
    """Let the present stream, but not the host, wait for a buffer of :func:`_copy`, and return it."""
    if copied is not None:
        present = torch.cuda.current_stream(buffer.device)
        present.wait_event(copied)
        buffer.record_stream(present)  # its memory is that of another stream
    return buffer


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
