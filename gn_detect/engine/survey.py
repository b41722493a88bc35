"""What a dataset is like, in the figures that decide about image size, anchors and schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.augmentation import shortest_edge_size
from ..data.coco.dataset import CocoDataset
from ..data.datasets import DatasetSource

NEAR = 0.5
"""IoU from which an anchor is near an object: the box head can move it there."""


@dataclass(frozen=True)
class Survey:
    """Figures of a training set.

    Attributes:
        name: of the dataset.
        class_names: by label.
        images: (I, 2) int64 height and width in pixels of the file.
        boxes: (A, 4) float64 ``xyxy`` in pixels of the file, crowds left out.
        image_of: (A,) int64 row of ``images`` of each box.
        has_masks: whether objects have masks.
        has_bitmaps: whether some of them are RLE and not polygons.
        most_objects: in one image.
    """

    name: str
    class_names: list[str]
    images: np.ndarray
    boxes: np.ndarray
    image_of: np.ndarray
    has_masks: bool
    has_bitmaps: bool
    most_objects: int

    @property
    def short_edge(self) -> int:
        """Median of the shorter sides, pixels."""
        return int(np.median(self.images.min(axis=1)))

    @property
    def elongation(self) -> float:
        """Longer side over shorter side, which 95% of the images stay below."""
        return float(np.quantile(self.images.max(axis=1) / self.images.min(axis=1), 0.95))

    def resized_boxes(self, length: int, max_size: int) -> np.ndarray:
        """(A, 4) ``xyxy`` after the resize of ``INPUT.MIN_SIZE_*`` and ``MAX_SIZE_*``."""
        new = np.array([shortest_edge_size(h, w, length, max_size) for h, w in self.images.tolist()])
        scale = (new / self.images)[self.image_of]  # of height, of width
        return self.boxes * scale[:, [1, 0, 1, 0]]


def survey(source: DatasetSource, masks: bool | None = None) -> Survey:
    """Read the annotations of a dataset and measure them; no image is opened.

    Args:
        source: where the files are.
        masks: read segmentations; by default those of a dataset in which some object has one.

    Raises:
        UserError: the annotations are not valid COCO, or an object lacks a mask where masks are read.
    """
    dataset = CocoDataset(source, masks=masks, quiet=True)  # the training logs what it reads
    counts, table = dataset.objects.counts(), dataset.objects.masks
    return Survey(
        dataset.name,
        list(dataset.class_names),
        dataset.images.sizes(),
        dataset.objects.boxes,
        np.repeat(np.arange(len(counts)), counts),
        table is not None,
        table is not None and len(table.rle) > 0,
        int(counts.max(initial=0)),
    )


def sizes_of(boxes: np.ndarray) -> np.ndarray:
    """(A,) square roots of the areas of (A, 4) ``xyxy`` boxes, in their unit."""
    sides: np.ndarray = boxes[:, 2:] - boxes[:, :2]
    return np.sqrt(sides.prod(axis=1))


def best_anchor_iou(
    boxes: np.ndarray,
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    strides: Sequence[int],
) -> np.ndarray:
    """The IoU of each box with the anchor that is nearest to it.

    With two boxes of given sides the overlap falls with the distance of the centres along each axis, so the
    best anchor of a shape stands at the nearest grid point.

    Args:
        boxes: (A, 4) ``xyxy`` in pixels of the network's input.
        sizes: square roots of areas, for each level.
        aspect_ratios: height / width, the same for all levels.
        strides: pixels between grid points, for each level.

    Returns:
        (A,) float64; anchors that stick out of the image count, too.
    """
    best = np.zeros(len(boxes))
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    for level, stride in zip(sizes, strides, strict=True):
        distance = np.abs(centres - np.rint(centres / stride) * stride)
        for size in level:
            for ratio in aspect_ratios:
                anchor = np.array([size / ratio**0.5, size * ratio**0.5])
                overlap = np.minimum(np.minimum(sides, anchor), (sides + anchor) / 2 - distance)
                common = overlap.clip(min=0).prod(axis=1)
                best = np.maximum(best, common / (sides.prod(axis=1) + anchor.prod() - common))
    return best


def anchor_recall(iou: np.ndarray) -> float:
    """The share of objects, from 0 to 1, with an anchor of an IoU of at least :data:`NEAR`."""
    return float((iou >= NEAR).mean()) if len(iou) else 0.0
