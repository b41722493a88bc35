"""Predictors: from an image to its objects."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from ..data import prepare_test_image, read_image
from ..data.images import image_pixels
from ..distributed.group import resolve_device
from ..errors import UserError
from ..evaluation.model import Detector
from ..modeling import detection_format, make_model
from ..structures import Detections
from ..weights import COCO_IDS, Checkpoint, load_weights, read_checkpoint
from .augmented import AugmentedDetector
from .image_detections import ImageDetections
from .pretrained import as_pairs, read_pretrained
from .tiled import in_tiles

if TYPE_CHECKING:
    from ..config import Config

ImageSource = str | Path | Image.Image | np.ndarray | Tensor

_ACCEPTED = "a path, a PIL image, a uint8 array (H, W, 3) RGB or (H, W), or a uint8 tensor (3, H, W) RGB"


class ImagePredictor(ABC):
    """``predictor(image)`` returns the objects in an image.

    Attributes:
        cfg: config of the model.
        class_names: names indexed by label; ``class 0``, ``class 1``, ... if the names are not known.
        category_ids: ids of the training JSON, indexed by label.
        score_thresholds: the score with the best F1 on the test images of the training, indexed by label;
            empty if the weights do not hold them.
    """

    cfg: Config
    class_names: list[str]
    category_ids: list[int]
    score_thresholds: list[float]

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, image: ImageSource, tile: int | None = None, overlap: float | None = None
    ) -> ImageDetections: ...

    @overload
    def __call__(
        self, image: Sequence[ImageSource], tile: int | None = None, overlap: float | None = None
    ) -> list[ImageDetections]: ...

    def __call__(
        self,
        image: ImageSource | Sequence[ImageSource],
        tile: int | None = None,
        overlap: float | None = None,
    ) -> ImageDetections | list[ImageDetections]:
        """Return the objects in one image, or a list of results for a list of images.

        The images of a list go through the model one by one: no result depends on the others.

        Args:
            image: a path (the EXIF orientation is applied), a PIL image of any mode (its EXIF orientation
                too), a uint8 array (H, W, 3) or grey (H, W), or a uint8 tensor (3, H, W). Channels are RGB,
                whatever INPUT.FORMAT is; an array of OpenCV is BGR: pass ``array[:, :, ::-1]``.
            tile, overlap: in place of ``TEST.TILES.SIZE`` and ``TEST.TILES.OVERLAP``; 0 searches the whole
                image at once.

        Returns:
            Detections on the CPU, best first, in the pixels of the upright image, those that score more than
            MODEL.ROI_HEADS.SCORE_THRESH_TEST. From tiles their masks are :class:`RleMasks`.

        Raises:
            UserError: a file cannot be read, or an image does not fit the model.
            ValueError: the image is something else, or an array of another shape or type.
        """
        if isinstance(image, Sequence) and not isinstance(image, str):
            return [self(one, tile, overlap) for one in image]
        pixels = read_pixels(image)
        found = self._find(image, pixels, True, with_tiles(self.cfg, tile, overlap)).to("cpu")
        return ImageDetections(
            found.boxes,
            found.scores,
            found.labels,
            found.masks,
            image=pixels,
            class_names=self.class_names,
            category_ids=self.category_ids,
        )

    def find(self, image: ImageSource, paste: bool = False) -> Detections:
        """Return the objects in one image on the model's device.

        Args:
            image: see :meth:`__call__`, which also lists the errors.
            paste: make bitmaps of the masks; otherwise they are probabilities inside the boxes, which take
                as much memory for a large image as for a small one. From tiles they are RLE in any case.
        """
        return self._find(image, read_pixels(image), paste, self.cfg)

    def _find(self, image: ImageSource, pixels: np.ndarray, paste: bool, cfg: Config) -> Detections:
        try:
            prepared = prepare_test_image(pixels, cfg)
            return in_tiles(self._detector(), cfg).detect([prepared], [pixels.shape[:2]], paste)[0]
        except UserError as error:
            if isinstance(image, str | Path):
                raise UserError(error.code, f"{image}: {error}") from error
            raise

    @abstractmethod
    def _detector(self) -> Detector:
        """Return the detector of a whole image or of a tile."""


class Predictor(ImagePredictor):
    """Find objects as the evaluation does: same resizing, same thresholds, augmented with ``TEST.AUG``.

    Args:
        cfg: ``MODEL.WEIGHTS`` names the checkpoint; ``MODEL.ROI_HEADS.SCORE_THRESH_TEST`` is the least score.
        checkpoint: the content of ``MODEL.WEIGHTS``, if it has been read already.

    Attributes:
        model: in evaluation mode, on ``MODEL.DEVICE``.
        report: how the weights were loaded.

    Raises:
        UserError: there is no checkpoint, or it does not fit the config.
    """

    def __init__(self, cfg: Config, checkpoint: Checkpoint | None = None) -> None:
        if not cfg.model.weights:
            raise UserError(
                "no-weights",
                "nothing to predict with: MODEL.WEIGHTS is empty; add --weights model.pth, or the key",
            )
        self.cfg = cfg
        device = resolve_device(cfg.model.device)
        self.model = make_model(cfg)
        self.model.use_memory_format(detection_format(cfg))
        checkpoint = checkpoint or read_checkpoint(cfg.model.weights)
        self.report = load_weights(self.model, checkpoint, config=cfg)
        self.model.to(device).eval()
        count = self.model.num_classes
        names, ids = _coco_classes() if _is_for_coco(cfg) else (unnamed_classes(count), range(1, count + 1))
        self.class_names = _of_length(count, checkpoint.metadata.class_names) or list(names)
        self.category_ids = _of_length(count, checkpoint.metadata.category_ids) or list(ids)
        self.score_thresholds = _of_length(count, checkpoint.metadata.score_thresholds) or []

    @classmethod
    def from_pretrained(cls, source: str | Path, overrides: Mapping[str, Any] | None = None) -> Predictor:
        """Return the predictor of trained weights; no config is needed.

        Args:
            source: a run's folder (its best checkpoint), a checkpoint file, ``hf://USER/REPO``, ``zoo://NAME``
                or a name of the model zoo.
            overrides: config keys, such as ``{"MODEL.DEVICE": "cpu", "TEST.DETECTIONS_PER_IMAGE": 300}``.

        Raises:
            UserError: the weights cannot be read, no config is known for them, or a key is wrong.
        """
        return cls(*read_pretrained(source, as_pairs(overrides or {})))

    def _detector(self) -> Detector:
        return AugmentedDetector(self.model, self.cfg) if self.cfg.test.aug.enabled else self.model


def with_tiles(cfg: Config, tile: int | None, overlap: float | None) -> Config:
    """Return a config with other ``TEST.TILES``; None keeps a value.

    Raises:
        UserError: a value does not fit, or there is an overlap without tiles.
    """
    keys = {"TEST.TILES.SIZE": tile, "TEST.TILES.OVERLAP": overlap}
    given = {key: value for key, value in keys.items() if value is not None}
    cfg = cfg.replace(given) if given else cfg
    if overlap is not None and not cfg.test.tiles.size:
        raise UserError("lone-flag", f"an overlap ({overlap:g}) is of tiles; give their size, too: tile 800")
    return cfg


def unnamed_classes(count: int) -> list[str]:
    """Return names for classes whose own names are not known."""
    return [f"class {label}" for label in range(count)]


def read_pixels(image: ImageSource) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB pixels; see :meth:`ImagePredictor.__call__`."""
    if isinstance(image, str | Path):
        return read_image(image, "RGB")
    if isinstance(image, Image.Image):
        return image_pixels(image)
    if not isinstance(image, np.ndarray | Tensor):
        raise ValueError(f"image must be {_ACCEPTED}, not {type(image).__name__}")
    shape, pixels = tuple(image.shape), np.asarray(image.cpu() if isinstance(image, Tensor) else image)
    if isinstance(image, Tensor) and len(shape) == 3 and shape[0] == 3:
        pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    elif isinstance(image, np.ndarray) and len(shape) == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    elif isinstance(image, Tensor) or len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"image must be {_ACCEPTED}, not of shape {shape}")
    if pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"image must be {_ACCEPTED}, not {image.dtype} of shape {shape}")
    return pixels


def _is_for_coco(cfg: Config) -> bool:
    """Return whether a config is for COCO's 80 categories; published checkpoints do not name them."""
    sets = cfg.datasets.train
    return (
        cfg.model.roi_heads.num_classes == len(COCO_IDS)
        and len(sets) > 0
        and all(re.match(r"coco_20\d\d_", name) and name not in cfg.datasets.registered for name in sets)
    )


def _coco_classes() -> tuple[list[str], list[int]]:
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [names[i] for i in COCO_IDS], list(COCO_IDS)


def _of_length(count: int, values: list[Any]) -> list[Any] | None:
    return values if len(values) == count else None
