"""Detections of single images, from a config whose ``MODEL.WEIGHTS`` is a trained checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from ..data import prepare_image, read_image
from ..distributed.group import resolve_device
from ..errors import UserError
from ..modeling import detection_format, make_model
from ..structures import Detections
from ..weights import COCO_IDS, load_weights, read_checkpoint

if TYPE_CHECKING:
    from ..config import Config


class Predictor:
    """``predictor(image)`` finds objects as the evaluation does: same resizing, same thresholds.

    Args:
        cfg: ``MODEL.WEIGHTS`` names the checkpoint; ``MODEL.ROI_HEADS.SCORE_THRESH_TEST`` is the least score.

    Attributes:
        model: in evaluation mode, on ``MODEL.DEVICE``.
        report: how the weights were loaded.
        class_names: by label; where the checkpoint does not tell them COCO's, if the config's training sets
            are COCO's, or ``class 0``, ``class 1``, ...
        category_ids: the ids in the training JSON; as ``class_names`` COCO's, or 1, 2, ...

    Raises:
        UserError: there is no checkpoint, or it does not fit the config.
    """

    def __init__(self, cfg: Config) -> None:
        if not cfg.model.weights:
            raise UserError(
                "nothing to predict with: MODEL.WEIGHTS is empty; add --weights path/to/model.pth, or the key"
            )
        self.cfg = cfg
        device = resolve_device(cfg.model.device)
        self.model = make_model(cfg)
        self.model.use_memory_format(detection_format(cfg))
        checkpoint = read_checkpoint(cfg.model.weights)
        self.report = load_weights(self.model, checkpoint, config=cfg)
        self.model.to(device).eval()
        count = self.model.num_classes
        told = checkpoint.metadata
        names, ids = _of_coco() if _is_of_coco(cfg) else ([], [])
        self.class_names: list[str] = (
            _of_length(count, checkpoint.class_names) or names or unnamed_classes(count)
        )
        self.category_ids: list[int] = (
            _of_length(count, told.get("category_ids")) or ids or list(range(1, count + 1))
        )

    def __call__(self, image: str | Path | np.ndarray) -> Detections:
        """Objects in one image.

        Args:
            image: a file, of which the EXIF orientation is applied, or (H, W, 3) uint8 RGB.

        Returns:
            on the CPU, best first, in the pixels of the image.

        Raises:
            UserError: the file cannot be read.
            ValueError: it is something else, or an array of another shape or type.
        """
        return self.find(image, paste=True).to("cpu")

    def find(self, image: str | Path | np.ndarray, paste: bool = False) -> Detections:
        """Objects in one image as by calling the predictor, on the model's device.

        Args:
            image: see :meth:`__call__`; errors, too.
            paste: make bitmaps of the masks; otherwise they are probabilities inside the boxes, which take
                as much for a large image as for a small one.
        """
        pixels = read_pixels(image)
        height, width = pixels.shape[:2]
        return self.model.detect([prepare_image(pixels, self.cfg)], [(height, width)], paste)[0]


def unnamed_classes(count: int) -> list[str]:
    """Return names for classes whose own names are not known."""
    return [f"class {label}" for label in range(count)]


def read_pixels(image: str | Path | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a file, or the array itself; errors as of :class:`Predictor`."""
    if not isinstance(image, (str, Path, np.ndarray)):
        raise ValueError(f"image must be a path or uint8 (H, W, 3) RGB in NumPy, not {type(image).__name__}")
    pixels = image if isinstance(image, np.ndarray) else read_image(image, "RGB")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"image must be uint8 (H, W, 3) RGB, not {pixels.dtype} {pixels.shape}")
    return pixels


def _is_of_coco(cfg: Config) -> bool:
    """Whether a config is for COCO's 80 categories, as published checkpoints are, which tell no names."""
    sets = cfg.datasets.train
    return (
        cfg.model.roi_heads.num_classes == len(COCO_IDS)
        and len(sets) > 0
        and all(re.match(r"coco_20\d\d_", name) and name not in cfg.datasets.registered for name in sets)
    )


def _of_coco() -> tuple[list[str], list[int]]:
    """Names and ids by label."""
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [names[i] for i in COCO_IDS], list(COCO_IDS)


def _of_length(count: int, values: Any) -> list[Any] | None:
    return values if isinstance(values, list) and len(values) == count else None
