"""The black box: what is kept of a step whose loss or gradient is not finite, and its replay."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import dump_config, load_config, without_paths
from ..distributed.group import resolve_device
from ..errors import UserError
from ..files import atomic_write_json, atomic_write_text
from ..structures import Sample, Target
from ..weights import CheckpointMetadata, load_weights, read_checkpoint, save_weights, set_norm_eps
from .model import make_model
from .step import autocast, split

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

STATE, CONFIG, REPORT = "state.pth", "config.yaml", "report.json"

_FARTHEST = 100
"""Most distance of a polygon from its crop, in sides of the image."""

THE_MODEL = "the losses, which no module computes"


@dataclass
class Finding:
    """What was not finite in one process' forward and backward pass; None where everything was.

    Attributes:
        losses: by name, as floats.
        weight: the first parameter or buffer of the model.
        output: the first module whose output was not finite.
        gradient: the module at whose output the gradient was first not finite, going backwards.
    """

    losses: dict[str, float]
    weight: str | None
    output: str | None
    gradient: str | None

    @property
    def is_finite(self) -> bool:
        """Whether nothing was found."""
        losses = all(math.isfinite(value) for value in self.losses.values())
        return losses and self.weight is None and self.output is None and self.gradient is None

    def __str__(self) -> str:
        places = [
            (self.weight, "the weight {} is not finite"),
            (self.output, "the first output that is not finite is that of {}"),
            (self.gradient, "the first gradient that is not finite is at the output of {}"),
        ]
        for place, text in places:
            if place is not None:
                return text.format(place)
        return "everything is finite"


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Random numbers of the model as a function of the iteration.

    Nothing that happens between iterations, an evaluation or a break, can change them, and no random state
    has to be saved.
    """
    torch.manual_seed((seed * 1_000_003 + iteration) * 4093 + rank)


def examine(
    cfg: Config,
    weights: dict[str, Tensor],
    batch: Sequence[Sample],
    iteration: int,
    rank: int,
    scale: float,
    eps: dict[str, float],
) -> Finding:
    """Repeat a step on a fresh copy of the model, with an eye on every module.

    Args:
        cfg: whole config, its seed decided.
        weights: state dict before the step.
        batch: of this process.
        iteration, rank: decide the random numbers.
        scale: of the loss, in float16; otherwise 1.
        eps: of group norms by name, where it is not the config's.
    """
    model = make_model(cfg)
    model.load_state_dict(weights)
    set_norm_eps(model, eps)
    device = resolve_device(cfg)
    model.to(device).train()
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
    """Notes the first module whose output, and the first whose gradient, is not finite."""

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
    """The floating-point tensors in a module's output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def write_black_box(
    folder: Path,
    cfg: Config,
    weights: dict[str, Tensor],
    iteration: int,
    batches: Mapping[int, Sequence[Sample]],
    findings: dict[int, Finding],
    scale: float,
    eps: dict[str, float],
) -> None:
    """Write everything that a replay needs, on any machine: of local paths the last part stays.

    Args:
        folder: is made.
        cfg, weights, iteration, scale, eps: see :func:`examine`.
        batches, findings: by rank, of the processes where something was not finite.

    Raises:
        UserError: the folder cannot be written.
    """
    names = {rank: [sample.file_name for sample in batch] for rank, batch in batches.items()}
    content = {
        "iteration": iteration,
        "findings": {str(rank): asdict(finding) for rank, finding in findings.items()},
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
    metadata = CheckpointMetadata(iteration=iteration, group_norm_eps=eps, others=others)
    save_weights(folder / STATE, weights, metadata)
    atomic_write_text(folder / CONFIG, dump_config(without_paths(cfg)))
    atomic_write_json(folder / REPORT, _plain(content), indent=1)
    logger.info("%s holds the step, of images %s", folder, names)


def replay_command(folder: Path) -> str:
    """What a user types to repeat the step."""
    return f"gn-detect replay {folder}"


def replay(folder: str | Path) -> dict[int, Finding]:
    """Repeat the step that a black box holds.

    Returns:
        What is not finite, by rank.

    Raises:
        UserError: the folder is not a black box.
    """
    folder = Path(folder)
    if not (folder / STATE).is_file():
        raise UserError(
            f"{folder} is not a black box: it has no {STATE}; give a folder under OUTPUT_DIR/black_box"
        )
    cfg = load_config(folder / CONFIG)
    checkpoint = read_checkpoint(folder / STATE)
    model = make_model(cfg)
    load_weights(model, checkpoint)
    try:
        iteration, scale, batches = _read_state(checkpoint.metadata, cfg)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"{folder / STATE} is not what a diverged training writes: {reason}; copy the whole folder again"
        ) from error
    return {
        rank: examine(cfg, model.state_dict(), batch, iteration, rank, scale, checkpoint.metadata.norm_eps)
        for rank, batch in batches.items()
    }


def _read_state(known: CheckpointMetadata, cfg: Config) -> tuple[int, float, dict[int, list[Sample]]]:
    """Return iteration, scale and batches by rank, as :func:`write_black_box` packed them.

    Raises:
        TypeError, ValueError, KeyError, AttributeError, OverflowError, RuntimeError: one of them is something
            else, such as a sparse tensor, or does not fit ``cfg``.
    """
    iteration, scale, packed = known.iteration, known.others["scale"], known.others["batches"]
    if iteration is None:
        raise ValueError("its iteration is not a number")
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
    """As tensors and plain values, which ``torch.load(weights_only=True)`` reads."""
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


def _plain(value: Any) -> Any:
    """JSON has no infinities: what is not finite becomes text."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
