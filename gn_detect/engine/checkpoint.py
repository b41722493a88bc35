"""The checkpoints of a run folder: named and numbered as detectron2 does, readable by it and by us."""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import Diverged, UserError
from ..files import atomic_write_text
from ..weights import Checkpoint, read_checkpoint, save_weights
from .distributed import restart_count

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
"""A text file with the name of the newest checkpoint; detectron2's."""

HISTORY = "checkpoints.txt"
"""The names of the run's checkpoints that are kept, the newest last. Files of other runs are not in it."""

FINAL = "model_final.pth"
BEST = "model_best.pth"
METRICS = "metrics.jsonl"
INFERENCE, RESULTS, PICTURES = "inference", "results.json", "pictures"
CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
EARLIER = ".earlier"
"""Ending of what an earlier run left under a name that this one uses."""

DAMAGED = ".damaged"
"""Ending of a checkpoint that could not be read and was set aside."""


def checkpoint_name(iteration: int) -> str:
    """The file for a checkpoint that is saved after ``iteration``, counted from 0."""
    return f"model_{iteration:07d}.pth"


def save_checkpoint(
    folder: Path,
    name: str,
    model: nn.Module,
    metadata: dict[str, Any],
    *,
    is_last: bool = True,
    keep: int = 0,
) -> Path:
    """Write ``{"model": state dict, **metadata}``; the file is whole or absent.

    Args:
        folder: ``OUTPUT_DIR``.
        name: file name.
        model: the plain model, not wrapped.
        metadata: ``iteration``, ``optimizer`` and more.
        is_last: note the name in ``last_checkpoint``.
        keep: delete the run's checkpoints but the last so many (``CHECKPOINT.KEEP``); 0 deletes nothing.

    Raises:
        Diverged: a weight is not finite.
        UserError: the file cannot be written.
    """
    state = model.state_dict()
    finite = torch.stack([value.isfinite().all() for value in state.values()])
    if not finite.all():
        broken = next(key for key, good in zip(state, finite.tolist(), strict=True) if not good)
        raise Diverged(
            f"training diverged: {broken} is not finite, so {name} was not saved; lower SOLVER.BASE_LR"
        )
    path = folder / name
    save_weights(path, state, metadata)
    if is_last:
        names = [*(other for other in _history(folder) if other != name), name]
        dropped = names[:-keep] if keep else []
        atomic_write_text(folder / HISTORY, "".join(f"{other}\n" for other in names[len(dropped) :]))
        atomic_write_text(folder / LAST, name)
        for other in dropped:
            (folder / other).unlink(missing_ok=True)
    return path


def read_last_checkpoint(folder: str | Path, *, set_aside: bool = False) -> Checkpoint | None:
    """The newest checkpoint that can be read, or None in a folder without any.

    One that is missing, truncated or damaged is passed over with a warning, and the one before it is taken.

    Args:
        folder: ``OUTPUT_DIR``.
        set_aside: rename what is damaged, so that it is not tried again.

    Raises:
        UserError: none of the run's checkpoints can be read.
    """
    candidates = _candidates(Path(folder))
    if not candidates:
        return None
    complaint = ""
    for path in candidates:
        try:
            _check_sums(path)
            return read_checkpoint(path)
        except UserError as error:
            complaint = complaint or str(error)
            logger.warning("%s is passed over, and the checkpoint before it is used: %s", path.name, error)
            if set_aside and path.is_file():
                os.replace(path, path.with_name(path.name + DAMAGED))
    raise UserError(f"no checkpoint in {folder} can be read ({complaint}); start anew without --resume")


def _candidates(folder: Path) -> list[Path]:
    """The checkpoint that ``last_checkpoint`` names, then those before it, the newest first."""
    pointer = folder / LAST
    if not pointer.is_file():
        return []
    last = pointer.read_text(encoding="utf-8").strip()
    names = _history(folder)
    before = names[: names.index(last)] if last in names else [name for name in names if name != last]
    return [folder / name for name in [last, *reversed(before)]]


def _history(folder: Path) -> list[str]:
    path = folder / HISTORY
    lines = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return [name for name in lines if re.fullmatch(r"model_(\d+|final)\.pth", name)]


def _check_sums(path: Path) -> None:
    """Compare the content of a ``.pth`` with its CRC-32 sums, which ``torch.load`` does not read.

    Raises:
        UserError: they differ, or the file is cut off.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{path} is cut off or damaged: {error}") from error
    if damaged is not None:
        raise UserError(f"{path} is damaged at {damaged}")


def start_anew(folder: Path) -> None:
    """Forget the checkpoints of an earlier run, which ``--resume`` would take for this one's.

    Its best and last weights, metrics, evaluations and pictures, which this run writes under the same names,
    are kept aside, and the config that they need.
    """
    kept = [name for name in (BEST, FINAL, METRICS, INFERENCE, RESULTS, PICTURES) if (folder / name).exists()]
    kept += [name for name in (CONFIG, ENVIRONMENT) if kept and (folder / name).exists()]
    if restart_count() > 0:  # they are of this run's first attempt
        kept = []
    for name in kept:
        shutil.rmtree(folder / f"{name}{EARLIER}", ignore_errors=True)  # a folder takes no other's place
        os.replace(folder / name, folder / f"{name}{EARLIER}")
    if kept:
        names = " and ".join(f"{name}{EARLIER}" for name in kept)
        logger.warning(
            "%s holds an earlier run; what it left is now %s; OUTPUT_DIR gives each run its own folder",
            folder,
            names,
        )
    (folder / LAST).unlink(missing_ok=True)
    (folder / HISTORY).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while it wrote."""
    for place in ("", "inference/*/", "pictures/"):
        for path in folder.glob(f"{place}.*.tmp"):
            path.unlink(missing_ok=True)
