"""The types of what a checkpoint holds beside the weights, checked once, where the file is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError

_MOST = 2**40
"""Iterations and updates, far beyond any training."""


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _MOST)


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    """Return a check for lists of exactly this type: True is no id."""
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


def _is_losses(value: Any) -> bool:
    return _is_dict(value) and all(isinstance(v, list) and all(map(_is_number, v)) for v in value.values())


def _is_state_dict(value: Any) -> bool:
    return _is_dict(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


Types = dict[str, tuple[str, Callable[[Any], bool]]]
"""By key: what belongs there, in words, and whether a value is that."""

SHARED: Types = {
    "config": ("text", lambda value: isinstance(value, str)),
    "input": ("values by name", _is_dict),
    "config_keys": ("values by key", _is_dict),
    "class_names": ("a list of names", _is_list_of(str)),
    "category_ids": ("a list of whole numbers", _is_list_of(int)),
}
"""Read from any file. What reads the keys of norms checks them."""

TRAINING: Types = {
    "iteration": ("a whole number", _is_count),
    "seed": ("a whole number", _is_count),
    "averaged_steps": ("a whole number", _is_count),
    "best": ("a number", _is_number),
    "evaluate_first": ("True or False", lambda value: isinstance(value, bool)),
    "losses": ("numbers by name", _is_losses),
    "optimizer": ("an optimiser's state", _is_dict),
    "scaler": ("numbers by name", lambda v: _is_dict(v) and all(map(_is_number, v.values()))),
    "trained": ("tensors by name", _is_state_dict),
}
"""Read by ``--resume``, from a file with one of :data:`_STATE`: elsewhere the names are free."""

_STATE = {"optimizer", "losses", "evaluate_first"}


def check_metadata(metadata: dict[str, Any], path: Path, *, ours: bool) -> None:
    """Check the values of :data:`SHARED` keys, and in a training's checkpoint of :data:`TRAINING` keys.

    Args:
        metadata: other programs' values of other types under these names are removed.
        path: of the file, for messages.
        ours: gn_detect wrote the file, so that another type is damage.

    Raises:
        UserError: the file is ours, and a value is of another type.
    """
    known = SHARED if _STATE.isdisjoint(metadata) else SHARED | TRAINING
    for key, (what, is_valid) in known.items():
        if key in metadata and not is_valid(metadata[key]):
            if ours:
                raise UserError(f"{path}: its '{key}' is not {what}, so the file is damaged; copy it again")
            del metadata[key]
