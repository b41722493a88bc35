"""The few records that travel between data, model and evaluation. They hold tensors and no logic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

_MOST_SHOWN = 8  # classes in a repr

PolygonMask = list[np.ndarray]
"""One object as polygons: each array is (2K,) float64, ``x0, y0, x1, y1, ...`` in absolute pixels."""


@dataclass
class Target:
    """Ground truth of one image, in the pixels of the network's input.

    Attributes:
        boxes: (N, 4) float32, ``xyxy``, absolute pixels.
        labels: (N,) int64, contiguous classes in ``[0, num_classes)``.
        masks: one entry for each object, either polygons or a bool (H, W) bitmap of the image's size;
            None when the dataset or the task has no masks.
    """

    boxes: Tensor
    labels: Tensor
    masks: list[PolygonMask | Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        """Boxes, labels and bitmaps on ``device``; polygons stay NumPy arrays."""
        masks = self.masks
        if masks is not None:
            masks = [m.to(device, non_blocking=non_blocking) if isinstance(m, Tensor) else m for m in masks]
        return Target(
            self.boxes.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            masks,
        )


@dataclass(frozen=True)
class RleMasks:
    """Masks of the objects in one image as COCO's compressed RLE, which take a hundredth of their bitmaps.

    ``masks[3]`` is one (H, W) bool bitmap, and iterating makes one after the other. A bool mask, a slice or
    positions choose masks.

    Attributes:
        counts: of each mask.
        size: (height, width) of the image in pixels.
    """

    counts: list[bytes]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            return torch.from_numpy(coco_mask.decode(self.rle(int(index)))).bool()
        rows = np.arange(len(self))[index.cpu().numpy() if isinstance(index, Tensor) else index]
        return RleMasks([self.counts[row] for row in rows.tolist()], self.size)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self)))

    def rle(self, row: int) -> dict[str, Any]:
        """Return a mask as pycocotools takes it."""
        return {"size": list(self.size), "counts": self.counts[row]}

    def to(self, device: torch.device | str) -> RleMasks:
        """Return the same masks: they are not on a device."""
        return self


@dataclass(repr=False)
class Detections:
    """Objects that a model found in one image, in the pixels of the original file.

    ``found[found.scores > 0.5]`` chooses objects by a bool mask, a slice, positions or one position.

    Attributes:
        boxes: (N, 4) float32, ``xyxy``, absolute pixels, inside the image.
        scores: (N,) float32 in [0, 1], descending.
        labels: (N,) int64, contiguous classes in ``[0, num_classes)``.
        masks: (N, H, W) bool of the image's size, or None for a model without masks; until they are pasted,
            (N, S, S) float32 probabilities inside the boxes; from a detection in tiles :class:`RleMasks`.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | RleMasks | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def bitmaps(self) -> Tensor | None:
        """Return the masks as (N, H, W) bool, a byte for each pixel and object; None without masks."""
        if not isinstance(self.masks, RleMasks):
            return self.masks
        return torch.stack([*self.masks]) if len(self.masks) else torch.zeros(0, *self.masks.size).bool()

    def __getitem__(self, index: Tensor | np.ndarray | slice | Sequence[int] | int) -> Self:
        if isinstance(index, int | np.integer):
            index = [int(index)]
        return self._with_each(lambda tensor: tensor[index])

    def __repr__(self) -> str:
        counts = torch.bincount(self.labels.cpu()).tolist() if len(self) else []
        parts = [f"{count} {self._name_of(label)}" for label, count in enumerate(counts) if count]
        shown = ", ".join(parts[:_MOST_SHOWN]) + (", ..." if len(parts) > _MOST_SHOWN else "")
        objects = f"{len(self)} object{'' if len(self) == 1 else 's'}"
        return f"{type(self).__name__}({objects}{': ' * bool(parts)}{shown})"

    def to(self, device: torch.device | str) -> Self:
        """Return the same detections on ``device``."""
        return self._with_each(lambda tensor: tensor.to(device))

    def _with_each(self, change: Callable[[Any], Any]) -> Self:
        masks = None if self.masks is None else change(self.masks)
        tensors = {"boxes": change(self.boxes), "scores": change(self.scores), "labels": change(self.labels)}
        return replace(self, **tensors, masks=masks)

    def _name_of(self, label: int) -> str:
        return f"of class {label}"


class Results(TypedDict, total=False):
    """AP on one test set, in percent: ``results["bbox"]["AP"]``, ``["AP50"]``, ``["AP-<category>"]``, ...

    ``segm`` is missing for a model without masks. A value that COCO does not define for the data is nan.
    ``boundary`` is there with ``TEST.BOUNDARY_AP``. ``diagnosis`` has, for boxes and masks, what
    :func:`gn_detect.evaluation.diagnose` returns. ``validation`` has the losses, with ``TEST.LOSS_IMAGES``.
    """

    bbox: dict[str, float]
    segm: dict[str, float]
    boundary: dict[str, float]
    diagnosis: dict[str, dict[str, Any]]
    validation: dict[str, float]


@dataclass
class Sample:
    """One image as the loader yields it; a batch is a list of these.

    Attributes:
        image: (3, H, W) uint8, channels in ``INPUT.FORMAT`` order, 0..255, not normalised.
        image_id: the annotation file's id; text where the file has text, and the sample is to be evaluated.
        file_name: path of the file that was read.
        original_size: (height, width) of the file in pixels, EXIF orientation applied; of a tile in training.
        target: ground truth at the size of ``image``; None at inference.
    """

    image: Tensor
    image_id: Any
    file_name: str
    original_size: tuple[int, int]
    target: Target | None = None
