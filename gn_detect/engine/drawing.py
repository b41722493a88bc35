"""Pictures from COCO entries, of detections, of test images at the end of a run, and its curves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor

from ..data import CocoDataset, prepare_test_image, read_image
from ..errors import UserError
from ..evaluation import detections_to_coco, match_objects, read_truth
from ..modeling import detection_format
from ..modeling.mask_rcnn import MaskRCNN
from ..progress import announced
from ..structures import Detections, Target
from ..visualize import Crop, crop_mask, draw_comparison, draw_detections, plot_curves, save_picture
from .tiled import in_tiles

if TYPE_CHECKING:
    from ..config import Config

Json = dict[str, Any]

THRESHOLD = 0.5  # lowest score in the pictures of test images; gn-detect predict has the same default

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Classes:
    """Names and ids of the categories by contiguous label; the id is None if the file has none."""

    names: Sequence[str]
    category_ids: Sequence[int | None]

    def labels(self, entries: Sequence[Json]) -> Tensor:
        """Return the (N,) int64 labels of COCO entries."""
        position = {category_id: label for label, category_id in enumerate(self.category_ids)}
        return torch.tensor([position[entry["category_id"]] for entry in entries], dtype=torch.int64)


def draw_entries(
    pixels: np.ndarray,
    detections: Sequence[Json],
    classes: Classes,
    objects: Sequence[Json] | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """Return a uint8 RGB picture of detections, next to the ground truth if there is one.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        detections: COCO results to show.
        classes: of all entries.
        objects: COCO annotations of the image, masks as RLE; None without ground truth.
        scale: see :func:`draw_detections`.
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
    """Return (N, 4) ``xyxy`` float32."""
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


class _Masks(Sequence[Crop | None]):
    """Masks of COCO entries, decoded on access; each is None unless every entry has one."""

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


def draw_test_images(
    cfg: Config,
    model: MaskRCNN,
    dataset: CocoDataset,
    folder: Path,
    show: Callable[[str, np.ndarray], None] | None = None,
) -> None:
    """Write ``VIS.NUM_IMAGES`` images, evenly spread over a dataset, as ``<dataset>_<image id>.png``.

    Detections of :data:`THRESHOLD` or more are compared with the ground truth, see
    :func:`gn_detect.visualize.draw_comparison`.

    Args:
        cfg: whole config.
        model: on its device; its mode and memory format are restored.
        dataset: with ground truth.
        folder: created if it is missing.
        show: called with the name and the (H, W, 3) uint8 RGB pixels of each picture.
    """
    count = min(cfg.vis.num_images, len(dataset))
    if count == 0:
        return
    truth = read_truth(dataset.annotations_path, "segm" if cfg.model.mask_on else "bbox")
    classes = Classes(dataset.class_names, dataset.category_ids)
    detector = in_tiles(model, cfg)
    training = model.training
    model.eval()
    with model.in_memory_format(detection_format(cfg)):
        chosen = [i * len(dataset) // count for i in range(count)]
        for index in announced(chosen, f"drawing pictures of {dataset.name}", "picture", logger):
            record = dataset.images[index]
            size = record.height, record.width
            pixels = read_image(record.file_name, "RGB", size)
            found = detector.detect([prepare_test_image(pixels, cfg)], [size], paste=False)[0]
            shown = found[: int((found.scores >= THRESHOLD).sum())]  # the best come first
            entries = detections_to_coco(shown, record.id, dataset.category_ids, size)
            picture = draw_entries(pixels, entries, classes, truth.objects[record.id])
            save_picture(folder / f"{dataset.name}_{record.id}.png", picture)
            if show is not None:
                show(f"{dataset.name}/{record.id}", picture)
    model.train(training)


def draw_curves(run: Path, picture: Path) -> None:
    """Draw losses, AP and learning rate of a run's folder; without any yet, log a warning."""
    logger.info("drawing the curves: %s", picture)
    try:
        plot_curves(run / "metrics.jsonl", picture)
    except UserError as error:
        logger.warning("no curves: %s", error)
