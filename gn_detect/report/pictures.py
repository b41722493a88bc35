"""Draw the pictures of a report: the worst and the best images, small enough for the page."""

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

MAX_BYTES = 4_000_000  # of all pictures of a page together, before base64 adds a third
_WIDTH = 1400  # pixels of ground truth and prediction side by side
_QUALITY = 74  # of WebP


@dataclass(frozen=True)
class Picture:
    """An image of the page.

    Attributes:
        image: its objects and detections.
        rank: ``"worst"`` or ``"best"``.
        source: ``src`` of the HTML element; empty if the image cannot be shown.
        reason: why it cannot be shown.
    """

    image: ImageResult
    rank: str
    source: str
    reason: str = ""


def choose_images(images: Sequence[ImageResult], count: int) -> list[tuple[str, ImageResult]]:
    """Return the ``count`` worst and the ``count`` best images by quality, worst first.

    No image is both, and an image without a true positive is not among the best.
    """
    rated = [(image.quality, image) for image in images if image.quality is not None]
    rated.sort(key=lambda pair: pair[0])
    worst = rated[:count]
    best = rated[len(worst) :][-count:][::-1] if count else []
    chosen = [("worst", image) for _, image in worst]
    return chosen + [("best", image) for quality, image in best if quality > 0]


def draw_pictures(analysis: Analysis, source: DatasetSource, count: int) -> list[Picture]:
    """Draw ground truth next to predictions for the worst and the best images.

    Args:
        analysis: the dataset's.
        source: the dataset, with the folder of its images.
        count: number of worst and of best images; those that would make the page too large are left out.
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
