"""Ground truth beside prediction, coloured by what was found, missed and imagined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..structures import Detections, Target
from .canvas import Canvas, Masks, base_scale, box_area, enlarged, mask_outline, picture_scale
from .labels import draw_labels
from .objects import CROWDED, bitmaps, names_of, target_bitmaps, thinned
from .pictures import Legend, side_by_side

FOUND, OTHER_CLASS, MISSED, FALSE, IGNORED = "found", "other class", "missed", "false", "in a crowd"
_COLOURS = {
    FOUND: "#3fa7ff",
    OTHER_CLASS: "#d17bff",
    MISSED: "#ffc02e",
    FALSE: "#ff4d4d",
    IGNORED: "#b8b8b8",
}
"""Blue for what is right: told from red and amber by those who do not tell red from green."""


def draw_comparison(
    image: np.ndarray,
    target: Target,
    detections: Detections,
    class_names: Sequence[str],
    matched: np.ndarray,
    scale: float | None = None,
    masks: tuple[Masks, Masks] | None = None,
) -> np.ndarray:
    """Two pictures side by side: objects found or missed, and detections right or false.

    What is right has thin lines and little fill, what is wrong stands out: a missed object is dashed. In a
    crowded picture only what is wrong is named, and where there is one class, nothing is.

    Args:
        image: uint8 RGB (H, W, 3), or grey (H, W).
        target: ground truth in the image's pixels.
        detections: those to show, in the image's pixels.
        class_names: name of each contiguous label.
        matched: (M,) for each detection the object that it found, -1 for none, -2 where it lies in a crowd
            and does not count.
        scale: how much the image is enlarged; see :func:`draw_detections`.
        masks: of the objects and of the detections, in place of those that they hold.

    Returns:
        uint8 RGB with a title and a legend over each half.
    """
    target, detections = target.to("cpu"), detections.to("cpu")
    truth, found = _outcomes(target, detections, np.asarray(matched))
    truth_boxes, found_boxes = target.boxes.double().numpy(), detections.boxes.double().numpy()
    boxes = np.concatenate([truth_boxes.reshape(-1, 4), found_boxes.reshape(-1, 4)])
    truth_names, found_names = _names(target.labels, class_names), _names(detections.labels, class_names)
    scores = detections.scores.tolist()
    found_names = [f"{name} {score:.2f}".strip() for name, score in zip(found_names, scores, strict=True)]
    height, width = image.shape[:2]
    labels = max(sum(map(bool, _spoken(truth, truth_names))), sum(map(bool, _spoken(found, found_names))))
    scale = scale or picture_scale((height, width), boxes, labels)
    truth_masks, found_masks = masks or (target_bitmaps(target, image), bitmaps(detections))
    halves = [
        _half(image, scale, truth_boxes, truth_masks, truth, truth_names),
        _half(image, scale, found_boxes, found_masks, found, found_names),
    ]
    titles = [f"ground truth: {_count(len(target), 'object')}", f"prediction: {len(detections)}"]
    return side_by_side(halves, titles, [_legend(truth), _legend(found)])


def _outcomes(target: Target, detections: Detections, matched: np.ndarray) -> tuple[list[str], list[str]]:
    """Of each object and of each detection."""
    truth, found = [MISSED] * len(target), []
    for label, partner in zip(detections.labels.tolist(), matched.tolist(), strict=True):
        if partner < 0:
            found.append(IGNORED if partner == -2 else FALSE)
            continue
        found.append(FOUND if int(target.labels[partner]) == label else OTHER_CLASS)
        truth[partner] = found[-1]
    return truth, found


def _names(labels: Tensor, class_names: Sequence[str]) -> list[str]:
    """None where there is one class alone: colours say all."""
    return [""] * len(labels) if len(class_names) == 1 else names_of(labels, class_names)


def _spoken(outcomes: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that are written: in a crowd those of mistakes."""
    if len(outcomes) <= CROWDED:
        return list(names)
    return [
        name if outcome in (OTHER_CLASS, MISSED, FALSE) else ""
        for outcome, name in zip(outcomes, names, strict=True)
    ]


def _half(
    image: np.ndarray,
    scale: float,
    boxes: np.ndarray,
    masks: Masks,
    outcomes: Sequence[str],
    names: Sequence[str],
) -> np.ndarray:
    """Mistakes on top of what is right, small objects on top of large ones."""
    height, width = image.shape[:2]
    picture = enlarged(image, scale)
    if not len(boxes):
        return picture
    scale = picture.shape[0] / height
    boxes = boxes * scale
    canvas = Canvas.over(picture, min(height, width) * min(scale, base_scale(height, width)))
    wrong = np.array([outcome in (OTHER_CLASS, MISSED, FALSE) for outcome in outcomes])
    colours = [_COLOURS[outcome] for outcome in outcomes]
    width_of_line, drawn = canvas.line_width, boxes.copy()
    fills = thinned(masks, (height, width), np.where(wrong, 0.3, 0.12).tolist())
    for index in np.lexsort((-box_area(boxes), wrong)):
        outline, dashed = mask_outline(masks[index], scale), outcomes[index] == MISSED
        canvas.line_width = width_of_line * (1.5 if wrong[index] else 0.8)
        if outline is not None:
            canvas.draw_mask(outline, colours[index], fill=fills[index], dashed=dashed)
            drawn[index] = outline.get_extents().extents  # a poor mask may be far from the box's corners
        else:
            canvas.draw_box(boxes[index], colours[index], dashed=dashed)
    draw_labels(canvas, drawn, _spoken(outcomes, names), colours)
    return canvas.flatten()


def _legend(outcomes: Sequence[str]) -> Legend:
    counts = {outcome: outcomes.count(outcome) for outcome in _COLOURS}
    return [(f"{count} {outcome}", _COLOURS[outcome]) for outcome, count in counts.items() if count]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
