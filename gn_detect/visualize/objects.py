"""Draw detections and ground truth on an image, by object or by what is right and wrong."""

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
    box_overlap,
    crop_mask,
    enlarged,
    mask_outline,
    picture_scale,
)
from .fonts import WEIGHT, set_text
from .pictures import Legend, side_by_side

# Colours of instances, in turn: bright, and each far from the next.
COLOURS = [
    "#ff4d4d", "#3fa7ff", "#48d65a", "#ffc02e", "#c56bff", "#12d3d3",
    "#ff7ac6", "#ff8a3d", "#a5e02a", "#8186ff", "#f2ee4a", "#1fc495",
]  # fmt: skip
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


_PAD = 0.18  # around the text of a plate, as a share of the text's size


def draw_labels(canvas: Canvas, boxes: np.ndarray, labels: Sequence[str], colours: Sequence[str]) -> None:
    """Draw rounded plates near their boxes (N, 4) ``xyxy``, those of large objects first.

    Plates do not cover each other. Empty labels, and small objects in a crowded place, get none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, font_size = canvas.figure, canvas.text_size
    renderer = FigureCanvasAgg(figure).get_renderer()
    picture_size = np.array(figure.bbox.size)
    taken = np.zeros((0, 4))
    for index in np.argsort(-box_area(boxes), kind="stable"):
        if not labels[index]:
            continue
        text = figure.text(0, 0, "", size=font_size, weight=WEIGHT)
        text.set(ha="center", va="center", transform=None)
        set_text(text, labels[index])
        extent = text.get_window_extent(renderer)
        size = np.array([extent.width, extent.height]) + 2 * _PAD * font_size
        plate = _free_place(boxes[index], size, picture_size, boxes, taken)
        if plate is None:
            text.remove()
            continue
        taken = np.vstack([taken, plate])
        text.set_position(((plate[0] + plate[2]) / 2, figure.bbox.height - (plate[1] + plate[3]) / 2))
        style = f"round,pad={_PAD},rounding_size=0.25"
        text.set_bbox({"boxstyle": style, "facecolor": colours[index], "edgecolor": "none", "alpha": 0.9})


def _free_place(
    box: np.ndarray, size: np.ndarray, picture_size: np.ndarray, boxes: np.ndarray, taken: np.ndarray
) -> np.ndarray | None:
    """Return the place ``xyxy`` where a label hides least; None for a small object without a free one.

    Args:
        box: the object's, ``xyxy``.
        size, picture_size: ``width, height`` of the label and of the picture.
        boxes: (N, 4) of all objects.
        taken: (M, 4) labels already placed.
    """
    (x0, y0, x1, y1), (width, height) = box, size
    above, below, middle = y0 - height - 1, y1 + 1, (y0 + y1 - height) / 2
    left, right, centre = x0, x1 - width, (x0 + x1 - width) / 2
    places = [(x, y) for x in (left, right, centre) for y in (above, below, y0 + 2, y1 - height - 2)]
    places += [(x1 + 2, middle), (x0 - width - 2, middle), (centre, middle)]
    corners = np.clip(places, 1, np.maximum(picture_size - size - 1, 1))
    plates = np.concatenate([corners, corners + size], axis=1)
    # A hidden area counts as a share of its box: a corner of a large box costs little, a small box all.
    hidden = (box_overlap(plates, boxes) / np.maximum(box_area(boxes), 1)).sum(axis=1)
    collides = box_overlap(plates, taken).sum(axis=1) / size.prod()
    best = int((10 * collides + hidden + 0.01 * np.arange(len(plates))).argmin())
    large = min(x1 - x0, y1 - y0) > 2 * height
    return None if (collides[best] > 0.02 and not large) or hidden[best] > 0.4 else plates[best]


FOUND, OTHER_CLASS, MISSED, FALSE, IGNORED = "found", "other class", "missed", "false", "in a crowd"
MISTAKES = (OTHER_CLASS, MISSED, FALSE)
# Blue, not green, for what is right: people who cannot distinguish red and green see it, too.
_COLOURS = {
    FOUND: "#3fa7ff", OTHER_CLASS: "#d17bff", MISSED: "#ffc02e", FALSE: "#ff4d4d", IGNORED: "#b8b8b8",
}  # fmt: skip


def draw_comparison(
    image: np.ndarray,
    target: Target,
    detections: Detections,
    class_names: Sequence[str],
    matched: np.ndarray,
    scale: float | None = None,
    masks: tuple[Masks, Masks] | None = None,
) -> np.ndarray:
    """Draw two pictures side by side: objects found or missed, and detections right or false.

    True positives have thin lines and little fill; mistakes stand out, and a missed object is dashed. A
    crowded picture names only mistakes, and with a single class nothing is named.

    Args:
        image: uint8 RGB (H, W, 3), or grey (H, W).
        target: ground truth in the image's pixels.
        detections: those to show, in the image's pixels.
        class_names: name of each contiguous label.
        matched: (M,) for each detection the index of its object; -1 for none, -2 for a detection in a crowd,
            which does not count.
        scale: factor by which the image is enlarged; see :func:`draw_detections`.
        masks: of the objects and of the detections, in place of those in ``target`` and ``detections``.

    Returns:
        uint8 RGB with a title and a legend over each half.
    """
    target, detections = target.to("cpu"), detections.to("cpu")
    truth_masks, found_masks = masks or (target_crops(target, image), mask_crops(detections))
    truth, found = _outcomes(target, detections, np.asarray(matched))
    truth_labels = _labels(truth, _names(target.labels, class_names))
    found_labels = _labels(found, scored_names(detections, _names(detections.labels, class_names)))
    truth_boxes, found_boxes = target.boxes.double().numpy(), detections.boxes.double().numpy()
    if not scale:
        boxes = np.concatenate([truth_boxes.reshape(-1, 4), found_boxes.reshape(-1, 4)])
        most = max(sum(map(bool, truth_labels)), sum(map(bool, found_labels)))
        scale = picture_scale(image.shape[:2], boxes, most)
    styles = {outcome: _style(outcome) for outcome in _COLOURS}
    halves = [
        draw_objects(image, boxes, crops, labels, scale, styles=[styles[outcome] for outcome in outcomes])
        for boxes, crops, labels, outcomes in (
            (truth_boxes, truth_masks, truth_labels, truth),
            (found_boxes, found_masks, found_labels, found),
        )
    ]
    noun = "object" if len(target) == 1 else "objects"
    titles = [f"ground truth: {len(target)} {noun}", f"prediction: {len(detections)}"]
    return side_by_side(halves, titles, [_legend(truth), _legend(found)])


def _outcomes(target: Target, detections: Detections, matched: np.ndarray) -> tuple[list[str], list[str]]:
    truth, found = [MISSED] * len(target), []
    for label, partner in zip(detections.labels.tolist(), matched.tolist(), strict=True):
        if partner < 0:
            found.append(IGNORED if partner == -2 else FALSE)
            continue
        found.append(FOUND if int(target.labels[partner]) == label else OTHER_CLASS)
        truth[partner] = found[-1]
    return truth, found


def _names(labels: Tensor, class_names: Sequence[str]) -> list[str]:
    """Return names; empty for a single class, where colours say everything."""
    return [""] * len(labels) if len(class_names) == 1 else names_of(labels, class_names)


def _labels(outcomes: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names that are written: in a crowd only those of mistakes."""
    few = len(outcomes) <= CROWDED
    return [name if few or outcome in MISTAKES else "" for outcome, name in zip(outcomes, names, strict=True)]


def _style(outcome: str) -> Style:
    wrong = outcome in MISTAKES
    fill, width = (0.3, 1.5) if wrong else (0.12, 0.8)
    return Style(_COLOURS[outcome], fill, width, dashed=outcome == MISSED, on_top=wrong)


def _legend(outcomes: Sequence[str]) -> Legend:
    counts = {outcome: outcomes.count(outcome) for outcome in _COLOURS}
    return [(f"{count} {outcome}", _COLOURS[outcome]) for outcome, count in counts.items() if count]
