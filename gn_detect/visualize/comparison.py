"""Draw ground truth next to predictions, coloured by true positives, misses and false positives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..structures import Detections, Target
from .canvas import Masks, Style, picture_scale
from .objects import CROWDED, draw_objects, mask_crops, names_of, scored_names, target_crops
from .pictures import Legend, side_by_side

FOUND, OTHER_CLASS, MISSED, FALSE, IGNORED = "found", "other class", "missed", "false", "in a crowd"
MISTAKES = (OTHER_CLASS, MISSED, FALSE)
# Blue, not green, for what is right: people who cannot distinguish red and green see it, too.
_COLOURS = {
    FOUND: "#3fa7ff",
    OTHER_CLASS: "#d17bff",
    MISSED: "#ffc02e",
    FALSE: "#ff4d4d",
    IGNORED: "#b8b8b8",
}


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
    """Return the outcome of each object and of each detection."""
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
    return Style(
        _COLOURS[outcome],
        fill=0.3 if wrong else 0.12,
        width=1.5 if wrong else 0.8,
        dashed=outcome == MISSED,
        on_top=wrong,
    )


def _legend(outcomes: Sequence[str]) -> Legend:
    counts = {outcome: outcomes.count(outcome) for outcome in _COLOURS}
    return [(f"{count} {outcome}", _COLOURS[outcome]) for outcome, count in counts.items() if count]
