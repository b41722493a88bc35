"""The pictures of a report: the worst and the best images, small enough to lie in the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from ..data import read_image
from ..data.coco.rules import image_file
from ..data.datasets import DatasetSource
from ..engine.drawing import Classes, draw_entries
from ..errors import UserError
from ..progress import progress_bar
from ..visualize import encode_picture
from .analysis import Analysis, ImageResult

MAX_BYTES = 4_000_000
"""Of all pictures of a page together, before base64 makes them a third larger."""
_WIDTH, _QUALITY = 1400, 74
"""Pixels, of ground truth and prediction side by side; and WebP's quality."""


@dataclass(frozen=True)
class Picture:
    """An image of the page.

    Attributes:
        image: what was found in it.
        rank: ``"worst"`` or ``"best"``.
        source: of the HTML element; empty where the image cannot be shown, and ``reason`` says why.
    """

    image: ImageResult
    rank: str
    source: str
    reason: str = ""


def choose_images(images: Sequence[ImageResult], count: int) -> list[tuple[str, ImageResult]]:
    """The ``count`` worst and the ``count`` best by quality, worst first.

    None is both, and none without anything right is among the best.
    """
    ranked = sorted((image for image in images if image.quality is not None), key=_quality)
    worst = ranked[:count]
    best = ranked[len(worst) :][-count:][::-1] if count else []
    best = [image for image in best if _quality(image) > 0]
    return [("worst", image) for image in worst] + [("best", image) for image in best]


def _quality(image: ImageResult) -> float:
    return -1.0 if image.quality is None else image.quality


def draw_pictures(analysis: Analysis, source: DatasetSource, count: int) -> list[Picture]:
    """Ground truth beside prediction for the worst and the best images.

    Args:
        analysis: of the dataset.
        source: where its images are.
        count: of each kind; those that would make the page too large are left out.
    """
    classes = Classes(analysis.truth.class_names, analysis.truth.category_ids)
    pictures, total = [], 0
    chosen = choose_images(analysis.images, count)
    for rank, image in progress_bar(chosen, desc="pictures", unit="image"):
        if total > MAX_BYTES:
            pictures.append(Picture(image, rank, "", "left out, as the page would become too large"))
            continue
        try:
            size = analysis.truth.sizes.get(image.image_id)
            path = image_file(source.images, image.file_name, source.allow_outside)
            pixels = read_image(path, "RGB", size)
        except UserError as error:
            pictures.append(Picture(image, rank, "", str(error)))
            continue
        drawn = draw_entries(pixels, image.detections, classes, image.objects)
        encoded = encode_picture(drawn, _WIDTH, _QUALITY)
        total += len(encoded)
        text = base64.b64encode(encoded).decode("ascii")
        pictures.append(Picture(image, rank, f"data:image/webp;base64,{text}"))
    return pictures
