"""Detections that know their image and the names of their classes: to save, show and pass on."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..evaluation import detections_to_coco
from ..structures import Detections
from ..text import printable
from ..visualize import draw_detections, save_picture


@dataclass(repr=False)
class ImageDetections(Detections):
    """Objects in one image, as a predictor returns them.

    The methods take every object that is there: ``found[found.scores > 0.5].save("out.jpg")`` chooses first.

    Attributes:
        image: (H, W, 3) uint8 RGB pixels that were searched; an array of the caller's is not copied.
        class_names: by label.
        category_ids: by label, in the annotation file that the model was trained on.
    """

    image: np.ndarray = field(kw_only=True)
    class_names: Sequence[str] = field(kw_only=True)
    category_ids: Sequence[int] = field(kw_only=True)

    def plot(self) -> Image.Image:
        """Return the image with masks, boxes, names and scores drawn; a notebook shows it."""
        return Image.fromarray(self._drawn())

    def save(self, path: str | Path) -> None:
        """Write the picture of :meth:`plot` as .png, .jpg or .webp.

        Raises:
            UserError: the file has another suffix or cannot be written.
        """
        save_picture(path, self._drawn())

    def to_coco(self, image_id: Any = 1) -> list[dict[str, Any]]:
        """Return entries of a COCO result file: ``bbox`` (x, y, width, height), ``score``, masks as RLE."""
        return detections_to_coco(self, image_id, self.category_ids)

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with a row for each object.

        The columns are ``class_name``, ``category_id``, ``score``, the box ``x1, y1, x2, y2`` in pixels and,
        with masks, their ``area`` in pixels.

        Raises:
            UserError: the package pandas is not installed.
        """
        pandas = _import("pandas", "to_pandas")
        labels = self.labels.tolist()
        columns: dict[str, Any] = {
            "class_name": [self.class_names[label] for label in labels],
            "category_id": [self.category_ids[label] for label in labels],
            "score": self.scores.cpu().numpy(),
            **dict(zip(("x1", "y1", "x2", "y2"), self.boxes.cpu().numpy().T, strict=True)),
        }
        if self.masks is not None:
            columns["area"] = [int(mask.sum()) for mask in self.masks]
        return pandas.DataFrame(columns)

    def to_supervision(self) -> Any:
        """Return ``supervision.Detections``; ``data["class_name"]`` holds the names.

        Raises:
            UserError: the package supervision is not installed.
        """
        supervision = _import("supervision", "to_supervision")
        found = self.to("cpu")
        masks = found.bitmaps()
        names = [self.class_names[label] for label in found.labels.tolist()]
        return supervision.Detections(
            xyxy=found.boxes.numpy(),
            confidence=found.scores.numpy(),
            class_id=found.labels.numpy(),
            mask=None if masks is None else masks.numpy(),
            data={"class_name": np.array(names, dtype=str)},
        )

    def _drawn(self) -> np.ndarray:
        return draw_detections(self.image, self.to("cpu"), self.class_names, score_threshold=0.0)

    def _name_of(self, label: int) -> str:
        return printable(self.class_names[label])


def _import(package: str, method: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            "missing-package",
            f"{method} needs the package {package}, not installed here: pip install {package}",
        ) from error
