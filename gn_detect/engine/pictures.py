"""Pictures at the end of a run: test images with ground truth and prediction, and curves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data import CocoDataset, prepare_image, read_image
from ..errors import UserError
from ..evaluation import detections_to_coco, read_truth
from ..modeling import detection_format
from ..modeling.mask_rcnn import MaskRCNN
from ..visualize import plot_curves, save_picture
from .drawing import Classes, draw_entries

if TYPE_CHECKING:
    from ..config import Config

THRESHOLD = 0.5
"""Least score of the detections in the pictures; ``gn-detect predict`` begins with it, too."""

logger = logging.getLogger(__name__)


def draw_test_images(
    cfg: Config,
    model: MaskRCNN,
    dataset: CocoDataset,
    folder: Path,
    show: Callable[[str, np.ndarray], None] | None = None,
) -> None:
    """``VIS.NUM_IMAGES`` images, evenly spread over a dataset, as ``<dataset>_<image id>.png``.

    Detections of at least :data:`THRESHOLD` stand beside the ground truth, coloured as in
    :func:`gn_detect.visualize.draw_comparison`.

    Args:
        cfg: whole config.
        model: on its device; it comes back in its mode and memory format.
        dataset: with ground truth.
        folder: created when missing.
        show: is also given each picture, (H, W, 3) uint8 RGB, with its name.
    """
    count = min(cfg.vis.num_images, len(dataset))
    if count == 0:
        return
    truth = read_truth(dataset.annotations_path, "segm" if cfg.model.mask_on else "bbox")
    classes = Classes(dataset.class_names, dataset.category_ids)
    training = model.training
    model.eval()
    with model.in_memory_format(detection_format(cfg)):
        for index in (i * len(dataset) // count for i in range(count)):
            record = dataset.images[index]
            size = record.height, record.width
            pixels = read_image(record.file_name, "RGB", size)
            found = model.detect([prepare_image(pixels, cfg)], [size], paste=False)[0]
            shown = found[: int((found.scores >= THRESHOLD).sum())]  # the best come first
            entries = detections_to_coco(shown, record.id, dataset.category_ids, size)
            picture = draw_entries(pixels, entries, classes, truth.objects[record.id])
            save_picture(folder / f"{dataset.name}_{record.id}.png", picture)
            if show is not None:
                show(f"{dataset.name}/{record.id}", picture)
    model.train(training)


def draw_curves(run: Path, picture: Path) -> None:
    """Losses, AP and learning rate of a run folder; a run without any yet gets no picture."""
    try:
        plot_curves(run / "metrics.jsonl", picture)
    except UserError as error:
        logger.warning("no curves: %s", error)
