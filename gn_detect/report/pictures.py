"""Draw the pictures of a report: the worst, the best and the changed images, small enough for the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data import read_image
from ..data.coco.rules import image_file
from ..data.datasets import DatasetSource
from ..engine.drawing import Classes, draw_entries
from ..errors import UserError
from ..progress import progress_bar
from ..visualize import encode_picture, picture_scale
from .analysis import Analysis, ImageResult

MAX_BYTES = 4_000_000  # of all pictures of a page together, before base64 adds a third
_WIDTH = 1400  # pixels of ground truth and prediction side by side
_QUALITY = 74  # of WebP


@dataclass(frozen=True)
class Picture:
    """An image of the page.

    Attributes:
        image: its objects and detections.
        rank: ``"worst"``, ``"best"``, ``"gained"`` or ``"lost"``.
        source: ``src`` of the HTML element; empty if the image cannot be shown.
        reason: why it cannot be shown.
        before: the same image with the detections of another run, drawn above.
    """

    image: ImageResult
    rank: str
    source: str
    reason: str = ""
    before: ImageResult | None = None


Choice = tuple[str, ImageResult, ImageResult | None]  # rank, image and the other run's


def choose_images(images: Sequence[ImageResult], count: int) -> list[Choice]:
    """Return the ``count`` worst and the ``count`` best images by quality, worst first.

    No image is both, and an image without a true positive is not among the best.
    """
    rated = [(image.quality, image) for image in images if image.quality is not None]
    rated.sort(key=lambda pair: pair[0])
    worst = rated[:count]
    best = rated[len(worst) :][-count:][::-1] if count else []
    chosen: list[Choice] = [("worst", image, None) for _, image in worst]
    return chosen + [("best", image, None) for quality, image in best if quality > 0]


def choose_changed(
    images: Sequence[ImageResult], before: Sequence[ImageResult], count: int
) -> list[tuple[float, Choice]]:
    """Return the ``count`` images that gained most quality and the ``count`` that lost most, with the change.

    Args:
        images, before: of two runs, in the same order.
        count: of each.
    """
    rated = [
        (image.quality - old.quality, image, old)
        for image, old in zip(images, before, strict=True)
        if image.quality is not None and old.quality is not None
    ]
    rated.sort(key=lambda each: each[0])
    lost = [(change, ("lost", image, old)) for change, image, old in rated[:count] if change < 0]
    gained = [(change, ("gained", image, old)) for change, image, old in rated[::-1][:count] if change > 0]
    return [*gained, *lost]


def draw_pictures(analysis: Analysis, source: DatasetSource, chosen: Sequence[Choice]) -> list[Picture]:
    """Draw ground truth next to predictions.

    Args:
        analysis: the dataset's.
        source: the dataset, with the folder of its images.
        chosen: the images; those that would make the page too large are left out.
    """
    classes = Classes(analysis.truth.class_names, analysis.truth.category_ids)
    pictures, total = [], 0
    for rank, image, before in progress_bar(chosen, desc="pictures", unit="image"):
        if total > MAX_BYTES:
            reason = "left out, as the page would become too large"
            pictures.append(Picture(image, rank, "", reason, before))
            continue
        try:
            size = analysis.truth.sizes.get(image.image_id)
            path = image_file(source.images, image.file_name, source.allow_outside)
            pixels = read_image(path, "RGB", size)
        except UserError as error:
            pictures.append(Picture(image, rank, "", str(error), before))
            continue
        # Of one image both have one scale.
        corners = np.array([entry["bbox"] for entry in image.objects]).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        scale = None if before is None else picture_scale(pixels.shape[:2], corners)
        both = [image] if before is None else [before, image]
        halves = [draw_entries(pixels, each.detections, classes, each.objects, scale) for each in both]
        drawn = np.concatenate(halves)
        encoded = encode_picture(drawn, _WIDTH, _QUALITY)
        total += len(encoded)
        text = base64.b64encode(encoded).decode("ascii")
        pictures.append(Picture(image, rank, f"data:image/webp;base64,{text}", before=before))
    return pictures
