"""Random augmentation: what detectron2 and large-scale jitter do, each a small callable with its own numbers.

Each takes a LabelledImage and a NumPy generator, the only source of chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torchvision.transforms.v2 import functional as color

from ..errors import UserError
from .transforms import (
    LabelledImage,
    crop,
    flip_horizontal,
    flip_vertical,
    pad,
    resize,
    resize_pixels,
    to_tensor,
)

if TYPE_CHECKING:
    from ..config import Config

Augmentation = Callable[[LabelledImage, np.random.Generator], LabelledImage]

_CROP_TRIES = 10


def shortest_edge_size(height: int, width: int, length: int, max_size: int) -> tuple[int, int]:
    """Size at which the shorter side is ``length`` unless the longer one would pass ``max_size``.

    Args:
        height, width: of the image, pixels.
        length: wanted shorter side; 0 keeps the size.
        max_size: limit of the longer side.

    Returns:
        (height, width), rounded as detectron2 rounds.
    """
    if length == 0:
        return height, width
    scale = length / min(height, width)
    new_height, new_width = scale * height, scale * width
    if height < width:
        new_height = float(length)
    else:
        new_width = float(length)
    if max(new_height, new_width) > max_size:
        shrink = max_size / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


@dataclass(frozen=True)
class ResizeShortestEdge:
    """Multi-scale resize.

    Attributes:
        lengths: shorter sides to choose from, or the two ends of a range.
        max_size: limit of the longer side.
        sampling: ``"choice"`` or ``"range"`` (both ends included).
    """

    lengths: Sequence[int]
    max_size: int
    sampling: str = "choice"

    def __post_init__(self) -> None:
        if self.sampling not in ("choice", "range"):
            raise UserError(f"INPUT.MIN_SIZE_TRAIN_SAMPLING {self.sampling!r} is not choice or range")
        if len(self.lengths) == 0 or (self.sampling == "range" and len(self.lengths) != 2):
            needed = "two sizes, the ends of the range" if self.sampling == "range" else "at least one size"
            raise UserError(f"INPUT.MIN_SIZE_TRAIN is {tuple(self.lengths)}; it needs {needed}")

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        if self.sampling == "range":
            length = int(random.integers(min(self.lengths), max(self.lengths), endpoint=True))
        else:
            length = int(random.choice(np.asarray(self.lengths)))
        return resize(labelled, *shortest_edge_size(*labelled.size, length, self.max_size))


@dataclass(frozen=True)
class RandomFlip:
    """Half of the images flipped; ``vertical`` exchanges top and bottom, else left and right."""

    vertical: bool = False

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        if random.random() >= 0.5:
            return labelled
        return flip_vertical(labelled) if self.vertical else flip_horizontal(labelled)


@dataclass(frozen=True)
class RandomCrop:
    """A random window that holds at least part of an object, if there is any.

    The window is put around the centre of the box of a random object. If nothing of any mask is in it (the
    object may be a ring), another is tried, and finally the image stays whole.

    Attributes:
        kind: detectron2's ``INPUT.CROP.TYPE``: ``relative`` and ``relative_range`` (parts of the height and
            the width, resp. the least parts), ``absolute`` (height and width in pixels), ``absolute_range``
            (least and largest side in pixels).
        amount: the two numbers of ``INPUT.CROP.SIZE``.
    """

    kind: str
    amount: Sequence[float]

    def __post_init__(self) -> None:
        if self.kind not in ("relative", "relative_range", "absolute", "absolute_range"):
            raise UserError(
                f"INPUT.CROP.TYPE {self.kind!r} is unknown; "
                "choose relative_range, relative, absolute or absolute_range"
            )
        relative = self.kind.startswith("relative")
        valid = len(self.amount) == 2 and all(0 < a <= 1 if relative else a >= 1 for a in self.amount)
        if self.kind == "absolute_range":
            valid = valid and self.amount[0] <= self.amount[1]
        if not valid:
            meaning = {
                "absolute": "height and width in pixels",
                "absolute_range": "the least and the largest side in pixels",
            }.get(self.kind, "two parts of the image in (0, 1]")
            raise UserError(
                f"INPUT.CROP.SIZE {list(self.amount)} does not fit TYPE {self.kind!r}; give {meaning}"
            )

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        return crop_with_object(labelled, *self.window_size(*labelled.size, random), random)

    def window_size(self, height: int, width: int, random: np.random.Generator) -> tuple[int, int]:
        """(height, width) of the window in an image of height x width pixels."""
        first, second = self.amount
        if self.kind == "absolute":
            return min(int(first), height), min(int(second), width)
        if self.kind == "absolute_range":
            low, high = int(first), int(second)
            sides = [random.integers(min(s, low), min(s, high), endpoint=True) for s in (height, width)]
            return int(sides[0]), int(sides[1])
        if self.kind == "relative_range":
            first, second = (a + random.random() * (1 - a) for a in self.amount)
        return max(int(height * first + 0.5), 1), max(int(width * second + 0.5), 1)


def crop_with_object(
    labelled: LabelledImage, height: int, width: int, random: np.random.Generator
) -> LabelledImage:
    """A random window of (height, width), at most the image's size, that keeps an object; see RandomCrop."""
    size = np.array(labelled.size)
    window = np.minimum((height, width), size)
    if (window == size).all():
        return labelled
    for _ in range(_CROP_TRIES):
        low, high = np.zeros(2, dtype=int), size - window
        if len(labelled):
            x0, y0, x1, y1 = labelled.boxes[random.integers(len(labelled))]
            centre = np.array([(y0 + y1) / 2, (x0 + x1) / 2]).astype(int).clip(0, size - 1)
            low, high = np.maximum(centre - window + 1, 0), np.minimum(centre, size - window)
        top, left = random.integers(low, high, endpoint=True)
        cropped = crop(labelled, int(left), int(top), int(window[0]), int(window[1]))
        if len(cropped) or not len(labelled):
            return cropped
    return labelled


@dataclass(frozen=True)
class LargeScaleJitter:
    """Resize by a random factor, then cut or pad to a fixed size (arXiv 2012.07177).

    At factor 1 the image just fits into ``size``. Unlike detectron2, which moves the window by the same
    fraction in x and in y, a window that is smaller than the image is placed as RandomCrop places it.

    Attributes:
        min_scale, max_scale: ends of the factor's range.
        size: (height, width) of the result in pixels.
    """

    min_scale: float
    max_scale: float
    size: Sequence[int]

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= self.max_scale:
            raise UserError(
                "INPUT.LARGE_SCALE_JITTER needs 0 < MIN_SCALE <= MAX_SCALE, "
                f"not {self.min_scale} and {self.max_scale}"
            )

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        height, width = self.size
        fit = min(height / labelled.size[0], width / labelled.size[1])
        scale = random.uniform(self.min_scale, self.max_scale) * fit
        new_height, new_width = (max(round(side * scale), 1) for side in labelled.size)
        resized = resize(labelled, new_height, new_width)
        cropped = crop_with_object(resized, height, width, random)
        if cropped.size[0] > height or cropped.size[1] > width:  # no window holds any object
            cropped = crop(resized, 0, 0, height, width)
        return pad(cropped, height, width)


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast, saturation and hue, in random order, as torchvision's ColorJitter.

    Attributes:
        brightness, contrast, saturation: factors are drawn from [max(0, 1 - value), 1 + value].
        hue: shift is drawn from [-hue, hue], at most 0.5.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation) < 0 or not 0 <= self.hue <= 0.5:
            raise UserError("INPUT.COLOR_JITTER strengths must not be negative, and HUE at most 0.5")

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        image = to_tensor(labelled.image, "RGB")
        changes: list[tuple[Callable[..., torch.Tensor], float]] = [
            (color.adjust_hue, random.uniform(-self.hue, self.hue))
        ]
        for adjust, strength in (
            (color.adjust_brightness, self.brightness),
            (color.adjust_contrast, self.contrast),
            (color.adjust_saturation, self.saturation),
        ):
            changes.append((adjust, random.uniform(max(0.0, 1 - strength), 1 + strength)))
        for i in random.permutation(len(changes)):
            adjust, factor = changes[i]
            image = adjust(image, factor)
        pixels = image.numpy().transpose(1, 2, 0)
        return LabelledImage(np.ascontiguousarray(pixels), labelled.boxes, labelled.labels, labelled.masks)


def build_augmentations(cfg: Config) -> list[Augmentation]:
    """The training augmentations that ``cfg.input`` asks for: crop, resize or jitter, flip, colour."""
    given = cfg.input
    chosen: list[Augmentation] = []
    if given.crop.enabled:
        chosen.append(RandomCrop(given.crop.type, given.crop.size))
    if given.large_scale_jitter.enabled:
        jitter = given.large_scale_jitter
        chosen.append(LargeScaleJitter(jitter.min_scale, jitter.max_scale, jitter.size))
    else:
        chosen.append(
            ResizeShortestEdge(given.min_size_train, given.max_size_train, given.min_size_train_sampling)
        )
    if given.random_flip not in ("none", "horizontal", "vertical"):
        raise UserError(
            f"INPUT.RANDOM_FLIP {given.random_flip!r} is unknown; choose horizontal, vertical or none"
        )
    if given.random_flip != "none":
        chosen.append(RandomFlip(vertical=given.random_flip == "vertical"))
    if given.color_jitter.enabled:
        strength = given.color_jitter
        chosen.append(ColorJitter(strength.brightness, strength.contrast, strength.saturation, strength.hue))
    return chosen


def prepare_image(image: np.ndarray, cfg: Config) -> torch.Tensor:
    """An RGB image (H, W, 3) uint8 as the network sees it at inference.

    Returns:
        (3, h, w) uint8 in ``INPUT.FORMAT`` order, its shorter side ``INPUT.MIN_SIZE_TEST`` unless the longer
        would pass ``INPUT.MAX_SIZE_TEST``.
    """
    height, width = image.shape[:2]
    size = shortest_edge_size(height, width, cfg.input.min_size_test, cfg.input.max_size_test)
    return to_tensor(resize_pixels(np.ascontiguousarray(image), *size), cfg.input.format)


def crops(cfg: Config) -> bool:
    """Whether training images are cropped, so that boxes have to be taken from the masks."""
    return cfg.input.crop.enabled or cfg.input.large_scale_jitter.enabled
