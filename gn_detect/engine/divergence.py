"""The black box: a record of a step whose loss or gradient is not finite, and its replay."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import dump_config, load_config, without_paths
from ..config.schema import RESNET_BACKBONES
from ..distributed.group import gather, get_rank, is_main, resolve_device
from ..errors import UserError
from ..files import atomic_write_json, atomic_write_text, json_values
from ..layers import FrozenBatchNorm2d
from ..modeling import make_model
from ..modeling.mask_rcnn import MaskRCNN
from ..structures import Sample, Target
from ..weights import CheckpointMetadata, load_weights, norm_settings, read_checkpoint, save_weights
from .checkpoint import CONFIG
from .metrics import NotFinite
from .run import Run
from .step import autocast, seed_iteration, split

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

STATE, REPORT = "state.pth", "report.json"
THE_MODEL = "the losses, which no module computes"

_FARTHEST = 100  # largest distance of a polygon from its crop, in sides of the image


@dataclass
class Finding:
    """The first places in a forward and backward pass that were not finite; None if all were finite."""

    losses: dict[str, float]
    weight: str | None  # a parameter or buffer of the model
    output: str | None  # a module
    gradient: str | None  # the module at whose output the gradient was not finite, going backwards

    @property
    def is_finite(self) -> bool:
        losses = all(math.isfinite(value) for value in self.losses.values())
        return losses and self.weight is None and self.output is None and self.gradient is None

    def __str__(self) -> str:
        if self.weight is not None:
            return f"the weight {self.weight} is not finite"
        if self.output is not None:
            return f"the first output that is not finite is that of {self.output}"
        if self.gradient is not None:
            return f"the first gradient that is not finite is at the output of {self.gradient}"
        return "everything is finite"


def keep_black_box(run: Run, error: NotFinite) -> str:
    """Write ``OUTPUT_DIR/black_box/iteration_N/``; all processes take part.

    Returns:
        One line about the cause, with a remedy.
    """
    run.state.optimizer.zero_grad(set_to_none=run.state.graphs is None)
    items = next(islice(run.loader.batches(), error.iteration - run.start, None))
    batch: list[Sample] = [run.loader.samples[item] for item in items]
    scale = run.state.scaler.get_scale()
    finding = examine(run.cfg, run.model, batch, error.iteration, get_rank(), scale)
    findings = dict(enumerate(gather(finding)))
    guilty = [rank for rank, found in findings.items() if not found.is_finite] or list(findings)
    batches = dict(enumerate(gather(batch if get_rank() in guilty else [])))
    batches = {rank: batches[rank] for rank in guilty}
    findings = {rank: findings[rank] for rank in guilty}
    folder = run.folder / "black_box" / f"iteration_{error.iteration:07d}"
    if is_main():
        write_black_box(folder, run.cfg, run.model, error.iteration, batches, findings, scale)
    values = ", ".join(f"{name} {value:.4g}" for name, value in error.losses.items())
    ids = ", ".join(str(sample.image_id) for part in batches.values() for sample in part)
    return (
        f"training diverged at iteration {error.iteration}: {values} (image ids {ids}); "
        f"{findings[guilty[0]]}; {_remedy(run)}; {replay_command(folder)} repeats the step"
    )


def _remedy(run: Run) -> str:
    frozen = any(isinstance(module, FrozenBatchNorm2d) for module in run.model.modules())
    if frozen and not run.cfg.model.weights and run.start == 0:
        section = "RESNETS" if run.cfg.model.backbone.name in RESNET_BACKBONES else "BACKBONE"
        remedy = f"set MODEL.{section}.NORM GN, or give weights"
        return f"FrozenBN without MODEL.WEIGHTS normalises nothing: {remedy}"
    return (
        f"lower SOLVER.BASE_LR ({run.cfg.solver.base_lr:g}), warm up longer with SOLVER.WARMUP_ITERS "
        f"or set SOLVER.CLIP_GRADIENTS.ENABLED True"
    )


def examine(
    cfg: Config, model: MaskRCNN, batch: Sequence[Sample], iteration: int, rank: int, scale: float
) -> Finding:
    """Repeat a step on a copy of the model and check the output and gradient of each module.

    Args:
        cfg: with the seed of the run, which decides the random numbers, together with iteration and rank.
        model: with the weights before the step, on its device.
        batch: of the process ``rank``.
        iteration: of the step.
        rank: of the process.
        scale: of the loss, in float16; otherwise 1.
    """
    model = copy.deepcopy(model).train()
    device = next(model.parameters()).device
    named = [*model.named_parameters(), *model.named_buffers()]
    broken = next((name for name, value in named if not value.isfinite().all()), None)
    watch = _Watch(model)
    seed_iteration(cfg.seed, iteration, rank)
    totals: dict[str, float] = {}
    parts = split(batch, cfg.solver.accumulate)
    for part in parts:
        with autocast(cfg, device):
            losses = model([sample.image for sample in part], [sample.target for sample in part])
            total = torch.stack(list(losses.values())).sum() / len(parts)
        (total * scale).backward()
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0.0) + float(loss.detach()) / len(parts)
    return Finding(totals, broken, watch.output, watch.gradient)


class _Watch:
    """Hooks that note the first module whose output, and the first whose gradient, is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.output: str | None = None
        self.gradient: str | None = None
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._forward, name or THE_MODEL))

    def _forward(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if self.output is None and not tensor.isfinite().all():
                self.output = name
            if tensor.requires_grad:
                tensor.register_hook(partial(self._backward, name))

    def _backward(self, name: str, gradient: Tensor) -> None:
        if self.gradient is None and not gradient.isfinite().all():
            self.gradient = name


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a module's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def write_black_box(
    folder: Path,
    cfg: Config,
    model: nn.Module,
    iteration: int,
    batches: Mapping[int, Sequence[Sample]],
    findings: dict[int, Finding],
    scale: float,
) -> None:
    """Write everything that a replay needs, on any machine: only the last part of local paths stays.

    ``batches`` and ``findings`` are those of the processes in which something was not finite, by rank. The
    other arguments are those of :func:`examine`.
    """
    content = {
        "iteration": iteration,
        "findings": {rank: asdict(finding) for rank, finding in findings.items()},
        "images": [
            {
                "rank": rank,
                "image_id": sample.image_id,
                "file_name": Path(sample.file_name).name,
                "size": list(sample.image.shape[-2:]),
                "boxes": sample.target.boxes.tolist() if sample.target is not None else [],
                "labels": sample.target.labels.tolist() if sample.target is not None else [],
            }
            for rank, batch in batches.items()
            for sample in batch
        ],
        "loss_scale": scale,
        "replay": replay_command(Path(folder.name)),
    }
    packed = {rank: [_pack(sample) for sample in batch] for rank, batch in batches.items()}
    others = {"batches": packed, "scale": scale}
    metadata = replace(norm_settings(model), iteration=iteration, others=others)
    save_weights(folder / STATE, model.state_dict(), metadata)
    atomic_write_text(folder / CONFIG, dump_config(without_paths(cfg)))
    atomic_write_json(folder / REPORT, json_values(content, not_finite=str), indent=1)
    names = {rank: [sample.file_name for sample in batch] for rank, batch in batches.items()}
    logger.info("%s holds the step, of images %s", folder, names)


def replay_command(folder: Path) -> str:
    """Return the command that repeats the step."""
    return f"gn-detect replay {folder}"


def replay(folder: str | Path) -> dict[int, Finding]:
    """Repeat the step that a black box holds.

    Returns:
        By rank, the places that are not finite.

    Raises:
        UserError: the folder is not a black box.
    """
    folder = Path(folder)
    if not (folder / STATE).is_file():
        raise UserError(
            "not-a-run",
            f"{folder} is not a black box: it has no {STATE}; give a folder under OUTPUT_DIR/black_box",
        )
    cfg = load_config(folder / CONFIG)
    checkpoint = read_checkpoint(folder / STATE)
    try:
        iteration, scale, batches = _read_state(checkpoint.metadata, cfg)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            "damaged-run-file",
            f"{folder / STATE} is not what a diverged training writes: {reason}; copy the whole folder again",
        ) from error
    model = make_model(cfg)
    load_weights(model, checkpoint)
    model.to(resolve_device(cfg.model.device))
    return {rank: examine(cfg, model, batch, iteration, rank, scale) for rank, batch in batches.items()}


def _read_state(known: CheckpointMetadata, cfg: Config) -> tuple[int, float, dict[int, list[Sample]]]:
    """Return iteration, scale and batches by rank, as :func:`write_black_box` packed them.

    Raises:
        TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError: one of them is something
            else, such as a sparse tensor, or does not fit ``cfg``.
    """
    iteration, scale, packed = known.iteration, known.others["scale"], known.others["batches"]
    if iteration is None:
        raise KeyError("iteration")
    if type(scale) not in (int, float) or not 0 < scale < math.inf:
        raise ValueError("its scale is not a number above 0")
    if cfg.seed < 0:
        raise ValueError(f"the SEED in {CONFIG} is negative, and that of a run is not")
    batches = {}
    for rank, samples in packed.items():
        if type(rank) is not int or not 0 <= rank < 2**20 or not isinstance(samples, list):
            raise ValueError("its batches are not lists by rank")
        if not samples or len(samples) % cfg.solver.accumulate:
            raise ValueError(f"SOLVER.ACCUMULATE does not divide its {len(samples)} images")
        batches[rank] = [_unpack(sample, cfg) for sample in samples]
    if not batches:
        raise ValueError("it has no images")
    return iteration, scale, batches


def _pack(sample: Sample) -> dict[str, Any]:
    """Return tensors and plain values, which ``torch.load(weights_only=True)`` reads."""
    target = sample.target
    masks = None if target is None or target.masks is None else [
        mask if isinstance(mask, Tensor) else [torch.from_numpy(polygon) for polygon in mask]
        for mask in target.masks
    ]  # fmt: skip
    return {
        "image": sample.image,
        "image_id": sample.image_id,
        "file_name": Path(sample.file_name).name,
        "original_size": list(sample.original_size),
        "boxes": None if target is None else target.boxes,
        "labels": None if target is None else target.labels,
        "masks": masks,
    }


def _unpack(packed: dict[str, Any], cfg: Config) -> Sample:
    """Undo :func:`_pack`; the errors are those of :func:`_read_state`."""
    classes = cfg.model.roi_heads.num_classes
    image, boxes, labels = packed["image"], packed["boxes"], packed["labels"]
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError("an image is not uint8 (3, H, W)")
    count = len(labels)
    if labels.dtype != torch.int64 or labels.dim() != 1 or not ((labels >= 0) & (labels < classes)).all():
        raise ValueError(f"its labels are not from 0 to {classes - 1}")
    if boxes.dtype != torch.float32 or boxes.shape != (count, 4) or not boxes.isfinite().all():
        raise ValueError(f"its boxes are not {count} of four numbers")
    height, width = packed["original_size"]
    masks = packed["masks"]
    if masks is None and cfg.model.mask_on:
        raise ValueError("it has no masks")
    if masks is not None:
        masks = [_unpack_mask(mask, (image.shape[1], image.shape[2])) for mask in masks]
        if len(masks) != count:
            raise ValueError(f"it has {len(masks)} masks for {count} boxes")
    size = int(height), int(width)
    return Sample(image, packed["image_id"], str(packed["file_name"]), size, Target(boxes, labels, masks))


def _unpack_mask(mask: Any, size: tuple[int, int]) -> Tensor | list[np.ndarray]:
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool or mask.shape != size:
            raise ValueError("a mask is not bool of its image's size")
        return mask
    polygons = [np.asarray(polygon, dtype=np.float64) for polygon in mask]
    for polygon in polygons:
        if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError("a polygon is not x and y of three points or more")
        if not (np.abs(polygon) <= _FARTHEST * max(size)).all():
            raise ValueError("a polygon is far outside its image")
    return polygons
