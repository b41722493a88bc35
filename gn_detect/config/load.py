"""Configs from YAML files and from ``KEY VALUE`` pairs, and back to YAML."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import UserError
from ..files import read_text
from ..text import shortened
from .conflicts import conflicts, unread_groups
from .paths import find_again
from .schema import Root, implemented, is_below, key_fields, known_keys
from .types import to_plain, value_at
from .yaml_text import LARGEST, parse_yaml

COMMAND_LINE = "command line"

# Most files that make one config.
MOST_FILES = 16


class Config(Root):
    """A whole, checked, read-only configuration; :func:`load_config` makes it.

    ``SOLVER.MAX_ITER`` of detectron2 reads as ``cfg.solver.max_iter`` and as ``cfg.SOLVER.MAX_ITER``.
    """

    def replace(self, changes: Mapping[str, Any]) -> Config:
        """Return a checked copy with other values.

        Args:
            changes: dotted keys, such as ``{"SOLVER.MAX_ITER": 10}``.

        Raises:
            UserError: an unknown key or a value that does not fit.
        """
        tree = to_plain(self)
        for key, value in changes.items():
            merge(tree, nested(key, to_plain(value)), replace_mappings=True)
        return validate(tree, dict.fromkeys(changes, "changes"))


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return the config of a YAML file, with ``KEY VALUE`` pairs on top.

    Args:
        path: YAML with detectron2's keys; ``_BASE_`` in it names files, relative to it, that it builds on.
            A file that does not exist is looked for among the configs that come with the package, such as
            ``GN/mask_rcnn_R_50_FPN_2x_gn.yaml``. None starts from the defaults.
        overrides: keys and values in turn, such as ``["SOLVER.MAX_ITER", "100"]``.

    Raises:
        UserError: no such file, no YAML, an unknown key, a wrong or an unsupported value; the message names
            the file, the key, the value and what would fit.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        for source, values in read_chain(find_config(path)):
            merge(tree, find_again(values, source))
            origins |= dict.fromkeys(leaves(values), str(source))
    return validate(tree, origins | _merge_overrides(tree, overrides))


def _merge_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Write ``KEY VALUE`` pairs into ``tree``; return their origins."""
    if len(overrides) % 2:
        raise UserError(
            "missing-value", f"{COMMAND_LINE}: {overrides[-1]} has no value; give KEY VALUE pairs"
        )
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        merge(tree, nested(key, value), replace_mappings=True)
    return dict.fromkeys(overrides[::2], COMMAND_LINE)


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the typed values of ``KEY VALUE`` pairs. Each is checked by itself, not their combination.

    Raises:
        UserError: an unknown key, a key without a value, or a value of another type.
    """
    tree: dict[str, Any] = {}
    root = _check_types(tree, _merge_overrides(tree, overrides))
    return {key: value_at(root, key) for key in overrides[::2]}


def dump_config(cfg: Config) -> str:
    """Return all keys as YAML that :func:`load_config` reads back to an equal config."""
    return yaml.safe_dump(to_plain(cfg), sort_keys=False, default_flow_style=None, width=100)


def parse_config(text: str) -> Config:
    """Return the config that :func:`dump_config` wrote, as checkpoints contain it.

    Missing keys get their defaults.

    Raises:
        UserError: the text is no config.
    """
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError("not-yaml", f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError("not-a-config", "not a config; it needs KEY: value lines")
    return validate(tree, {})


def find_config(path: str | Path) -> Path:
    """Return the file itself, or the file of that name that comes with the package."""
    path = Path(path)
    if path.is_file():
        return path
    name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    package = Path(str(resources.files("gn_detect")))
    folders = (package / "configs", package.parent / "configs")  # in the wheel, or in a checkout
    for folder in folders:
        if not name.is_absolute() and (folder / name).is_file():
            return folder / name
    known = sorted(str(file.relative_to(folder)) for folder in folders for file in folder.rglob("*.yaml"))
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else "; give the path of a YAML file"
    raise UserError("missing-config", f"{path}: no such config file{hint}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return one file as nested dictionaries, ``_BASE_`` included.

    Raises:
        UserError: it cannot be read, is not YAML with keys and values, or is too large for a config.
    """
    try:
        values = parse_yaml(read_text(path, LARGEST))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError("cannot-read", f"{path}: cannot be read ({reason})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = shortened(" ".join(str(getattr(error, "problem", None) or error).split()), 200)
        remedy = "correct that line" if mark else "correct the file"
        raise UserError("not-yaml", f"{path}:{line} not YAML: {problem}; {remedy}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            "not-a-config", f"{path}: not a config; it needs KEY: value lines, not a {type(values).__name__}"
        )
    return values


def read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the files that ``path`` builds on, furthest first, then itself, with their values.

    A file that several others build on counts once, in the last of its places: the last file wins.

    Raises:
        UserError: see :func:`read_yaml`; or ``_BASE_`` names no file, leads back, or to too many files.
    """
    found: dict[Path, tuple[Path, dict[str, Any]]] = {}
    _follow(path, (), found)
    return list(reversed(found.values()))


def _follow(path: Path, above: tuple[Path, ...], found: dict[Path, tuple[Path, dict[str, Any]]]) -> None:
    """Add ``path`` and then its bases, the last first, to ``found``."""
    resolved = Path(os.path.realpath(path))
    if resolved in above:
        raise UserError(
            "bad-base", f"{path}: _BASE_ leads back to this file; remove it from one of the files"
        )
    if resolved in found:
        return
    if len(found) == MOST_FILES:
        raise UserError(
            "bad-base", f"{path}: _BASE_ leads to more than {MOST_FILES} files; join some of them"
        )
    values = read_yaml(path)
    bases = values.pop("_BASE_", None) or []
    found[resolved] = path, values
    files = []
    for base in bases if isinstance(bases, list | tuple) else [bases]:
        if not isinstance(base, str):
            raise UserError("bad-base", f"{path}: _BASE_: {base!r} is not the name of a file")
        files.append(Path(os.path.normpath(path.parent / Path(base).expanduser())))
        if not files[-1].is_file():
            raise UserError("missing-config", f"{path}: _BASE_: there is no file {files[-1]}")
    for file in reversed(files):
        _follow(file, (*above, resolved), found)


def nested(key: str, value: Any) -> dict[str, Any]:
    """Return ``{"A": {"B": value}}`` for ``A.B``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(tree: dict[str, Any], changes: Mapping[str, Any], replace_mappings: bool = False) -> None:
    """Write ``changes`` into ``tree``; ``replace_mappings``: a new ``DATASETS.REGISTER`` replaces the old."""
    for key, value in changes.items():
        whole = replace_mappings and key == "REGISTER"
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict) and not whole:
            merge(tree[key], value, replace_mappings)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all groups and values."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")


def validate(tree: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    """Return the config of nested dictionaries; the UserError for the first mistake names its origin."""
    cfg = _check_types(tree, origins)
    unread = tuple(unread_groups(cfg))
    for key in key_fields():
        choices, value = implemented(key), value_at(cfg, key)
        if choices and value not in choices and not is_below(key, unread):
            fitting = ", ".join(map(_show, choices))
            raise UserError(
                "unsupported-value",
                f"{_origin(key, origins)}{key}: {_show(value)} is not supported; it must be {fitting}",
            )
    for key, complaint in conflicts(cfg):
        raise UserError(
            "conflicting-keys", f"{_origin(key, origins)}{key}: {_show(value_at(cfg, key))} {complaint}"
        )
    return cfg


def _check_types(tree: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _refusal(error, origins) from None


def _refusal(error: ValidationError, origins: Mapping[str, str]) -> UserError:
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        near = nearest_key(key)
        hint = f"did you mean {near}?" if near else "gn-detect config reference lists all"
        return UserError("unknown-key", f"{_origin(key, origins)}{shortened(key, 200)}: unknown key; {hint}")
    known = [group for group in known_keys() if is_below(key, [group])]
    shown = max(known, key=len, default=key)
    remedy = f"; gn-detect config explain {shown} shows what fits" if known else ""
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    message = f"{shown}: {_show(first['input'])} does not fit: {problem}{remedy}"
    return UserError("bad-value", f"{_origin(shown, origins)}{message}")


def _show(value: Any) -> str:
    text = repr(to_plain(value) if isinstance(value, BaseModel) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Return ``file: `` of the key, of the last setting below it, or of the closest group around it."""
    below = [origin for other, origin in origins.items() if other.startswith(f"{key}.")]
    if key not in origins and below:
        return f"{below[-1]}: "
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return f"{origins[key]}: " if key else ""


def nearest_key(key: str) -> str | None:
    """Return the known key that ``key`` most likely stands for, or None.

    A key in the wrong group is found by its last part; otherwise spelling decides.
    """
    key = key.upper()
    name = key.rpartition(".")[2]
    by_name = {k.rpartition(".")[2]: k for k in reversed(known_keys())}
    same_name = [k for k in known_keys() if k.rpartition(".")[2] == name]
    near = difflib.get_close_matches(key, same_name or known_keys(), n=1, cutoff=0.0 if same_name else 0.6)
    near = near or [by_name[n] for n in difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)]
    return near[0] if near else None
