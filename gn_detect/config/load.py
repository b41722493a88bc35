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
from .paths import find_again
from .schema import Root
from .supported import SUPPORTED, conflicts, is_unread, unread
from .types import fields, to_plain, value_at
from .yaml_text import LARGEST, parse_yaml

COMMAND_LINE = "command line"

MOST_FILES = 16
"""Most files that make one config."""


class Config(Root):
    """A whole, checked, read-only configuration; sections and keys are lower-case attributes.

    ``cfg.solver.max_iter`` is ``SOLVER.MAX_ITER`` of detectron2. Made by :func:`load_config`.
    """

    def replace(self, changes: Mapping[str, Any]) -> Config:
        """A checked copy with other values.

        Args:
            changes: dotted keys, such as ``{"SOLVER.MAX_ITER": 10}``.

        Raises:
            UserError: an unknown key or a value that does not fit.
        """
        tree = to_plain(self)
        for key, value in changes.items():
            merge(tree, nested(key, to_plain(value)), replace_mappings=True)
        return validate(tree, {key: "changes" for key in changes})


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file, with ``KEY VALUE`` pairs on top.

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
    tree, own = _merge_overrides(tree, overrides)
    return validate(tree, origins | own)


def _merge_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """``tree`` with ``KEY VALUE`` pairs in it, and the origins of these."""
    if len(overrides) % 2:
        raise UserError(f"{COMMAND_LINE}: {overrides[-1]} has no value; give KEY VALUE pairs")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        merge(tree, nested(key, value), replace_mappings=True)
    return tree, dict.fromkeys(overrides[::2], COMMAND_LINE)


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Typed values of ``KEY VALUE`` pairs, each checked by itself: whether they fit together is not.

    Raises:
        UserError: an unknown key, a key without a value, or a value of another type.
    """
    tree, origins = _merge_overrides({}, overrides)
    root = _check_types(tree, origins)
    return {key: value_at(root, key) for key in overrides[::2]}


def dump_config(cfg: Config) -> str:
    """All keys as YAML that :func:`load_config` reads back to an equal config."""
    return yaml.safe_dump(to_plain(cfg), sort_keys=False, default_flow_style=None, width=100)


def parse_config(text: str) -> Config:
    """Return the config that :func:`dump_config` wrote, as files of weights hold it.

    Keys that it lacks have their defaults.

    Raises:
        UserError: it is none.
    """
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError("not a config; it needs KEY: value lines")
    return validate(tree, {})


def find_config(path: str | Path) -> Path:
    """The file itself, or the one of that name that comes with the package."""
    path = Path(path)
    if path.is_file():
        return path
    name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    for folder in shipped_folders():
        if not name.is_absolute() and (folder / name).is_file():
            return folder / name
    known = sorted(str(f.relative_to(folder)) for folder in shipped_folders() for f in folder.rglob("*.yaml"))
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else "; give the path of a YAML file"
    raise UserError(f"{path}: no such config file{hint}")


def shipped_folders() -> list[Path]:
    """Folders that hold the package's configs: in the wheel, or at the root of a checkout."""
    package = Path(str(resources.files("gn_detect")))
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def read_yaml(path: Path) -> dict[str, Any]:
    """One file as nested dictionaries, ``_BASE_`` included.

    Raises:
        UserError: it cannot be read, is not YAML with keys and values, or is too large for a config.
    """
    try:
        values = parse_yaml(read_text(path, LARGEST))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        problem = shortened(" ".join(str(getattr(error, "problem", None) or error).split()), 200)
        remedy = "correct that line" if mark else "correct the file"
        raise UserError(f"{path}:{line} not YAML: {problem}; {remedy}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a config; it needs KEY: value lines, not a {type(values).__name__}")
    return values


def read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The files that ``path`` builds on, furthest first, then itself.

    Each stands once, in the last of its places: what is merged later wins, so the others have no effect.

    Raises:
        UserError: see :func:`read_yaml`; or ``_BASE_`` names no file, leads back, or to too many files.
    """
    found: dict[Path, tuple[Path, dict[str, Any]]] = {}
    _follow(path, (), found)
    return list(reversed(found.values()))


def _follow(path: Path, above: tuple[Path, ...], found: dict[Path, tuple[Path, dict[str, Any]]]) -> None:
    """Put ``path`` and then its bases, the last first, into ``found``, as far as they are not there."""
    resolved = Path(os.path.realpath(path))
    if resolved in above:
        raise UserError(f"{path}: _BASE_ leads back to this file; remove it from one of the files")
    if resolved in found:
        return
    if len(found) == MOST_FILES:
        raise UserError(f"{path}: _BASE_ leads to more than {MOST_FILES} files; join some of them")
    values = read_yaml(path)
    bases = values.pop("_BASE_", None) or []
    found[resolved] = path, values
    files = []
    for base in bases if isinstance(bases, list | tuple) else [bases]:
        if not isinstance(base, str):
            raise UserError(f"{path}: _BASE_: {base!r} is not the name of a file")
        files.append(Path(os.path.normpath(path.parent / Path(base).expanduser())))
        if not files[-1].is_file():
            raise UserError(f"{path}: _BASE_: there is no file {files[-1]}")
    for file in reversed(files):
        _follow(file, (*above, resolved), found)


def nested(key: str, value: Any) -> dict[str, Any]:
    """``{"A": {"B": value}}`` for ``A.B``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(tree: dict[str, Any], changes: Mapping[str, Any], replace_mappings: bool = False) -> None:
    """Write ``changes`` into ``tree``, group by group.

    Args:
        replace_mappings: a new ``DATASETS.REGISTER`` takes the place of the old one.
    """
    for key, value in changes.items():
        whole = replace_mappings and key == "REGISTER"
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict) and not whole:
            merge(tree[key], value, replace_mappings)
        else:
            tree[key] = dict(value) if isinstance(value, Mapping) else value


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all groups and values."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")


def validate(tree: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    """The config of nested dictionaries.

    Args:
        tree: upper-case keys.
        origins: dotted key -> the file that it comes from, for messages.

    Raises:
        UserError: the first thing that is wrong.
    """
    cfg = _check_types(tree, origins)
    skipped = unread(cfg)
    for key, values in SUPPORTED.items():
        value = value_at(cfg, key)
        if value not in values and not is_unread(key, skipped):
            choices = ", ".join(map(_show, values))
            raise UserError(
                f"{_origin(key, origins)}{key}: {_show(value)} is not supported; it must be {choices}"
            )
    for key, complaint in conflicts(cfg):
        raise UserError(f"{_origin(key, origins)}{key}: {_show(value_at(cfg, key))} {complaint}")
    return cfg


def _check_types(tree: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    """Every value by itself."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_complaint(error, origins)) from None


def _complaint(error: ValidationError, origins: Mapping[str, str]) -> str:
    """One line for the first of pydantic's errors."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        near = nearest_key(key)
        hint = f"did you mean {near}?" if near else "gn-detect config reference lists all"
        return f"{_origin(key, origins)}{shortened(key, 200)}: unknown key; {hint}"
    known = [k for k in known_keys() if key == k or key.startswith(f"{k}.")]
    shown = max(known, key=len, default=key)
    remedy = f"; gn-detect config explain {shown} tells what fits" if shown in known_keys() else ""
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    return f"{_origin(shown, origins)}{shown}: {_show(first['input'])} does not fit: {problem}{remedy}"


def _show(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = to_plain(value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """``file: `` of the key, of what was last set below it, or of the closest group around it."""
    below = [origin for other, origin in origins.items() if other.startswith(f"{key}.")]
    if key not in origins and below:
        return f"{below[-1]}: "
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return f"{origins[key]}: " if key else ""


def known_keys(section: type[BaseModel] = Root, prefix: str = "") -> list[str]:
    """All dotted keys, groups included."""
    keys = []
    for key, attribute in fields(section):
        keys.append(f"{prefix}{key}")
        annotation = section.model_fields[attribute].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += known_keys(annotation, f"{prefix}{key}.")
    return keys


def nearest_key(key: str) -> str | None:
    """The known key that ``key`` most likely stands for, or None.

    A key in the wrong group is found by its last part; otherwise spelling decides.
    """
    key = key.upper()
    keys = known_keys()
    same_name = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
    candidates = same_name or keys
    near = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0 if same_name else 0.6)
    if not near:
        by_name = {k.rpartition(".")[2]: k for k in reversed(keys)}
        near = [
            by_name[n]
            for n in difflib.get_close_matches(key.rpartition(".")[2], list(by_name), n=1, cutoff=0.7)
        ]
    return near[0] if near else None
