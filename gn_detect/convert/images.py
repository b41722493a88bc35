"""Draw batches of unlabelled images in a random order, and hold some out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import UserError

SMALLEST_CROP = 0.6  # side of the smallest random crop, as a fraction of the image's


class ImageStream:
    """Batches to train on, in a seeded random order without end, and the batches held out.

    Attributes:
        held_out: batches that are never trained on.
        content: all images, or all batches.
        identity: settings; two streams with the same ones and the same content give the same batches.
    """

    def __init__(
        self, images: Tensor | Iterable[Any], batch_size: int, held_out: float, augment: bool, seed: int
    ) -> None:
        if batch_size < 1 or not 0 < held_out < 1:
            raise UserError("bad-argument", "batch_size is at least 1, and held_out between 0 and 1")
        self._generator = torch.Generator().manual_seed(seed)
        self.content = items = _as_single_images(images)
        single = isinstance(items, Tensor)
        count = len(items)
        kept = max(1, round(count * held_out))
        if single:
            kept = max(kept, min(batch_size, count // 2))
        if count - kept < 1:
            raise UserError(
                "calibration-images",
                f"{count} images or batches are too few to calibrate and to check with; give more",
            )
        # The last ones, not spread: neighbours are often of one photo, near copies of each other.
        self._items, rest = items[: count - kept], items[count - kept :]
        self.held_out: list[Any] = list(rest.split(batch_size)) if isinstance(rest, Tensor) else list(rest)
        self._batch_size = min(batch_size, len(self._items)) if single else 1
        self._augments = augment and isinstance(items, Tensor) and items.dim() == 4
        self._order: list[int] = []
        shape = tuple(items.shape) if isinstance(items, Tensor) else None
        self.identity = (count, shape, batch_size, seed, augment)

    @property
    def batches(self) -> float:
        """Number of batches that all images to train on make."""
        return len(self._items) / self._batch_size

    @property
    def on_cpu(self) -> bool:
        """True for single images (N, C, H, W) in the memory of the CPU."""
        items = self._items
        return isinstance(items, Tensor) and items.dim() == 4 and items.device.type == "cpu"

    def next_batch(self) -> Any:
        """Return single images, stacked to (N, C, H, W) and augmented, or a batch as it is."""
        if len(self._order) < self._batch_size:
            self._order = torch.randperm(len(self._items), generator=self._generator).tolist()
        taken, self._order = self._order[: self._batch_size], self._order[self._batch_size :]
        if not isinstance(self._items, Tensor):
            return self._items[taken[0]]
        batch = self._items[taken]
        return _augmented(batch, self._generator) if self._augments else batch

    def some_batches(self, count: int) -> list[Any]:
        """Return about ``count`` images to train on, spread over all and unchanged, or as many batches."""
        chosen = range(0, len(self._items), max(1, len(self._items) // count))
        if isinstance(self._items, Tensor):
            return list(self._items[list(chosen)].split(self._batch_size))
        return [self._items[index] for index in chosen]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the order and of the random numbers."""
        return {"order": self._order, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self._order = list(state["order"])
        self._generator.set_state(state["generator"])


def random_window(photo: Image.Image, random: np.random.Generator) -> Image.Image:
    """Cut a window of 15% to 100% of the area, mirror every second one, and scale it to the photo's size.

    Smaller windows often show nothing but sky or wall; calibrated on them, models keep less on objects.
    """
    share, ratio = random.uniform(0.15, 1.0), float(np.exp(random.uniform(-0.3, 0.3)))
    wide = photo.width * min(1.0, (share * ratio) ** 0.5)
    high = photo.height * min(1.0, (share / ratio) ** 0.5)
    left, top = random.uniform(0, photo.width - wide), random.uniform(0, photo.height - high)
    box = (left, top, min(left + wide, photo.width), min(top + high, photo.height))
    window = photo.resize(photo.size, Image.Resampling.BILINEAR, box)
    return window.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else window


def digest(content: Any) -> str:
    """Return the SHA-256 of tensors, numbers and text in lists, tuples and mappings, else of the type."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            numbers = value.detach().cpu().contiguous().reshape(-1)
            found.update(numbers.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            add(list(value.items()))
        elif isinstance(value, (list, tuple)):
            found.update(f"{type(value).__name__} {len(value)}".encode())
            for item in value:
                add(item)
        elif isinstance(value, (str, int, float, bool, type(None))):
            found.update(repr(value).encode())
        else:
            found.update(type(value).__qualname__.encode())

    add(content)
    return found.hexdigest()


def _as_single_images(images: Tensor | Iterable[Any]) -> Tensor | list[Any]:
    if isinstance(images, Tensor):
        return images
    items = list(images)
    if not items or not all(isinstance(item, Tensor) and item.dim() == 3 for item in items):
        return items
    if len({item.shape for item in items}) > 1:
        raise UserError(
            "calibration-images",
            "the images differ in size; resize them to what the original expects, or give batches",
        )
    return torch.stack(items)


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image of (N, C, H, W) at random, and crop it to at least 60% of each side."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    wide = uniform(SMALLEST_CROP, 1.0)
    high = (wide * uniform(0.9, 1.0 / 0.9)).clamp(max=1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide * flip, high
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - wide), uniform(-1, 1) * (1 - high)
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
