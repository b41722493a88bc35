"""Compare the detections of an exported file with those of the model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data import read_image
from ..errors import UserError
from ..progress import progress_bar
from ..structures import Detections

BOX_TOLERANCE, SCORE_TOLERANCE, MASK_TOLERANCE = 0.05, 1e-4, 0.999  # pixels, difference of scores, IoU


@dataclass
class Parity:
    """The largest differences over some images."""

    images: int = 0
    detections: int = 0
    unequal: list[str] = field(default_factory=list)  # images with other numbers or labels
    box: float = 0.0  # in pixels of the original image
    score: float = 0.0
    mask: float = 1.0  # lowest IoU of two masks
    flipped: int = 0  # most pixels that two masks below MASK_TOLERANCE do not share
    seconds: list[tuple[float, float]] = field(default_factory=list)  # by the model and by the file

    @property
    def within_tolerances(self) -> bool:
        """Return True for small differences; one pixel of a small mask may differ."""
        return (
            not self.unequal
            and self.box <= BOX_TOLERANCE
            and self.score <= SCORE_TOLERANCE
            and (self.mask >= MASK_TOLERANCE or self.flipped <= 1)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "within_tolerances": self.within_tolerances}

    def __str__(self) -> str:
        ours, theirs = (sorted(column)[len(column) // 2] for column in zip(*self.seconds, strict=True))
        small = f" (at most {self.flipped} pixel of a mask below {MASK_TOLERANCE})" if self.flipped else ""
        text = (
            f"{self.detections} detections in {self.images} images: boxes within {self.box:.1e} px, "
            f"scores within {self.score:.1e}, mask IoU at least {self.mask:.5f}{small}; "
            f"median {ours:.2f} s an image by the model, {theirs:.2f} s by the file"
        )
        if self.unequal:
            text += f"; other objects in {', '.join(self.unequal)}"
        return text if self.within_tolerances else f"{text}: NOT within the tolerances"


def compare(
    predictor: Callable[..., Detections], exported: Callable[..., Detections], images: Sequence[Path]
) -> Parity:
    """Run both on each image and return the differences."""
    parity = Parity()
    for path in progress_bar(images, unit="image", leave=True):
        pixels = read_image(path, "RGB")
        begin = time.perf_counter()
        expected = predictor(pixels)
        middle = time.perf_counter()
        try:
            found = exported(pixels)
        except UserError as error:
            raise UserError(error.code, f"{path}: {error}") from error
        parity.seconds.append((middle - begin, time.perf_counter() - middle))
        parity.images += 1
        parity.detections += len(expected)
        if sorted(expected.labels.tolist()) != sorted(found.labels.tolist()):
            parity.unequal.append(path.name)
        elif len(expected):
            _add(parity, expected, found, path.name)
    return parity


def _add(parity: Parity, expected: Detections, found: Detections, name: str) -> None:
    # Nearly equal scores may change their order, so detections are paired by class and box.
    distance = torch.cdist(expected.boxes, found.boxes, p=torch.inf)
    partner = (distance + 1e6 * (expected.labels[:, None] != found.labels)).argmin(dim=1)
    if len(partner.unique()) != len(partner):
        parity.unequal.append(name)
        return
    found = found[partner]
    parity.box = max(parity.box, float((expected.boxes - found.boxes).abs().max()))
    parity.score = max(parity.score, float((expected.scores - found.scores).abs().max()))
    one, other = expected.bitmaps(), found.bitmaps()
    if one is None or other is None:
        return
    both, either = (one & other).flatten(1).sum(1), (one | other).flatten(1).sum(1)
    iou = torch.where(either > 0, both / either.clamp(min=1), 1.0)
    parity.mask = min(parity.mask, float(iou.min()))
    off = (either - both)[iou < MASK_TOLERANCE]
    parity.flipped = max(parity.flipped, int(off.max()) if len(off) else 0)
