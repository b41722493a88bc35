"""Faults that PyTorch reports in its own words, in those of a user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..structures import Sample

if TYPE_CHECKING:
    from ..config import Config


@contextmanager
def memory_help(cfg: Config, batch: Sequence[Sample], doing: str) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into one that names the batch and the keys that reduce memory.

    Args:
        cfg: whole config.
        batch: that is being worked on.
        doing: such as ``"in the backward pass"``.

    Raises:
        UserError: the memory was not enough.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        height, width = max((s.image.shape[-2:] for s in batch), key=lambda size: size[0] * size[1])
        objects = [len(s.target) if s.target is not None else 0 for s in batch]
        raise UserError(
            f"out of GPU memory {doing}: {len(batch)} images in this process, the largest {width}x{height} "
            f"(width x height), {sum(objects)} instances ({max(objects)} in one image; image ids "
            f"{', '.join(str(s.image_id) for s in batch)}); {remedies(cfg, len(batch))}"
        ) from error


@contextmanager
def compile_help() -> Iterator[None]:
    """Turn a failure of ``torch.compile`` into one that names the key.

    Raises:
        UserError: the model could not be compiled.
    """
    try:
        yield
    except RuntimeError as error:
        # Told by name, as the module of the exceptions takes a second to import.
        if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            raise
        cause = getattr(error, "inner_exception", error)
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise UserError(
            f"MODEL.COMPILE True, but PyTorch cannot compile the model here: {reason.strip()}; on a CPU it "
            "needs a C++ compiler, such as Debian's package g++; MODEL.COMPILE False trains without"
        ) from error


def remedies(cfg: Config, images: int) -> str:
    """The keys that reduce memory and are not yet used, those that change the result least first."""
    solver, model = cfg.solver, cfg.model
    choices = []
    if images > 1:
        choices.append(f"raise SOLVER.ACCUMULATE ({solver.accumulate}), which gives the same update")
    if not model.backbone.activation_checkpointing and model.resnets.norm not in ("BN", "SyncBN"):
        choices.append("set MODEL.BACKBONE.ACTIVATION_CHECKPOINTING True")
    if not solver.amp.enabled:
        choices.append("set SOLVER.AMP.ENABLED True")
    choices.append(
        f"lower INPUT.MAX_SIZE_TRAIN ({cfg.input.max_size_train}) and INPUT.MIN_SIZE_TRAIN "
        f"({max(cfg.input.min_size_train)})"
    )
    choices.append(f"lower MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE ({model.roi_heads.batch_size_per_image})")
    return "; or ".join(choices)
