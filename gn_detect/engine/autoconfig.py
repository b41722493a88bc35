"""A config for data that have none: measure data and machine, choose each key, give the reason."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import load_config, read_overrides
from ..config.schema import LIBRARY_BACKBONES
from ..data.augmentation import shortest_edge_size
from ..data.coco.dataset import CocoDataset
from ..data.datasets import DatasetSource
from ..distributed.group import uses_cuda
from ..errors import UserError
from ..modeling import find_library, has_batch_norm
from ..text import printable
from ..weights import (
    Architecture,
    Checkpoint,
    implied_keys,
    library_config,
    read_architecture,
    read_checkpoint,
    unspecified_keys,
)
from .memory import cgroup_limits
from .pretrained import BASE_C4, BASE_FPN, as_pairs

if TYPE_CHECKING:
    from ..config import Config

OUTPUT = "output/finetune"  # OUTPUT_DIR of a run whose config was chosen

LOSS_IMAGES = 50  # the losses of an image take 0.42 of the time of its evaluation (nuclei, R-18-FPN, CPU)

BATCH = 2  # images for each process: the paper's question is how GN trains with so few

# Bytes of training memory for each pixel of the input, by depth. R-50 with GN in fp32 takes 6.3 kB (measured
# on a CPU); the others are estimates. They keep a choice away from what cannot fit.
BYTES_PER_PIXEL = {18: 2500, 34: 3000, 50: 6500, 101: 9500, 152: 13000}
FIXED_BYTES = 1.5e9  # weights, momentum and the heads' activations for their RoIs

SMALL_OBJECT = 10  # pixels; a smaller object covers about two cells of the finest level
NEAR = 0.5  # IoU from which the box head can move an anchor to an object

# Published detectors were trained on COCO with these: the smallest anchor in pixels, and height / width.
DEFAULT_SIZE, DEFAULT_RATIOS = 32.0, (0.5, 1.0, 2.0)
SIZES = (32.0, 24.0, 16.0, 12.0, 8.0)  # choices for the smallest anchor, in pixels of the input


@dataclass(frozen=True)
class Machine:
    """The machine of a run."""

    on_gpu: bool
    processes: int  # in the whole run
    memory: int | None  # bytes for each process, of the GPU or of the machine; None if it is not known
    cores: int  # of the CPU for each process

    def __str__(self) -> str:
        room = "" if self.memory is None else f", {self.memory / 2**30:.0f} GB"
        kind = "GPU" if self.on_gpu else "CPU"
        count = f"{self.processes} x " if self.processes > 1 else ""
        return f"{count}{kind}{room}" if self.on_gpu else f"{count}{kind} with {self.cores} cores{room}"


def find_machine(device: str, num_gpus: int, num_machines: int) -> Machine:
    """Describe the machine of ``MODEL.DEVICE`` and the given processes; torchrun's environment wins."""
    processes = int(os.environ.get("WORLD_SIZE", num_gpus * num_machines))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_gpus))
    cores = max(1, (os.cpu_count() or 1) // max(1, here))
    if uses_cuda(device) and torch.cuda.is_available():
        memory = int(torch.cuda.get_device_properties(0).total_memory)
        return Machine(True, processes, memory, cores)
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        room = min([whole, *(limit for limit, _ in cgroup_limits())]) // max(1, here)
    except (AttributeError, ValueError, OSError):  # not on every system
        room = None
    return Machine(False, processes, room, cores)


@dataclass(frozen=True)
class Survey:
    """Figures of a training set that decide about image size, anchors and schedule."""

    name: str
    class_names: list[str]
    images: np.ndarray  # (I, 2) int64 height and width in pixels of the file
    boxes: np.ndarray  # (A, 4) float64 xyxy in pixels of the file, without crowds
    image_of: np.ndarray  # (A,) int64 row of images for each box
    has_masks: bool
    has_bitmaps: bool  # some masks are RLE and not polygons
    most_objects: int  # in one image

    @property
    def short_edge(self) -> int:
        """Return the median of the shorter sides in pixels."""
        return int(np.median(self.images.min(axis=1)))

    @property
    def elongation(self) -> float:
        """Return the 95% quantile of longer side over shorter side."""
        return float(np.quantile(self.images.max(axis=1) / self.images.min(axis=1), 0.95))

    def resized_boxes(self, length: int, max_size: int) -> np.ndarray:
        """Return (A, 4) ``xyxy`` after the resize of ``INPUT.MIN_SIZE_*`` and ``MAX_SIZE_*``."""
        new = np.array([shortest_edge_size(h, w, length, max_size) for h, w in self.images.tolist()])
        scale = (new / self.images)[self.image_of]  # of height, of width
        boxes: np.ndarray = self.boxes * scale[:, [1, 0, 1, 0]]
        return boxes


def survey(source: DatasetSource, masks: bool | None = None) -> Survey:
    """Read the annotations of a dataset and measure them; no image is opened.

    Args:
        source: annotations and images.
        masks: read segmentations; by default, if some object has one.

    Raises:
        UserError: the annotations are not valid COCO, or an object lacks a mask where masks are read.
    """
    dataset = CocoDataset(source, masks=masks, quiet=True)  # the training logs what it reads
    counts, table = dataset.objects.counts(), dataset.objects.masks
    return Survey(
        dataset.name,
        list(dataset.class_names),
        dataset.images.sizes(),
        dataset.objects.boxes,
        np.repeat(np.arange(len(counts)), counts),
        table is not None,
        table is not None and len(table.rle) > 0,
        int(counts.max(initial=0)),
    )


def sizes_of(boxes: np.ndarray) -> np.ndarray:
    """Return (A,) square roots of the areas of (A, 4) ``xyxy`` boxes."""
    sizes: np.ndarray = np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
    return sizes


def best_anchor_iou(
    boxes: np.ndarray,
    sizes: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    strides: Sequence[int],
) -> np.ndarray:
    """Return the best IoU of each box with an anchor.

    With two boxes of given sides the overlap falls with the distance of the centres along each axis, so the
    best anchor of a shape stands at the nearest grid point.

    Args:
        boxes: (A, 4) ``xyxy`` in pixels of the network's input.
        sizes: square roots of areas, for each level.
        aspect_ratios: height / width, the same for all levels.
        strides: pixels between grid points, for each level.

    Returns:
        (A,) float64; anchors that cross the border of the image count.
    """
    best = np.zeros(len(boxes))
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    for level, stride in zip(sizes, strides, strict=True):
        distance = np.abs(centres - np.rint(centres / stride) * stride)
        for size in level:
            for ratio in aspect_ratios:
                anchor = np.array([size / ratio**0.5, size * ratio**0.5])
                overlap = np.minimum(np.minimum(sides, anchor), (sides + anchor) / 2 - distance)
                common = overlap.clip(min=0).prod(axis=1)
                best = np.maximum(best, common / (sides.prod(axis=1) + anchor.prod() - common))
    return best


def anchor_recall(iou: np.ndarray) -> float:
    """Return the share of objects, from 0 to 1, that have an anchor of IoU :data:`NEAR` or more."""
    return float((iou >= NEAR).mean()) if len(iou) else 0.0


@dataclass(frozen=True)
class Choice:
    """Keys that were set together, and one line of reason."""

    topic: str
    keys: tuple[str, ...]
    reason: str


@dataclass
class Recipe:
    """Config keys and the reasons for them; ``str`` gives one line for each choice."""

    data: Survey
    machine: Machine
    architecture: Architecture | None = None  # of the weights; None from scratch
    given: Mapping[str, Any] = field(default_factory=dict)  # the user's keys, typed: they win, others follow
    base: str = BASE_FPN  # config under the keys
    keys: dict[str, Any] = field(default_factory=dict)  # all, the given ones too
    choices: list[Choice] = field(default_factory=list)

    @property
    def facts(self) -> str:
        """Return what the choices depend on: ``12 images, 40 objects and GPU, 24 GB``."""
        return f"{len(self.data.images)} images, {len(self.data.boxes)} objects and {self.machine}"

    @property
    def reasons(self) -> dict[str, str]:
        """Return the reason of each choice by its topic, such as ``"anchors"``."""
        return {choice.topic: choice.reason for choice in self.choices}

    def set(self, keys: Mapping[str, Any]) -> None:
        """Set keys that the user has not given."""
        self.keys |= {key: self.given.get(key, value) for key, value in keys.items()}

    def choose(self, topic: str, reason: str, keys: Mapping[str, Any]) -> None:
        """Set keys and note the reason."""
        self.set(keys)
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
    """Choose the keys of a training run on ``data``.

    Args:
        weights: ``MODEL.WEIGHTS``; empty from scratch.
        architecture: of the weights; None from scratch.
        has_val: evaluate during the run.
        given: the user's own keys, typed.
    """
    recipe = Recipe(data, machine, architecture, dict(given or {}))
    _tiles(recipe)
    _classes(recipe)
    _model(recipe, weights)
    _batch(recipe)
    _image_size(recipe)
    _anchors(recipe)
    _solver(recipe)
    _housekeeping(recipe, has_val)
    recipe.keys |= recipe.given
    return recipe


def _tiles(recipe: Recipe) -> None:
    """Evaluate and predict in tiles like those to train on, which are what the other choices measure."""
    side, overlap = (recipe.given.get(f"DATALOADER.TILES.{key}") for key in ("SIZE", "OVERLAP"))
    if not side:
        return
    recipe.data = replace(recipe.data, images=recipe.data.images.clip(max=side))
    keys = {"TEST.TILES.SIZE": side} | ({} if overlap is None else {"TEST.TILES.OVERLAP": overlap})
    recipe.choose("tiles", "those of the training, so the model sees objects as large as it learned", keys)


def _classes(recipe: Recipe) -> None:
    data, architecture = recipe.data, recipe.architecture
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


# From random weights the mean and deviation bring pixels to about -2 ... 2.
RANDOM_STD = [57.375, 57.12, 58.395]

# The paper's detector: GN in all parts, and 4conv1fc in the box head.
GN_EVERYWHERE = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.FPN.NORM": "GN",
    "MODEL.ROI_BOX_HEAD.NORM": "GN",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_MASK_HEAD.NORM": "GN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}


# Heads that start afresh and are narrow enough for a CPU.
NARROW_HEADS = {
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 64,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 256,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 64,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 128,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128,
}

# Groups of at least 16 channels: a library's networks have layers that 32 groups do not divide.
LIBRARY_GROUPS = {"MODEL.GN.NUM_GROUPS": 32, "MODEL.GN.MIN_CHANNELS_PER_GROUP": 16}


def _library_model(recipe: Recipe, weights: str) -> None:
    """Choose the keys for ``MODEL.BACKBONE.MODEL``, a library's network, with heads that start afresh."""
    keys = {"MODEL.WEIGHTS": weights, "MODEL.BACKBONE.FREEZE_AT": 0} | GN_EVERYWHERE | LIBRARY_GROUPS
    keys |= {} if recipe.machine.on_gpu else NARROW_HEADS
    name, model = recipe.given["MODEL.BACKBONE.NAME"], recipe.given.get("MODEL.BACKBONE.MODEL", "")
    library = LIBRARY_BACKBONES[name]
    if recipe.architecture is not None:
        keys |= recipe.architecture.keys
    else:
        keys["MODEL.PIXEL_STD"] = RANDOM_STD
        keys["MODEL.BACKBONE.NORM"] = "GN" if model and has_batch_norm(library, model) else "keep"
    recipe.set(keys)
    norms = "with GN" if recipe.keys["MODEL.BACKBONE.NORM"] == "GN" else "with its own norms"
    reason = f"{library}'s {model} {norms}, FPN and heads with GN"
    reason += "" if recipe.machine.on_gpu else ", narrow enough for a CPU"
    if recipe.architecture is None:
        reason += ", from random weights; --weights FILE of its classifier needs fewer images and iterations"
    elif recipe.architecture.norm == "BN":
        reason += "; the BatchNorms of the weights are converted while they are loaded (gn-detect convert "
        reason += "--images --keep-scales brings them closer to the original first)"
    recipe.choose("model", reason, {"MODEL.BACKBONE.MODEL": model})


def backbone_keys(name: str) -> dict[str, str]:
    """Return the config keys of ``timm/NAME``, ``torchvision/NAME`` or a bare name, with an FPN.

    Raises:
        UserError: there is no such network; the message gives near names.
    """
    library, model = find_library(name)
    return {"MODEL.BACKBONE.NAME": f"build_{library}_fpn_backbone", "MODEL.BACKBONE.MODEL": model}


def library_classifier(checkpoint: Checkpoint, given: Mapping[str, Any]) -> Architecture:
    """Describe a classifier's weights for the network of the user's ``MODEL.BACKBONE`` keys."""
    library, model = LIBRARY_BACKBONES[given["MODEL.BACKBONE.NAME"]], given.get("MODEL.BACKBONE.MODEL", "")
    has_norms = bool(model) and has_batch_norm(library, model)
    keys = {"MODEL.BACKBONE.NORM": "GN" if has_norms else "keep"} | unspecified_keys(checkpoint)
    is_batch_norm = any(name.endswith(".running_var") for name in checkpoint.tensors)
    norm = "keep" if not has_norms else "BN" if is_batch_norm else "GN"
    return Architecture(keys, is_detector=False, has_masks=False, norm=norm)


def _model(recipe: Recipe, weights: str) -> None:
    machine, architecture = recipe.machine, recipe.architecture
    detects = architecture is not None and architecture.is_detector
    if recipe.given.get("MODEL.BACKBONE.NAME") in LIBRARY_BACKBONES and not detects:
        _library_model(recipe, weights)
        return
    if architecture is not None:
        keys: dict[str, Any] = {"MODEL.WEIGHTS": weights}
        if not architecture.is_detector and architecture.norm == "GN":
            keys |= GN_EVERYWHERE
        if architecture.is_detector and "MODEL.FPN.OUT_CHANNELS" not in architecture.keys:
            recipe.base = BASE_C4
        keys |= architecture.keys
        recipe.set(keys)
        reason = f"{architecture}, as the weights are"
        if architecture.norm == "FrozenBN":
            reason += "; BatchNorm stays frozen (gn-detect convert makes it GN)"
        key = "MODEL.BACKBONE.MODEL" if "MODEL.BACKBONE.MODEL" in keys else "MODEL.RESNETS.DEPTH"
        recipe.choose("model", reason, {key: keys[key]})
        return
    keys = {"MODEL.WEIGHTS": "", "MODEL.BACKBONE.FREEZE_AT": 0} | GN_EVERYWHERE
    keys["MODEL.PIXEL_STD"] = RANDOM_STD
    if not machine.on_gpu:
        keys |= {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64} | NARROW_HEADS
    recipe.set(keys)
    depth = 50 if machine.on_gpu else 18
    size = "" if machine.on_gpu else ", narrow enough for a CPU,"
    reason = (
        f"R-{depth}-FPN with GN{size} from random weights, which GN allows; pretrained weights, such as "
        "--weights zoo://R-50-GN, need fewer images and iterations"
    )
    recipe.choose("model", reason, {"MODEL.RESNETS.DEPTH": depth})


def _batch(recipe: Recipe) -> None:
    count = recipe.machine.processes
    every = f"for each of {count} processes" if count > 1 else "at a time"
    recipe.choose("batch", f"{BATCH} images {every}", {"SOLVER.IMS_PER_BATCH": BATCH * count})


def _image_size(recipe: Recipe) -> None:
    """Choose the shorter side for the objects and the time, within the memory."""
    data, machine = recipe.data, recipe.machine
    natural = data.short_edge
    depth = recipe.keys.get("MODEL.RESNETS.DEPTH", 50)  # a library's network counts as R-50
    elongation = min(max(data.elongation, 1.25), 2.0)
    if machine.on_gpu:
        length, reason = min(800, natural * 5 / 3), "5/3 of the images' median, at most 800, as on COCO"
    else:
        most = 256 if depth < 50 else 480
        length, reason = min(most, natural), f"the images' median, at most {most} on a CPU"
    # A tenth of the objects is smaller.
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


def _anchors(recipe: Recipe) -> None:
    """Choose sizes and aspect ratios by the share of objects with a near anchor.

    Their numbers stay, so that a trained RPN fits.
    """
    architecture = recipe.architecture
    known = architecture.keys if architecture is not None else {}
    sizes_key, ratios_key = "MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"
    known_sizes, usual_ratios = known.get(sizes_key), tuple(known.get(ratios_key, [DEFAULT_RATIOS])[0])
    if sizes_key in recipe.given or ratios_key in recipe.given:
        keys = {key: recipe.given[key] for key in (sizes_key, ratios_key) if key in recipe.given}
        recipe.choose("anchors", "", keys)
        return
    boxes = recipe.data.resized_boxes(recipe.keys["INPUT.MIN_SIZE_TEST"], recipe.keys["INPUT.MAX_SIZE_TEST"])
    pyramid = recipe.base == BASE_FPN
    strides = [4, 8, 16, 32, 64] if pyramid else [16]

    def levels(smallest: float) -> list[list[float]]:
        sizes = [smallest * 2**i for i in range(5)]
        return [[size] for size in sizes] if pyramid else [sizes]

    def recall(sizes: list[list[float]], ratios: tuple[float, ...]) -> float:
        return anchor_recall(best_anchor_iou(boxes, sizes, ratios, strides))

    usual = levels(DEFAULT_SIZE) if known_sizes is None else [list(level) for level in known_sizes]
    usual = usual if len(usual) == len(strides) else usual * len(strides)
    before = recall(usual, usual_ratios)
    # A trained RPN has learned its anchors: others must gain more.
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
    """Return triples of height / width to try: wider apart, and quantiles of the data."""
    if not len(boxes):
        return []
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(min=1e-3)
    own = np.quantile(sides[:, 1] / sides[:, 0], [0.1, 0.5, 0.9])
    return [(0.33, 1.0, 3.0), tuple(round(float(ratio), 2) for ratio in own)]


def _solver(recipe: Recipe) -> None:
    """Choose the learning rate by the batch and the iterations by the data.

    Half a cosine ends well at any length.
    """
    batch, images = recipe.keys["SOLVER.IMS_PER_BATCH"], len(recipe.data.images)
    on_gpu, architecture = recipe.machine.on_gpu, recipe.architecture
    if not on_gpu:
        epochs, least, most = (6, 900, 4000) if architecture is None else (4, 400, 1000)
    elif architecture is None:
        epochs, least, most = 72, 20_000, 270_000 * 16
    elif architecture.is_detector:
        epochs, least, most = 12, 3000, 90_000 * 16
    else:
        epochs, least, most = 24, 8000, 180_000 * 16
    seen = min(max(epochs * images, least), most)
    reason = f"{seen / images:.0f} passes over {images} images, {'GPU' if on_gpu else 'CPU'}"
    recipe.choose("schedule", reason, {"SOLVER.MAX_ITER": max(1, round(seen / batch))})
    iterations = recipe.keys["SOLVER.MAX_ITER"]
    recipe.set({"SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER.STEPS": []})
    recipe.set({"SOLVER.WARMUP_ITERS": min(1000, max(1, iterations // 10))})
    rate, is_clipped = 0.02 / 16, False
    if not on_gpu and architecture is None:
        rate, is_clipped = 0.005, True
    is_backbone = architecture is not None and not architecture.is_detector
    if is_backbone and not on_gpu and recipe.keys.get("MODEL.BACKBONE.NORM") == "GN":
        rate, is_clipped = 0.0075, True  # the best of four for MobileNetV2, 450 images (benchmarks/README.md)
    reason = f"{rate:g} for each image of the batch, with warm-up and half a cosine"
    recipe.choose("learning rate", reason, {"SOLVER.BASE_LR": rate * batch})
    recipe.set({"SOLVER.CLIP_GRADIENTS.ENABLED": is_clipped})


def _housekeeping(recipe: Recipe, has_val: bool) -> None:
    iterations = recipe.keys["SOLVER.MAX_ITER"]
    third = max(1, -(-iterations // 3))
    keys = {"SOLVER.CHECKPOINT_PERIOD": third, "CHECKPOINT.KEEP": 2}
    reason = "none: without --val-json nobody will know how good the model is"
    if has_val:
        keys["TEST.EVAL_PERIOD"] = third
        recipe.set({"TEST.LOSS_IMAGES": LOSS_IMAGES})
        reason = f"{-(-iterations // third)} evaluations; the best model is kept as model_best.pth"
    recipe.choose("evaluation", reason, keys)
    data, machine = recipe.data, recipe.machine
    recipe.set({"DATALOADER.NUM_WORKERS": min(4, machine.cores - 1) if machine.on_gpu else 0})
    if data.most_objects > 100:
        many = math.ceil(data.most_objects * 1.2 / 100) * 100
        reason = f"up to {data.most_objects} objects in an image (COCO's AP counts the best 100)"
        recipe.choose("detections", reason, {"TEST.DETECTIONS_PER_IMAGE": many})


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def choose_config(
    train_json: str | Path,
    train_images: str | Path,
    overrides: Sequence[str] = (),
    *,
    has_val: bool = True,
    num_gpus: int = 1,
    num_machines: int = 1,
) -> tuple[Config, Recipe]:
    """Choose a config for a COCO dataset, this machine and the weights in ``overrides``.

    The datasets are not in it yet, see :func:`with_datasets`; the recipe holds the reasons.

    Args:
        train_json: COCO annotations.
        train_images: their folder.
        overrides: ``KEY VALUE`` pairs of the user: they win, and the other choices follow them.
        has_val: evaluate during the run.
        num_gpus: processes on each machine.
        num_machines: machines.

    Raises:
        UserError: the data, the weights or a given key are wrong.
    """
    given = read_overrides(overrides)
    file, folder = Path(train_json), Path(train_images)
    if not folder.is_dir():
        raise UserError("missing-images-folder", f"images folder {folder} is missing; correct --train-images")
    allow_outside = bool(given.get("DATASETS.ALLOW_OUTSIDE", False))
    data = survey(DatasetSource(file.name, file, folder, allow_outside), masks=given.get("MODEL.MASK_ON"))
    if not len(data.boxes):
        raise UserError("no-objects", f"{file} has no objects to learn from; annotate some")
    weights = str(given.get("MODEL.WEIGHTS", ""))
    checkpoint = read_checkpoint(weights) if weights else None
    architecture = None
    if checkpoint is not None:
        of_library = given.get("MODEL.BACKBONE.NAME") in LIBRARY_BACKBONES and not library_config(checkpoint)
        architecture = library_classifier(checkpoint, given) if of_library else read_architecture(checkpoint)
    machine = find_machine(str(given.get("MODEL.DEVICE", "auto")), num_gpus, num_machines)
    recipe = make_recipe(data, machine, weights, architecture, has_val, given)
    recipe.keys.setdefault("OUTPUT_DIR", OUTPUT)
    # The user's keys stand last and as they were typed, so that messages quote them.
    chosen = {key: value for key, value in recipe.keys.items() if key not in given}
    cfg = load_config(recipe.base, [*as_pairs(chosen), *overrides])
    if checkpoint is not None:
        implied = {key: value for key, value in implied_keys(cfg, checkpoint).items() if key not in given}
        cfg = cfg.replace(implied)
        if implied:
            recipe.choose("input", "what the weights were trained with", implied)
    return cfg, recipe


def with_datasets(cfg: Config, train: tuple[str, str] | None, val: tuple[str, str] | None) -> Config:
    """Return ``cfg`` with annotations and images registered as the datasets ``train`` and ``val``.

    Without ``train`` the training sets stay; without ``val`` there is no test set.
    """
    entries: dict[str, Any] = dict(cfg.datasets.registered)
    changes: dict[str, Any] = {"DATASETS.TEST": ["val"] if val else []}
    if train:
        changes["DATASETS.TRAIN"] = ["train"]
    for name, pair in (("train", train), ("val", val)):
        if pair:
            entries[name] = {"ANNOTATIONS": pair[0], "IMAGES": pair[1]}
    return cfg.replace({**changes, "DATASETS.REGISTER": entries})
