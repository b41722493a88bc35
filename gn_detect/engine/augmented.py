"""Test-time augmentation: detect in several sizes of an image and their mirror images, and merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..data.augmentation import shortest_edge_size
from ..data.transforms import resize_pixels
from ..modeling.mask_rcnn import MaskRCNN, image_size, rescale
from ..ops import clip_boxes, nms_by_group, scale_boxes
from ..structures import Detections

if TYPE_CHECKING:
    from ..config import Config

Size = tuple[int, int]  # height and width, pixels

BATCH = 3  # images that go through the network together; they are padded to one size, as in detectron2
LEAST_SCORE = 1e-8  # of a detection that is merged; detectron2's


@dataclass(frozen=True)
class View:
    """One way to look at an image: scaled, perhaps twice, and perhaps mirrored.

    Attributes:
        sizes: of the image file, of the given image and of this view.
        mirrored: left and right are exchanged.
    """

    sizes: tuple[Size, Size, Size]
    mirrored: bool

    def of_pixels(self, pixels: np.ndarray) -> Tensor:
        """Return the view (3, h, w) of the given image (H, W, 3) uint8."""
        resized = torch.from_numpy(np.array(resize_pixels(pixels, *self.sizes[-1])))
        return (resized.flip(1) if self.mirrored else resized).permute(2, 0, 1)

    def from_file(self, boxes: Tensor) -> Tensor:
        """Map boxes (N, 4) from pixels of the file to those of the view, in detectron2's order."""
        for (height, width), (new_height, new_width) in pairwise(self.sizes):
            boxes = scale_boxes(boxes, new_width / width, new_height / height)
        return self._mirror(boxes)

    def to_file(self, boxes: Tensor) -> Tensor:
        """Undo :meth:`from_file`."""
        boxes = self._mirror(boxes)
        for (height, width), (new_height, new_width) in pairwise(self.sizes[::-1]):
            boxes = scale_boxes(boxes, new_width / width, new_height / height)
        return boxes

    def _mirror(self, boxes: Tensor) -> Tensor:
        if not self.mirrored:
            return boxes
        x0, y0, x1, y1 = boxes.unbind(dim=1)
        width = self.sizes[-1][1]
        return torch.stack([width - x1, y0, width - x0, y1], dim=1)


class AugmentedDetector:
    """Detect objects in the views of ``TEST.AUG``, as detectron2's ``GeneralizedRCNNWithTTA``.

    The boxes of all views go through one more NMS. Then each view predicts the masks of the boxes that are
    left, and their probabilities are averaged. All views are made from the image that the network gets
    without augmentation, of the size of ``INPUT.MIN_SIZE_TEST``.

    Args:
        model: in evaluation mode when it is used.
        cfg: whole config.
    """

    def __init__(self, model: MaskRCNN, cfg: Config) -> None:
        self.model, self.aug = model, cfg.test.aug
        self.limit = cfg.test.detections_per_image

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Tensor],
        original_sizes: Sequence[Size] | None = None,
        paste: bool = True,
    ) -> list[Detections]:
        """Return the best ``TEST.DETECTIONS_PER_IMAGE`` detections of each image, one after the other.

        Args: see :meth:`MaskRCNN.detect`; images are uint8.
        """
        sizes = [image_size(image) for image in images] if original_sizes is None else original_sizes
        return [self._detect_one(image, size, paste) for image, size in zip(images, sizes, strict=True)]

    def views(self, original: Size, size: Size) -> list[View]:
        """Return the views of an image of ``size``, made from a file of size ``original``."""
        mirrored = (False, True) if self.aug.flip else (False,)
        lengths = [shortest_edge_size(*size, length, self.aug.max_size) for length in self.aug.min_sizes]
        return [View((original, size, new), flip) for new in lengths for flip in mirrored]

    def _detect_one(self, image: Tensor, original: Size, paste: bool) -> Detections:
        pixels = image.permute(1, 2, 0).cpu().numpy()
        views = self.views(original, image_size(image))
        found: list[Detections] = []
        for part, batch in _batches(pixels, views):
            for view, seen in zip(part, self.model.find(batch, masks=False), strict=True):
                found.append(Detections(view.to_file(seen.boxes), seen.scores, seen.labels))
        merged = self._merge(found, original)
        if self.model.has_masks:
            masks: list[Tensor] = []
            for part, batch in _batches(pixels, views):
                boxes = [view.from_file(merged.boxes) for view in part]
                seen_masks = self.model.segment(batch, boxes, [merged.labels] * len(part))
                for view, mask in zip(part, seen_masks, strict=True):
                    masks.append(mask.flip(2) if view.mirrored else mask)
            merged.masks = torch.stack(masks).mean(dim=0)
        return rescale(merged, original, original, paste)

    def _merge(self, found: Sequence[Detections], size: Size) -> Detections:
        """Return the best detections of all views, in pixels of the file of ``size``."""
        boxes = torch.cat([each.boxes for each in found])
        scores = torch.cat([each.scores for each in found])
        labels = torch.cat([each.labels for each in found])
        kept = (boxes.isfinite().all(dim=1) & (scores > LEAST_SCORE)).nonzero()[:, 0]
        boxes, scores, labels = clip_boxes(boxes[kept], size), scores[kept], labels[kept]
        heads = self.model.roi_heads.settings
        best = nms_by_group(boxes, scores, labels, heads.num_classes, heads.nms_thresh_test, self.limit)
        return Detections(boxes[best], scores[best], labels[best])


def _batches(pixels: np.ndarray, views: Sequence[View]) -> Iterator[tuple[list[View], list[Tensor]]]:
    """Yield the views and their images, some at a time: all would take hundreds of MB."""
    for begin in range(0, len(views), BATCH):
        part = list(views[begin : begin + BATCH])
        yield part, [view.of_pixels(pixels) for view in part]
