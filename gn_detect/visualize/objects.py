"""Detections and ground truth on an image, each object in a colour of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..ops.masks import rasterize_polygons
from ..structures import Detections, Target
from .canvas import Canvas, Masks, base_scale, box_area, crop_mask, enlarged, mask_outline, picture_scale
from .labels import draw_labels

COLOURS = (
    "#ff4d4d #3fa7ff #48d65a #ffc02e #c56bff #12d3d3 #ff7ac6 #ff8a3d #a5e02a #8186ff #f2ee4a #1fc495".split()
)
"""Of instances, in turn: bright, and each far from the next."""

FILL = 0.38
"""Opacity of a mask by itself."""

CROWDED = 15
"""With more objects than this, masks go without boxes, and objects of the only class without names."""


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    class_names: Sequence[str],
    score_threshold: float = 0.5,
    scale: float | None = None,
    masks: Masks | None = None,
) -> np.ndarray:
    """The image with masks, boxes, names and scores of what was detected.

    Labels do not cover each other; small objects in a crowded place go without.

    Args:
        image: uint8 RGB (H, W, 3), or grey (H, W).
        detections: in the image's pixels.
        class_names: name of each contiguous label.
        score_threshold: detections below it are left out.
        scale: how much the image is enlarged; by default, until objects and text are readable, see
            :func:`picture_scale`.
        masks: of all detections, in place of those that they hold.

    Returns:
        uint8 RGB (H', W', 3).

    Raises:
        ValueError: the image has another type or shape.
    """
    chosen = above(detections, score_threshold)
    if masks is not None and len(chosen) < len(detections):
        kept = (detections.scores >= score_threshold).nonzero()[:, 0].tolist()
        masks = [masks[index] for index in kept]
    names = names_of(chosen.labels, class_names)
    labels = [
        f"{name} {score:.2f}".strip() for name, score in zip(names, chosen.scores.tolist(), strict=True)
    ]
    return _draw(image, chosen.boxes.double().numpy(), masks or bitmaps(chosen), labels, scale)


def draw_ground_truth(
    image: np.ndarray, target: Target, class_names: Sequence[str], scale: float | None = None
) -> np.ndarray:
    """The image with the masks, boxes and names of its annotations; see :func:`draw_detections`.

    Args:
        image: uint8 RGB (H, W, 3), or grey (H, W).
        target: in the image's pixels; polygons or bitmaps.
        class_names: name of each contiguous label.
        scale: how much the image is enlarged; see :func:`draw_detections`.
    """
    target = target.to("cpu")
    names = names_of(target.labels, class_names)
    return _draw(image, target.boxes.double().numpy(), target_bitmaps(target, image), names, scale)


def above(detections: Detections, score_threshold: float) -> Detections:
    """Those that score as much, on the CPU."""
    detections = detections.to("cpu")
    return detections[detections.scores >= score_threshold]


def bitmaps(detections: Detections) -> Masks:
    """Return the mask of each detection, or None for each."""
    if detections.masks is None:
        return [None] * len(detections)
    return [crop_mask(mask) for mask in detections.masks.numpy()]


def target_bitmaps(target: Target, image: np.ndarray) -> Masks:
    """Return the mask of each object of the image, or None for each."""
    masks = [
        crop_mask(mask.numpy() if isinstance(mask, Tensor) else rasterize_polygons(mask, *image.shape[:2]))
        for mask in target.masks or []
    ]
    return masks or [None] * len(target)


def thinned(masks: Masks, size: tuple[int, int], fills: Sequence[float]) -> list[float]:
    """The opacity of each mask's fill, made less where more than two lie over each other.

    As many as a mask has on itself, on average, together cover about as much as two would: the picture
    stays visible under them.

    Args:
        masks: of the objects.
        size: (height, width) of the image.
        fills: opacity of each by itself, from 0 to 1.
    """
    if len(masks) < 3:
        return list(fills)
    depth = np.zeros(size, dtype=np.min_scalar_type(len(masks)))
    for mask in masks:
        if mask is not None:
            depth[mask.place] += mask.inside
    layers = [2.0 if mask is None else max(2.0, _mean(depth[mask.place], mask.inside)) for mask in masks]
    return [1 - (1 - fill) ** (2 / count) for fill, count in zip(fills, layers, strict=True)]


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    """Return the mean of integers, exact, row by row: 64-bit numbers for all pixels would be 200 MB."""
    total = sum(int(row[inside].sum(dtype=np.int64)) for row, inside in zip(values, where, strict=True))
    return total / int(np.count_nonzero(where))


def names_of(labels: Tensor, class_names: Sequence[str]) -> list[str]:
    """A name for each label; none for each of many objects of the only class."""
    if len(class_names) == 1 and len(labels) > CROWDED:
        return [""] * len(labels)
    return [
        class_names[label] if 0 <= label < len(class_names) else f"class {label}" for label in labels.tolist()
    ]


def _draw(
    image: np.ndarray, boxes: np.ndarray, masks: Masks, labels: Sequence[str], scale: float | None = None
) -> np.ndarray:
    """Draw large objects below small ones, then all labels on top.

    Args:
        image, scale: see :func:`draw_detections`.
        boxes: (N, 4) ``xyxy`` in the image's pixels.
        masks: of each object.
        labels: of each object, empty for none.
    """
    height, width = image.shape[:2]
    scale = scale or picture_scale((height, width), boxes, sum(map(bool, labels)))
    picture = enlarged(image, scale)
    if not len(boxes):
        return picture
    scale = picture.shape[0] / height
    boxes = boxes * scale
    colours = pick_colours(boxes)
    canvas = Canvas.over(picture, min(height, width) * min(scale, base_scale(height, width)))
    drawn, fills = boxes.copy(), thinned(masks, (height, width), [FILL] * len(masks))
    for index in np.argsort(-box_area(boxes), kind="stable"):
        outline = mask_outline(masks[index], scale)
        if outline is not None:
            canvas.draw_mask(outline, colours[index], fill=fills[index])
        if outline is None or len(boxes) <= CROWDED:
            canvas.draw_box(boxes[index], colours[index], faint=outline is not None)
        else:
            drawn[index] = outline.get_extents().extents  # a poor mask may be far from the box's corners
    draw_labels(canvas, drawn, labels, colours)
    return canvas.flatten()


def pick_colours(boxes: np.ndarray) -> list[str]:
    """The colour of each box: the first one unused, or else the one whose nearest bearer is farthest away."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    picked: list[int] = []
    for number, centre in enumerate(centres):
        nearest = np.full(len(COLOURS), np.inf)
        np.minimum.at(nearest, picked, np.linalg.norm(centres[:number] - centre, axis=1))
        picked.append(int(nearest.argmax()))
    return [COLOURS[index] for index in picked]
