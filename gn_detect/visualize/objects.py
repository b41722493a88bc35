"""Draw detections and ground truth on an image, each object in its own colour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..ops.masks import rasterize_polygons
from ..structures import Detections, Target
from .canvas import (
    Canvas,
    Masks,
    Style,
    base_scale,
    box_area,
    crop_mask,
    enlarged,
    mask_outline,
    picture_scale,
)
from .labels import draw_labels

# Colours of instances, in turn: bright, and each far from the next.
COLOURS = [
    "#ff4d4d",
    "#3fa7ff",
    "#48d65a",
    "#ffc02e",
    "#c56bff",
    "#12d3d3",
    "#ff7ac6",
    "#ff8a3d",
    "#a5e02a",
    "#8186ff",
    "#f2ee4a",
    "#1fc495",
]
# With more objects, masks are drawn without boxes, and objects of a single class without names.
CROWDED = 15


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    class_names: Sequence[str],
    score_threshold: float = 0.5,
    scale: float | None = None,
    masks: Masks | None = None,
) -> np.ndarray:
    """Draw masks, boxes, names and scores of detections on an image.

    Labels do not cover each other; small objects in a crowded place get none.

    Args:
        image: uint8 RGB (H, W, 3), or grey (H, W).
        detections: in the image's pixels.
        class_names: name of each contiguous label.
        score_threshold: least score of the detections that are drawn.
        scale: factor by which the image is enlarged; by default until objects and text are readable, see
            :func:`picture_scale`.
        masks: of all detections, in place of those in ``detections``.

    Returns:
        uint8 RGB (H', W', 3).

    Raises:
        ValueError: the image has another type or shape.
    """
    detections = detections.to("cpu")
    chosen = detections[detections.scores >= score_threshold]
    if masks is not None and len(chosen) < len(detections):
        kept = (detections.scores >= score_threshold).nonzero()[:, 0].tolist()
        masks = [masks[index] for index in kept]
    labels = scored_names(chosen, names_of(chosen.labels, class_names))
    boxes = chosen.boxes.double().numpy()
    return draw_objects(
        image, boxes, masks or mask_crops(chosen), labels, scale, with_boxes=len(boxes) <= CROWDED
    )


def draw_ground_truth(
    image: np.ndarray, target: Target, class_names: Sequence[str], scale: float | None = None
) -> np.ndarray:
    """Draw masks, boxes and names of annotations on an image; see :func:`draw_detections`.

    Args:
        image: uint8 RGB (H, W, 3), or grey (H, W).
        target: in the image's pixels; polygons or bitmaps.
        class_names: name of each contiguous label.
        scale: factor by which the image is enlarged; see :func:`draw_detections`.
    """
    target = target.to("cpu")
    labels, boxes = names_of(target.labels, class_names), target.boxes.double().numpy()
    return draw_objects(
        image, boxes, target_crops(target, image), labels, scale, with_boxes=len(boxes) <= CROWDED
    )


def mask_crops(detections: Detections) -> Masks:
    """Return the mask of each detection, or None for each."""
    if detections.masks is None:
        return [None] * len(detections)
    return [crop_mask(mask.numpy()) for mask in detections.masks]


def target_crops(target: Target, image: np.ndarray) -> Masks:
    """Return the mask of each object of the image, or None for each."""
    if not target.masks:
        return [None] * len(target)
    return [
        crop_mask(mask.numpy() if isinstance(mask, Tensor) else rasterize_polygons(mask, *image.shape[:2]))
        for mask in target.masks
    ]


def names_of(labels: Tensor, class_names: Sequence[str]) -> list[str]:
    """Return a name for each label; empty for many objects of a single class."""
    if len(class_names) == 1 and len(labels) > CROWDED:
        return [""] * len(labels)
    return [
        class_names[label] if 0 <= label < len(class_names) else f"class {label}" for label in labels.tolist()
    ]


def scored_names(detections: Detections, names: Sequence[str]) -> list[str]:
    """Return the names with the scores of the detections."""
    scores = detections.scores.tolist()
    return [f"{name} {score:.2f}".strip() for name, score in zip(names, scores, strict=True)]


def draw_objects(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: Masks,
    labels: Sequence[str],
    scale: float | None = None,
    *,
    styles: Sequence[Style] | None = None,
    with_boxes: bool = False,
) -> np.ndarray:
    """Draw large objects below small ones, then all labels on top.

    Args:
        image: uint8 RGB (H, W, 3), or grey (H, W).
        boxes: (N, 4) ``xyxy`` in the image's pixels.
        masks: mask of each object.
        labels: label of each object, empty for none.
        scale: factor by which the image is enlarged; see :func:`draw_detections`.
        styles: look of each object; by default each has its own colour.
        with_boxes: draw the boxes of objects with a mask, too.
    """
    height, width = image.shape[:2]
    scale = scale or picture_scale((height, width), boxes, sum(map(bool, labels)))
    picture = enlarged(image, scale)
    if not len(boxes):
        return picture
    scale = picture.shape[0] / height
    boxes = boxes * scale
    styles = styles or [Style(colour) for colour in pick_colours(boxes)]
    canvas = Canvas.over(picture, min(height, width) * min(scale, base_scale(height, width)))
    labelled, fills = boxes.copy(), thinned(masks, (height, width), [style.fill for style in styles])
    on_top = np.array([style.on_top for style in styles])
    for index in np.lexsort((-box_area(boxes), on_top)):
        outline, style = mask_outline(masks[index], scale), styles[index]
        if outline is not None:
            canvas.draw_mask(outline, style, fills[index])
            if not with_boxes:  # a poor mask may be far from the box's corners
                labelled[index] = outline.get_extents().extents
        if outline is None or with_boxes:
            canvas.draw_box(boxes[index], style, faint=outline is not None)
    draw_labels(canvas, labelled, labels, [style.colour for style in styles])
    return canvas.flatten()


def thinned(masks: Masks, size: tuple[int, int], fills: Sequence[float]) -> list[float]:
    """Return the opacity of each mask's fill, reduced where more than two masks lie over each other.

    The masks over a place, as many as there are on average on the pixels of a mask, together cover about
    as much as two would. So the picture stays visible.

    Args:
        masks: of the objects.
        size: (height, width) of the image.
        fills: opacity of each alone, from 0 to 1.
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


def pick_colours(boxes: np.ndarray) -> list[str]:
    """Return the colour of each box: one that is unused, or the one whose nearest box is farthest away."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    picked: list[int] = []
    for number, centre in enumerate(centres):
        nearest = np.full(len(COLOURS), np.inf)
        np.minimum.at(nearest, picked, np.linalg.norm(centres[:number] - centre, axis=1))
        picked.append(int(nearest.argmax()))
    return [COLOURS[index] for index in picked]
