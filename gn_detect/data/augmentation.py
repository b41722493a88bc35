"""Random augmentation as in detectron2, and more: large-scale jitter, turns, affine maps, copy-paste.

Each augmentation is a callable of a LabelledImage and a NumPy generator, the only source of random numbers.
The config's schema bounds their settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torchvision.transforms.v2 import functional as color

from ..errors import UserError
from .albumentations_pipeline import AlbumentationsPipeline
from .transforms import (
    LabelledImage,
    Mask,
    affine,
    crop,
    drawn,
    flip_horizontal,
    flip_vertical,
    pad,
    paste,
    resize,
    resize_pixels,
    to_tensor,
    transpose,
)

if TYPE_CHECKING:
    from ..config import Config

Augmentation = Callable[[LabelledImage, np.random.Generator], LabelledImage]

_CROP_TRIES = 10


def shortest_edge_size(height: int, width: int, length: int, max_size: int) -> tuple[int, int]:
    """Return the size with a shorter side of ``length``, or less if the longer one would pass ``max_size``.

    Args:
        height, width: size of the image in pixels.
        length: shorter side; 0 keeps the size.
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

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        if self.sampling == "range":
            length = int(random.integers(min(self.lengths), max(self.lengths), endpoint=True))
        else:
            length = int(random.choice(np.asarray(self.lengths)))
        return resize(labelled, *shortest_edge_size(*labelled.size, length, self.max_size))


@dataclass(frozen=True)
class RandomFlip:
    """Flip of half of the images; ``vertical`` exchanges top and bottom, else left and right."""

    vertical: bool = False

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        if random.random() >= 0.5:
            return labelled
        return flip_vertical(labelled) if self.vertical else flip_horizontal(labelled)


@dataclass(frozen=True)
class RandomCrop:
    """A random window that holds at least part of an object, if there is any.

    The window contains the centre of the box of a random object. If it contains no part of a mask (the object
    may be a ring), another window is tried. After several tries the image stays whole.

    Attributes:
        kind: detectron2's ``INPUT.CROP.TYPE``: ``relative`` (fractions of height and width),
            ``relative_range`` (least fractions), ``absolute`` (height and width in pixels),
            ``absolute_range`` (least and largest side in pixels).
        amount: the two numbers of ``INPUT.CROP.SIZE``.
    """

    kind: str
    amount: Sequence[float]

    def __post_init__(self) -> None:
        if self.kind == "absolute_range" and self.amount[0] > self.amount[1]:
            raise UserError(
                "bad-value",
                f"INPUT.CROP.SIZE {list(self.amount)} does not fit TYPE {self.kind!r}; "
                "give the least and the largest side in pixels",
            )

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        return crop_with_object(labelled, *self.window_size(*labelled.size, random), random)

    def window_size(self, height: int, width: int, random: np.random.Generator) -> tuple[int, int]:
        """Return (height, width) of the window in an image of height x width pixels."""
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
    """Crop a random window of (height, width), at most the image, that keeps an object; see RandomCrop."""
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
    """Resize by a random factor, then crop or pad to a fixed size (arXiv 2012.07177).

    At factor 1 the image just fits into ``size``. A window that is smaller than the image is placed as in
    RandomCrop. detectron2 instead moves it by the same fraction in x and in y.

    Attributes:
        min_scale, max_scale: ends of the factor's range.
        size: (height, width) of the result in pixels.
    """

    min_scale: float
    max_scale: float
    size: Sequence[int]

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        height, width = self.size
        fit = min(height / labelled.size[0], width / labelled.size[1])
        scale = random.uniform(self.min_scale, self.max_scale) * fit
        new_height, new_width = (max(round(side * scale), 1) for side in labelled.size)
        return _fitted(resize(labelled, new_height, new_width), height, width, random)


def _fitted(labelled: LabelledImage, height: int, width: int, random: np.random.Generator) -> LabelledImage:
    """Crop a random window and pad, up to exactly (height, width)."""
    cropped = crop_with_object(labelled, height, width, random)
    if cropped.size[0] > height or cropped.size[1] > width:  # no window holds any object
        cropped = crop(labelled, 0, 0, height, width)
    return pad(_cut_at_borders(cropped), height, width)


def _cut_at_borders(labelled: LabelledImage) -> LabelledImage:
    """Cut boxes and polygons at the borders of the image; a cut polygon becomes a bitmap.

    A crop leaves polygons as they are. What it cut off would come back on the padding of a later step.
    """
    height, width = labelled.size
    masks = labelled.masks
    if masks is not None:
        masks = [drawn(mask, height, width) if _reaches_out(mask, height, width) else mask for mask in masks]
    return replace(labelled, boxes=labelled.boxes.clip(0, [width, height] * 2), masks=masks)


def _reaches_out(mask: Mask, height: int, width: int) -> bool:
    if not isinstance(mask, list) or not mask:
        return False
    points = np.concatenate(mask).reshape(-1, 2)
    return bool((points < 0).any() or (points > (width, height)).any())


@dataclass(frozen=True)
class RandomRotate90:
    """Turn by 0, 90, 180 or 270 degrees; with a flip these are all eight symmetries of a square."""

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        quarters = int(random.integers(4))
        if quarters % 2:
            labelled = transpose(labelled)
        if quarters in (1, 2):
            labelled = flip_vertical(labelled)
        return flip_horizontal(labelled) if quarters in (2, 3) else labelled


@dataclass(frozen=True)
class RandomAffine:
    """Rotate and scale around the centre, then move; as torchvision's RandomAffine without shear.

    Attributes:
        degrees: angles are from [-degrees, degrees].
        translate: moves are from [-translate, translate], as a part of width and height.
        min_scale, max_scale: ends of the factor's range.
    """

    degrees: float
    translate: float
    min_scale: float
    max_scale: float

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        size = np.array(labelled.size[::-1], dtype=np.float64)
        angle = np.deg2rad(random.uniform(-self.degrees, self.degrees))
        scale = random.uniform(self.min_scale, self.max_scale)
        move = random.uniform(-self.translate, self.translate, size=2) * size
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return affine(_cut_at_borders(labelled), np.column_stack([turn, size / 2 + move - turn @ (size / 2)]))


def copy_paste(labelled: LabelledImage, other: LabelledImage, random: np.random.Generator) -> LabelledImage:
    """Paste a random subset of the objects of another image (arXiv 2012.07177); both have masks.

    As in torchvision's reference, N objects are drawn with replacement from the N of ``other``: 0.63 of them
    on average. That reference resizes ``other`` to the size of the image and blurs borders. Here ``other`` is
    cropped or padded, so that objects keep their form, and no pixel outside of a mask changes.
    """
    other = _fitted(other, *labelled.size, random)
    chosen = np.zeros(len(other), dtype=bool)
    if len(other):
        chosen[random.integers(len(other), size=len(other))] = True
    return paste(labelled, other.select(chosen))


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast, saturation and hue, in random order, as torchvision's ColorJitter.

    Attributes:
        brightness, contrast, saturation: factors are from [max(0, 1 - value), 1 + value].
        hue: shift is from [-hue, hue], at most 0.5.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float

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
        return replace(labelled, image=np.ascontiguousarray(image.numpy().transpose(1, 2, 0)))


def build_augmentations(cfg: Config) -> list[Augmentation]:
    """Return the training augmentations of ``cfg.input`` for one image, in their order.

    Raises:
        UserError: ``INPUT.ALBUMENTATIONS`` cannot be read, or the package is missing.
    """
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
    if given.random_flip != "none":
        chosen.append(RandomFlip(vertical=given.random_flip == "vertical"))
    if given.rotate_90:
        chosen.append(RandomRotate90())
    if given.affine.enabled:
        moves = given.affine
        chosen.append(RandomAffine(moves.degrees, moves.translate, moves.min_scale, moves.max_scale))
    if given.color_jitter.enabled:
        strength = given.color_jitter
        chosen.append(ColorJitter(strength.brightness, strength.contrast, strength.saturation, strength.hue))
    if given.albumentations:
        chosen.append(AlbumentationsPipeline(given.albumentations))
    return chosen


def prepare_image(image: np.ndarray, cfg: Config) -> torch.Tensor:
    """Resize an RGB image (H, W, 3) uint8 for inference.

    Returns:
        (3, h, w) uint8 in ``INPUT.FORMAT`` order. Its shorter side is ``INPUT.MIN_SIZE_TEST``, or less if the
        longer one would pass ``INPUT.MAX_SIZE_TEST``.
    """
    height, width = image.shape[:2]
    size = shortest_edge_size(height, width, cfg.input.min_size_test, cfg.input.max_size_test)
    return to_tensor(resize_pixels(np.ascontiguousarray(image), *size), cfg.input.format)


def prepare_test_image(image: np.ndarray, cfg: Config) -> torch.Tensor:
    """Return what the detector of a config takes: :func:`prepare_image`, or with ``TEST.TILES`` the pixels.

    Tiles are cut from the pixels, and each is resized by itself.
    """
    return to_tensor(image, cfg.input.format) if cfg.test.tiles.size else prepare_image(image, cfg)


def cuts_objects(cfg: Config) -> bool:
    """Return whether training may cut or cover objects, so that boxes must come from the masks."""
    given = cfg.input
    return bool(
        given.crop.enabled
        or given.large_scale_jitter.enabled
        or given.affine.enabled
        or given.copy_paste
        or given.albumentations
        or cfg.dataloader.tiles.size
    )
