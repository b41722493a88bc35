"""Paths in a config: made absolute, found again after the run's folder moved, or removed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import read_text
from .types import to_plain

if TYPE_CHECKING:
    from .load import Config

# Two files of a run's folder, and the key in environment.json for the folder in which the run wrote both.
CONFIG, ENVIRONMENT, FOLDER = "config.yaml", "environment.json", "folder"

# Most bytes of an environment.json.
_LARGEST = 1 << 20


def with_absolute_paths(cfg: Config) -> Config:
    """Return a config that means the same from every folder."""
    return _with_paths(cfg, _absolute, output=_absolute(cfg.output_dir))


def without_paths(cfg: Config) -> Config:
    """Return a config that may be passed on: paths keep their last part alone, URLs no password or query."""
    cfg = _with_paths(cfg, _last_part, output="./output", root="")
    return cfg.replace({"MODEL.WEIGHTS": without_secrets(cfg.model.weights)})


def without_secrets(url: str) -> str:
    """Return a URL without user, password and query; other text unchanged."""
    return re.sub(r"://(?:[^/]*@)?([^?#]*).*", r"://\1", url)


def _with_paths(cfg: Config, change: Callable[[str], str], output: str, root: str | None = None) -> Config:
    entries = {}
    for name, entry in cfg.datasets.registered.items():
        paths = {"ANNOTATIONS": change(entry.annotations), "IMAGES": change(entry.images)}
        entries[name] = {**to_plain(entry), **paths}
    changes: dict[str, Any] = {"DATASETS.REGISTER": entries, "OUTPUT_DIR": output}
    if cfg.datasets.root:
        changes["DATASETS.ROOT"] = change(cfg.datasets.root) if root is None else root
    if is_local(cfg.model.weights):
        changes["MODEL.WEIGHTS"] = change(cfg.model.weights)
    if cfg.input.albumentations:
        changes["INPUT.ALBUMENTATIONS"] = change(cfg.input.albumentations)
    return cfg.replace(changes)


def is_local(path: str) -> bool:
    """Return whether a path, such as ``MODEL.WEIGHTS``, names a local file: it is not empty and no URL."""
    return bool(path) and (path.startswith("file:") or not re.match(r"[\w.+-]{2,}://", path))


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "."


def find_again(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the values of a run's own ``config.yaml`` with paths that are valid in its present place.

    ``OUTPUT_DIR`` becomes the present folder. Missing data and weights are searched at their old place
    relative to the run's folder, then in the folders around it. Values of other files stay unchanged.
    """
    found = dict(values)
    folder, before = Path(os.path.abspath(file.parent)), values.get("OUTPUT_DIR")
    if file.name != CONFIG or not isinstance(before, str) or not _is_own(before, folder):
        return found
    found["OUTPUT_DIR"] = str(folder)

    def find(path: Any) -> Any:
        if not isinstance(path, str) or not is_local(path) or os.path.exists(os.path.expanduser(path)):
            return path
        return next((str(p) for p in _candidates(path, before, folder) if os.path.exists(p)), path)

    for group, key in (("MODEL", "WEIGHTS"), ("DATASETS", "ROOT"), ("INPUT", "ALBUMENTATIONS")):
        if isinstance(found.get(group), dict) and key in found[group]:
            found[group] = {**found[group], key: find(found[group][key])}
    datasets = found.get("DATASETS")
    if isinstance(datasets, dict) and isinstance(datasets.get("REGISTER"), dict):
        register = {
            name: {key: find(value) for key, value in entry.items()} if isinstance(entry, dict) else entry
            for name, entry in datasets["REGISTER"].items()
        }
        found["DATASETS"] = {**datasets, "REGISTER": register}
    return found


def _is_own(before: str, folder: Path) -> bool:
    """Return whether the run itself wrote ``OUTPUT_DIR``; a user may have changed it on purpose."""
    try:
        written = json.loads(read_text(folder / ENVIRONMENT, _LARGEST))
        # Runs of earlier versions did not write it.
        return bool(before == written[FOLDER] if FOLDER in written else Path(before).name == folder.name)
    except (OSError, ValueError, TypeError, RecursionError, UserError):
        return False


def _candidates(path: str, before: str, folder: Path) -> Iterator[Path]:
    """Yield places of a path after its run moved from ``before`` to ``folder``."""
    path, before = os.path.expanduser(path), os.path.expanduser(before)
    if os.path.isabs(path) != os.path.isabs(before):
        return
    # Relative paths were all relative to the same, unknown folder.
    path, before = (os.path.normpath(os.path.join(os.sep, each)) for each in (path, before))
    yield Path(os.path.normpath(folder / os.path.relpath(path, before)))
    below = os.path.relpath(path, os.path.commonpath([path, before]))
    yield from (around / below for around in (folder, *folder.parents))
