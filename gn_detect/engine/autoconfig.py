"""A config for data that nobody has written one for: each choice with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..text import printable
from ..weights import Architecture
from .machine import Machine
from .survey import Survey, anchor_recall, best_anchor_iou, sizes_of

BASE_FPN, BASE_C4 = "Base-RCNN-FPN.yaml", "Base-RCNN-C4.yaml"
"""Configs that a recipe goes on from."""

BATCH = 2
"""Images for each process: what the paper is about."""

BYTES_PER_PIXEL = {18: 2500, 34: 3000, 50: 6500, 101: 9500, 152: 13000}
"""Of memory in training by depth, for each pixel of the input: R-50 with GN in fp32 takes 6.3 kB (measured on
a CPU), and the others are set beside it. An estimate: it keeps a choice away from what cannot fit."""

FIXED_BYTES = 1.5e9
"""Weights, momentum, and what the heads keep for their RoIs."""

SMALL_OBJECT = 10
"""Pixels: an object whose side is shorter covers some two cells of the finest level."""

DEFAULT_SIZE, DEFAULT_RATIOS = 32.0, (0.5, 1.0, 2.0)
"""Of the smallest anchor, and of all, on COCO: what published detectors were trained with."""

SIZES = (32.0, 24.0, 16.0, 12.0, 8.0)
"""Choices for the smallest anchor, in pixels of the input."""


@dataclass(frozen=True)
class Choice:
    """Keys that were set together, with one line of reason."""

    topic: str
    keys: tuple[str, ...]
    reason: str


@dataclass
class Recipe:
    """Config keys, and why they are as they are.

    Attributes:
        given: the user's own keys, typed; they win, and what depends on them follows.
        base: config that the keys are set on.
        keys: all keys of the recipe, the given ones too.
        choices: in the order in which they were made.
    """

    given: Mapping[str, Any]
    base: str = BASE_FPN
    keys: dict[str, Any] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)

    def choose(self, topic: str, reason: str, keys: Mapping[str, Any]) -> None:
        """Set keys, but for those that are given."""
        self.keys |= {key: self.given.get(key, value) for key, value in keys.items()}
        kept = [key for key in keys if key in self.given]
        if kept:
            reason = f"{', '.join(kept)} as given" + ("" if len(kept) == len(keys) else f"; {reason}")
        self.choices.append(Choice(topic, tuple(keys), reason))

    def __str__(self) -> str:
        lines = []
        for choice in self.choices:
            keys = ", ".join(f"{key} {_shown(self.keys[key])}" for key in choice.keys)
            lines.append(f"  {choice.topic}: {choice.reason}" + (f" [{keys}]" if keys else ""))
        return "\n".join(map(printable, lines))


def make_recipe(
    data: Survey,
    machine: Machine,
    weights: str = "",
    architecture: Architecture | None = None,
    has_val: bool = True,
    given: Mapping[str, Any] | None = None,
) -> Recipe:
    """Choose everything that a training run on ``data`` needs.

    Args:
        weights: ``MODEL.WEIGHTS``; empty: from scratch.
        architecture: of the weights; None from scratch.
        has_val: whether there is something to evaluate on.
        given: keys that the user has set.
    """
    recipe = Recipe(dict(given or {}))
    _classes(recipe, data, architecture)
    _model(recipe, machine, weights, architecture)
    _batch(recipe, machine)
    _image_size(recipe, data, machine)
    _anchors(recipe, data, architecture)
    _solver(recipe, data, machine, architecture)
    _housekeeping(recipe, data, machine, has_val)
    recipe.keys |= recipe.given
    return recipe


def _classes(recipe: Recipe, data: Survey, architecture: Architecture | None) -> None:
    names = data.class_names
    listed = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    reason = f"{len(names)} in {data.name}: {listed}"
    if architecture is not None and architecture.class_names not in ([], names):
        reason += "; those of the weights start afresh"
    recipe.choose("classes", reason, {"MODEL.ROI_HEADS.NUM_CLASSES": len(names)})
    if data.has_masks:
        kind = "RLE, drawn as bitmaps" if data.has_bitmaps else "polygons"
        keys = {"MODEL.MASK_ON": True, "INPUT.MASK_FORMAT": "bitmask" if data.has_bitmaps else "polygon"}
        recipe.choose("masks", f"the objects have some ({kind})", keys)
    else:
        recipe.choose("masks", "no object has a segmentation: boxes alone", {"MODEL.MASK_ON": False})


GN_EVERYWHERE = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.FPN.NORM": "GN",
    "MODEL.ROI_BOX_HEAD.NORM": "GN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_MASK_HEAD.NORM": "GN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
"""The paper's detector: GN in all parts, and 4conv1fc in the box head."""


def _model(recipe: Recipe, machine: Machine, weights: str, architecture: Architecture | None) -> None:
    if architecture is not None:
        keys: dict[str, Any] = {"MODEL.WEIGHTS": weights}
        if not architecture.is_detector and architecture.norm == "GN":
            keys |= GN_EVERYWHERE
        if architecture.is_detector and "MODEL.FPN.OUT_CHANNELS" not in architecture.keys:
            recipe.base = BASE_C4
        keys |= architecture.keys
        recipe.keys |= {key: recipe.given.get(key, value) for key, value in keys.items()}
        reason = f"{architecture}, as the weights are"
        if architecture.norm == "FrozenBN":
            reason += "; BatchNorm stays frozen (gn-detect convert makes it GN)"
        recipe.choose("model", reason, {"MODEL.RESNETS.DEPTH": keys["MODEL.RESNETS.DEPTH"]})
        return
    keys = {"MODEL.WEIGHTS": "", "MODEL.BACKBONE.FREEZE_AT": 0} | GN_EVERYWHERE
    # From random weights the mean and deviation bring pixels to about -2 ... 2.
    keys["MODEL.PIXEL_STD"] = [57.375, 57.12, 58.395]
    if not machine.on_gpu:
        keys |= {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.FPN.OUT_CHANNELS": 64}
        keys |= {"MODEL.ROI_BOX_HEAD.CONV_DIM": 64, "MODEL.ROI_BOX_HEAD.FC_DIM": 256}
        keys |= {"MODEL.ROI_MASK_HEAD.CONV_DIM": 64}
        keys |= {"MODEL.RPN.BATCH_SIZE_PER_IMAGE": 128, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128}
    recipe.keys |= {key: recipe.given.get(key, value) for key, value in keys.items()}
    depth = 50 if machine.on_gpu else 18
    size = "" if machine.on_gpu else ", narrow enough for a CPU,"
    reason = (
        f"R-{depth}-FPN with GN{size} from random weights: possible with GN, but pretrained ones, such as "
        "--weights zoo://R-50-GN, need fewer images and iterations"
    )
    recipe.choose("model", reason, {"MODEL.RESNETS.DEPTH": depth})


def _batch(recipe: Recipe, machine: Machine) -> None:
    keys = {"SOLVER.IMS_PER_BATCH": BATCH * machine.processes}
    every = f"for each of {machine.processes} processes" if machine.processes > 1 else "at a time"
    recipe.choose("batch", f"{BATCH} images {every}", keys)


def _image_size(recipe: Recipe, data: Survey, machine: Machine) -> None:
    """A length of the shorter side for objects and time, within the memory."""
    natural, depth = data.short_edge, recipe.keys["MODEL.RESNETS.DEPTH"]
    elongation = min(max(data.elongation, 1.25), 2.0)
    if machine.on_gpu:
        length, reason = min(800, natural * 5 / 3), "5/3 of the images' median, at most 800, as on COCO"
    else:
        most = 256 if depth < 50 else 480
        length, reason = min(most, natural), f"the images' median, at most {most} on a CPU"
    # The smaller objects: a tenth is smaller still.
    small = float(np.quantile(sizes_of(data.boxes), 0.1)) * length / natural if len(data.boxes) else 100.0
    if small < SMALL_OBJECT:
        length = min(length * SMALL_OBJECT / small, 2 * natural, 2 * length)
        reason += f"; larger, as a tenth of the objects would be under {small:.0f} pixels"
    if machine.memory is not None:
        images = recipe.keys["SOLVER.IMS_PER_BATCH"] / machine.processes
        pixels = (0.8 * machine.memory - FIXED_BYTES) / (BYTES_PER_PIXEL[depth] * images)
        fitting = math.sqrt(max(pixels, 1) / elongation)
        if fitting < length:
            length, reason = fitting, f"what {images:g} images with {machine.memory / 2**30:.0f} GB leave"
    length = max(64, round(length / 32) * 32)
    longest = math.ceil(length * elongation / 32) * 32
    training = list(range(length * 4 // 5 // 32 * 32, length + 1, 32)) if machine.on_gpu else [length]
    keys = {
        "INPUT.MIN_SIZE_TRAIN": training,
        "INPUT.MAX_SIZE_TRAIN": longest,
        "INPUT.MIN_SIZE_TEST": length,
        "INPUT.MAX_SIZE_TEST": longest,
    }
    recipe.choose("image size", f"shorter side {natural} in the files; {reason}", keys)


def _anchors(recipe: Recipe, data: Survey, architecture: Architecture | None) -> None:
    """Sizes and aspect ratios by the share of objects that some anchor is near to.

    The numbers of sizes and ratios stay, so that a trained RPN fits.
    """
    known = architecture.keys if architecture is not None else {}
    sizes_key, ratios_key = "MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
    told, usual_ratios = known.get(sizes_key), tuple(known.get(ratios_key, [DEFAULT_RATIOS])[0])
    if sizes_key in recipe.given or ratios_key in recipe.given:
        keys = {key: recipe.given[key] for key in (sizes_key, ratios_key) if key in recipe.given}
        recipe.choose("anchors", "", keys)
        return
    test = recipe.keys["INPUT.MIN_SIZE_TEST"], recipe.keys["INPUT.MAX_SIZE_TEST"]
    boxes = data.resized_boxes(*test)
    pyramid = recipe.base == BASE_FPN
    strides = [4, 8, 16, 32, 64] if pyramid else [16]

    def levels(smallest: float) -> list[list[float]]:
        sizes = [smallest * 2**i for i in range(5)]
        return [[size] for size in sizes] if pyramid else [sizes]

    def recall(sizes: list[list[float]], ratios: tuple[float, ...]) -> float:
        return anchor_recall(best_anchor_iou(boxes, sizes, ratios, strides))

    usual = levels(DEFAULT_SIZE) if told is None else [list(level) for level in told]
    usual = usual if len(usual) == len(strides) else usual * len(strides)
    before = recall(usual, usual_ratios)
    # A trained RPN knows its anchors: others must gain more.
    margin = 0.05 if architecture is not None and architecture.is_detector else 0.01
    found = {size: recall(levels(size), usual_ratios) for size in SIZES}
    best = max(found.values())
    chosen, reached = usual, before
    if best > before + margin and [len(level) for level in usual] == [len(level) for level in levels(1.0)]:
        smallest = next(size for size in SIZES if found[size] >= best - 0.01)
        chosen, reached = levels(smallest), found[smallest]
    ratios = usual_ratios
    for candidate in _ratios_of(boxes) if len(usual_ratios) == 3 else []:
        share = recall(chosen, candidate)
        if share > reached + max(margin, 0.02):
            ratios, reached = candidate, share
    reason = f"{100 * reached:.1f}% of the objects have an anchor of IoU 0.5 or more after the resize"
    if (chosen, ratios) != (usual, usual_ratios):
        reason += f", {100 * before:.1f}% with the usual ones"
    if reached < 0.9:
        reason += "; low: larger images or other aspect ratios may help"
    recipe.choose("anchors", reason, {sizes_key: chosen, ratios_key: [list(ratios)]})


def _ratios_of(boxes: np.ndarray) -> list[tuple[float, ...]]:
    """Triples of height / width to try: wider apart, and the data's own."""
    if not len(boxes):
        return []
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(min=1e-3)
    own = np.quantile(sides[:, 1] / sides[:, 0], [0.1, 0.5, 0.9])
    return [(0.33, 1.0, 3.0), tuple(round(float(ratio), 2) for ratio in own)]


def _solver(recipe: Recipe, data: Survey, machine: Machine, architecture: Architecture | None) -> None:
    """Learning rate by the batch, iterations by the data; half a cosine, so that any length ends well."""
    batch, images = recipe.keys["SOLVER.IMS_PER_BATCH"], len(data.images)
    scratch = architecture is None
    if not machine.on_gpu:
        epochs, least, most = (6, 900, 4000) if scratch else (4, 400, 1000)
    elif scratch:
        epochs, least, most = 72, 20_000, 270_000 * 16
    else:
        assert architecture is not None
        epochs, least, most = (
            (12, 3000, 90_000 * 16) if architecture.is_detector else (24, 8000, 180_000 * 16)
        )
    seen = min(max(epochs * images, least), most)
    iterations = max(1, round(seen / batch))
    reason = f"{seen / images:.0f} passes over {images} images, {'CPU' if not machine.on_gpu else 'GPU'}"
    recipe.choose("schedule", reason, {"SOLVER.MAX_ITER": iterations})
    iterations = recipe.keys["SOLVER.MAX_ITER"]
    keys = {"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.STEPS": []}
    keys["SOLVER.WARMUP_ITERS"] = min(1000, max(1, iterations // 10))
    recipe.keys |= {key: recipe.given.get(key, value) for key, value in keys.items()}
    small = scratch and not machine.on_gpu
    rate = 0.005 if small else 0.02 / 16
    reason = f"{rate:g} for each image of the batch, with warm-up and half a cosine"
    recipe.choose("learning rate", reason, {"SOLVER.BASE_LR": rate * batch})
    recipe.keys["SOLVER.CLIP_GRADIENTS.ENABLED"] = recipe.given.get("SOLVER.CLIP_GRADIENTS.ENABLED", small)


def _housekeeping(recipe: Recipe, data: Survey, machine: Machine, has_val: bool) -> None:
    iterations = recipe.keys["SOLVER.MAX_ITER"]
    third = max(1, -(-iterations // 3))
    keys = {"SOLVER.CHECKPOINT_PERIOD": third, "CHECKPOINT.KEEP": 2}
    if has_val:
        keys["TEST.EVAL_PERIOD"] = third
        recipe.choose(
            "evaluation", f"{-(-iterations // third)} times; the best is kept as model_best.pth", keys
        )
    else:
        reason = "none: without --val-json nobody will know how good the model is"
        recipe.choose("evaluation", reason, keys)
    workers = min(4, machine.cores - 1) if machine.on_gpu else 0
    recipe.keys["DATALOADER.NUM_WORKERS"] = recipe.given.get("DATALOADER.NUM_WORKERS", workers)
    if data.most_objects > 100:
        many = math.ceil(data.most_objects * 1.2 / 100) * 100
        reason = f"up to {data.most_objects} objects in an image (COCO's AP counts the best 100)"
        recipe.choose("detections", reason, {"TEST.DETECTIONS_PER_IMAGE": many})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
