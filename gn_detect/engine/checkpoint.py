"""The checkpoints of a run folder: named and numbered as detectron2 does, so that both programs read them."""

from __future__ import annotations

import logging
import os
import re
import shutil
from bisect import bisect_right
from pathlib import Path

import torch
from torch import nn

from ..config.paths import CONFIG, ENVIRONMENT
from ..distributed.group import by_main
from ..errors import Diverged, UserError
from ..files import atomic_write_text
from ..weights import Checkpoint, CheckpointMetadata, read_checkpoint, save_weights

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"  # detectron2's text file with the name of the newest checkpoint
HISTORY = "checkpoints.txt"  # the checkpoints that this run keeps, the newest last
FINAL = "model_final.pth"
BEST = "model_best.pth"
METRICS = "metrics.jsonl"
LOGGERS = "loggers.json"  # the names that W&B and the like have for the run
INFERENCE, RESULTS, PICTURES = "inference", "results.json", "pictures"
AUGMENTED = "_TTA"  # detectron2's ending for results and folders of an evaluation with test-time augmentation

EARLIER = ".earlier"  # ending for files of an earlier run under a name that this run uses
DAMAGED = ".damaged"  # ending for a checkpoint, or a list of them, that could not be read

_OWN = r"model_([0-9]{1,18}|final)\.pth"  # a name in checkpoints.txt
# A name in last_checkpoint, which another program may have written: any file of the folder.
_ANY = r"[^./\\\x00-\x1f\x7f\ufffd][^/\\\x00-\x1f\x7f\ufffd]{0,250}\.pth"
_LONGEST_LIST = 1 << 22  # bytes of a list of checkpoints


def checkpoint_name(iteration: int) -> str:
    """Return the name of the checkpoint after ``iteration``, counted from 0."""
    return f"model_{iteration:07d}.pth"


def save_checkpoint(
    folder: Path,
    name: str,
    model: nn.Module,
    metadata: CheckpointMetadata,
    *,
    is_last: bool = True,
    keep: int = 0,
) -> Path:
    """Write a model's weights and metadata; the file is whole or absent.

    Args:
        folder: ``OUTPUT_DIR``.
        name: of the file.
        model: the plain model, not wrapped.
        metadata: everything besides the weights.
        is_last: write the name into ``last_checkpoint``.
        keep: number of the run's checkpoints to keep (``CHECKPOINT.KEEP``); 0 keeps all.

    Raises:
        Diverged: a weight is not finite.
        UserError: the file cannot be written.
    """
    state = model.state_dict()
    finite = torch.stack([value.isfinite().all() for value in state.values()])
    if not finite.all():
        broken = next(key for key, good in zip(state, finite.tolist(), strict=True) if not good)
        raise Diverged(
            "diverged",
            f"training diverged: {broken} is not finite, so {name} was not saved; lower SOLVER.BASE_LR",
        )
    path = folder / name
    save_weights(path, state, metadata)
    if is_last:
        others = [other for other in _read_names(folder / HISTORY, _OWN)[0] if other != name]
        _write_history(folder, [*others, name])
        atomic_write_text(folder / LAST, name)
        drop_old_checkpoints(folder, keep)
    return path


def drop_old_checkpoints(folder: Path, keep: int) -> None:
    """Delete the run's checkpoints except the last ``keep`` up to that of ``last_checkpoint``; 0 keeps all.

    Files are deleted before their names leave the list, so a kill in between leaves no unlisted file.
    """
    names, (last, _) = _read_names(folder / HISTORY, _OWN)[0], _read_names(folder / LAST, _OWN)
    end = names.index(last[0]) + 1 if last and last[0] in names else 0
    dropped = names[: max(end - keep, 0)] if keep else []
    for name in dropped:
        (folder / name).unlink(missing_ok=True)
    if dropped:
        _write_history(folder, names[len(dropped) :])


def read_last_checkpoint(folder: str | Path, *, set_aside: bool = False) -> Checkpoint | None:
    """Return the newest checkpoint that can be read, or None in a folder without any.

    A checkpoint that is missing, truncated or damaged is passed over with a warning, and the one before it is
    taken. A list of names with anything else than names of files in the folder is passed over, too.

    Args:
        folder: ``OUTPUT_DIR``.
        set_aside: rename damaged files, so that they are not tried again.

    Raises:
        UserError: none of the run's checkpoints can be read.
    """
    folder = Path(folder)
    candidates = _candidates(folder, set_aside)
    if not candidates:
        return None
    complaint = ""
    for path in candidates:
        try:
            if not path.is_file():
                raise UserError("missing-weights", f"{path} is missing")
            checkpoint = read_checkpoint(path)
        except Exception as error:  # a damaged file can raise any error
            reason = str(error) if isinstance(error, UserError) else f"{path} is damaged: {error!r}"
            complaint = complaint or reason
            logger.warning("%s is passed over, and the checkpoint before it is used: %s", path.name, reason)
            if set_aside and path.is_file():
                _set_aside(path)
        else:
            if set_aside and (path is not candidates[0] or not (folder / LAST).exists()):
                atomic_write_text(folder / LAST, path.name)
            return checkpoint
    raise UserError(
        "no-checkpoint", f"no checkpoint in {folder} can be read ({complaint}); start anew without --resume"
    )


def share_last_checkpoint(folder: str | Path, *, set_aside: bool = False) -> Checkpoint | None:
    """Return the checkpoint that :func:`read_last_checkpoint` finds in process 0, in all processes.

    While a training writes to the folder, each process alone could find another one.
    """
    own: Checkpoint | None = None

    def choose() -> Path | None:
        nonlocal own
        own = read_last_checkpoint(folder, set_aside=set_aside)
        return None if own is None else own.path

    chosen = by_main(choose)
    return read_checkpoint(chosen) if own is None and chosen is not None else own


def _candidates(folder: Path, set_aside: bool) -> list[Path]:
    """Return the checkpoint of ``last_checkpoint``, then those before it, the newest first."""
    last, last_is_whole = _read_names(folder / LAST, _ANY)
    names, names_are_whole = _read_names(folder / HISTORY, _OWN)
    if not last_is_whole or len(last) > 1:
        _pass_over_names(folder / LAST, set_aside)
        last, last_is_whole = [], False
    if not names_are_whole:
        _pass_over_names(folder / HISTORY, set_aside)
        if set_aside and names:
            _write_history(folder, names)  # the valid ones
    if not names and not (last_is_whole and names_are_whole):
        names = _checkpoints_in(folder)
    if last and names and last[0] != names[-1] and last[0] in names:
        logger.warning("%s names %s, though %s is newer", LAST, last[0], names[-1])
        names = names[: names.index(last[0])]
    # The first checkpoint of a run is in one list only until the other list is written.
    before = [name for name in names if name not in last]
    return [folder / name for name in [*last, *reversed(before)]]


def _read_names(path: Path, pattern: str) -> tuple[list[str], bool]:
    """Return the names in a list of checkpoints that match ``pattern``, and whether all do.

    The list has one name in each line; it may be missing.
    """
    if not path.exists():
        return [], True
    try:
        with path.open("rb") as file:
            content = file.read(_LONGEST_LIST)
    except OSError:
        return [], False
    lines = content.decode("utf-8", "replace").strip(" \n").split("\n")
    names = list(dict.fromkeys(line for line in lines if re.fullmatch(pattern, line)))
    return names, len(names) == len(lines) and len(content) < _LONGEST_LIST


def _checkpoints_in(folder: Path) -> list[str]:
    """Return the checkpoints in a folder without a list, in the order of their iterations."""
    names = sorted(path.name for path in folder.glob("model_*.pth") if re.fullmatch(_OWN, path.name))
    if FINAL in names and len(names) > 1:  # a longer run may have followed the final one
        names.remove(FINAL)
        try:
            iteration = read_checkpoint(folder / FINAL).metadata.iteration
        except UserError:
            iteration = None
        names.insert(bisect_right(names, checkpoint_name(-1 if iteration is None else iteration)), FINAL)
    return names


def _pass_over_names(path: Path, set_aside: bool) -> None:
    logger.warning("%s is damaged, and passed over: it holds more than names of checkpoints", path)
    if set_aside and path.exists():
        _set_aside(path)


def _set_aside(path: Path) -> None:
    os.replace(path, path.with_name(path.name + DAMAGED))


def _write_history(folder: Path, names: list[str]) -> None:
    atomic_write_text(folder / HISTORY, "".join(f"{name}\n" for name in names))


def start_anew(folder: Path) -> None:
    """Set the files of an earlier run aside, and forget its checkpoints, so that this run cannot resume them.

    Its best and last weights, metrics, evaluations and pictures, which this run writes under the same names,
    and their config get the ending ``.earlier``. A kill in between leaves the earlier run, or a folder
    without a config; the next attempt sets the rest aside.
    """
    of_runs = (FINAL, BEST, METRICS, LOGGERS, INFERENCE, f"{INFERENCE}{AUGMENTED}", RESULTS, PICTURES)
    kept = [name for name in of_runs if (folder / name).exists()]
    kept = [name for name in (CONFIG, ENVIRONMENT) if kept and (folder / name).exists()] + kept
    for name in kept:
        shutil.rmtree(folder / f"{name}{EARLIER}", ignore_errors=True)  # os.replace replaces no folder
        os.replace(folder / name, folder / f"{name}{EARLIER}")
        if name == FINAL:
            _forget(folder)
    if kept:
        names = " and ".join(f"{name}{EARLIER}" for name in kept)
        logger.warning(
            "%s holds an earlier run; what it left is now %s; OUTPUT_DIR gives each run its own folder",
            folder,
            names,
        )
    _forget(folder)


def _forget(folder: Path) -> None:
    (folder / LAST).unlink(missing_ok=True)
    (folder / HISTORY).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while writing. The caller holds the lock."""
    for place in ("", "inference/*/", "inference/*/*/", "pictures/", "black_box/*/"):
        for path in folder.glob(f"{place}.*.tmp"):
            path.unlink(missing_ok=True)
