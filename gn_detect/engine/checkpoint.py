"""The checkpoints of a run folder: named and numbered as detectron2 does, readable by it and by us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..files import atomic_write_text
from ..weights import save_weights

LAST = "last_checkpoint"
"""A text file with the name of the newest checkpoint."""

FINAL = "model_final.pth"
BEST = "model_best.pth"


def checkpoint_name(iteration: int) -> str:
    """The file for a checkpoint that is saved after ``iteration``, counted from 0."""
    return f"model_{iteration:07d}.pth"


def save_checkpoint(
    folder: Path, name: str, model: nn.Module, metadata: dict[str, Any], *, is_last: bool = True
) -> Path:
    """Write ``{"model": state dict, **metadata}``; the file is whole or absent.

    Args:
        folder: ``OUTPUT_DIR``.
        name: file name.
        model: the plain model, not wrapped.
        metadata: ``iteration``, ``optimizer`` and more.
        is_last: note the name in ``last_checkpoint``.

    Raises:
        UserError: a weight is not finite, or the file cannot be written.
    """
    state = model.state_dict()
    finite = torch.stack([value.isfinite().all() for value in state.values()])
    if not finite.all():
        broken = next(key for key, good in zip(state, finite.tolist(), strict=True) if not good)
        raise UserError(
            f"training diverged: {broken} is not finite, so {name} was not saved; lower SOLVER.BASE_LR"
        )
    path = folder / name
    save_weights(path, state, metadata)
    if is_last:
        atomic_write_text(folder / LAST, name)
    return path


def find_last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that ``last_checkpoint`` names, or None in a folder without one.

    Raises:
        UserError: the named file is missing.
    """
    pointer = Path(folder) / LAST
    if not pointer.is_file():
        return None
    path = Path(folder) / pointer.read_text(encoding="utf-8").strip()
    if not path.is_file():
        raise UserError(f"{pointer} names {path.name}, which is missing; restore it or delete {pointer}")
    return path


def start_anew(folder: Path) -> None:
    """Forget the newest checkpoint of an earlier run, which ``--resume`` would take for this one's."""
    (folder / LAST).unlink(missing_ok=True)
