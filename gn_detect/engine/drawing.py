"""One picture from COCO entries: all that drawing in another process, or from a result file, needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor

from ..evaluation import match_objects
from ..structures import Detections, Target
from ..visualize import Crop, crop_mask, draw_comparison, draw_detections

Json = dict[str, Any]


@dataclass(frozen=True)
class Classes:
    """Names and ids of the categories, by contiguous label; None for one without an id in the file."""

    names: Sequence[str]
    category_ids: Sequence[int | None]

    def labels(self, entries: Sequence[Json]) -> Tensor:
        """(N,) int64 labels of COCO entries."""
        position = {category_id: label for label, category_id in enumerate(self.category_ids)}
        return torch.tensor([position[entry["category_id"]] for entry in entries], dtype=torch.int64)


def draw_entries(
    pixels: np.ndarray,
    detections: Sequence[Json],
    classes: Classes,
    objects: Sequence[Json] | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Detections on an image, beside its ground truth if that is given.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        detections: COCO results of the image, those to show.
        classes: of all entries.
        objects: COCO annotations of the image, masks as RLE; None where there are none to compare with.
        scale: see :func:`draw_detections`.

    Returns:
        uint8 RGB.
    """
    boxes, labels = _boxes(detections), classes.labels(detections)
    scores = torch.tensor([entry["score"] for entry in detections])
    found = Detections(boxes, scores, labels)
    masks = _Masks(detections)
    if objects is None:
        return draw_detections(pixels, found, classes.names, 0.0, scale, masks)
    with_masks = all("segmentation" in entry for entry in [*objects, *detections])
    matched, _ = match_objects(objects, detections, "segm" if with_masks else "bbox")
    shown = [i for i, entry in enumerate(objects) if not entry.get("iscrowd", 0)]
    place = {index: number for number, index in enumerate(shown)}
    kept = [objects[i] for i in shown]
    target = Target(_boxes(kept), classes.labels(kept))
    partners = np.array([place.get(partner, partner) for partner in matched.tolist()], dtype=np.int64)
    both = _Masks(kept), masks
    return draw_comparison(pixels, target, found, classes.names, partners, scale, both)


def _boxes(entries: Sequence[Json]) -> Tensor:
    """(N, 4) ``xyxy`` float32."""
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


class _Masks(Sequence[Crop | None]):
    """Masks of COCO entries, decoded when they are asked for; None for each unless every entry has one."""

    def __init__(self, entries: Sequence[Json]) -> None:
        self._rles = [entry.get("segmentation") for entry in entries]
        self._known = all(rle is not None for rle in self._rles)

    def __len__(self) -> int:
        return len(self._rles)

    def __getitem__(self, index: Any) -> Any:
        rle = self._rles[index]  # raises IndexError at the end, which ends an iteration
        if not self._known:
            return None
        left, top, width, height = map(int, coco_mask.toBbox(rle))
        decoded = coco_mask.decode(rle)[top : top + height, left : left + width]
        return crop_mask(np.ascontiguousarray(decoded).view(bool), top, left)
