"""The eps of each GroupNorm, which no state dict holds: a converted model may have another in each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from .checkpoint import Checkpoint, strip_wrappers

NORM_EPS = "group_norm_eps"
"""The key in a checkpoint's metadata: eps by name of the norm."""

USUAL = 1e-5
"""PyTorch's, detectron2's and the config's default."""


def norm_eps(model: nn.Module) -> dict[str, Any]:
    """What to add to a checkpoint's metadata; see :func:`as_metadata`."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    return as_metadata({name: norm.eps for name, norm in strip_wrappers(norms).items()})


def as_metadata(eps: Mapping[str, float]) -> dict[str, Any]:
    """Nothing, or the eps of all norms, by name, if one is not ``USUAL``."""
    usual = all(value == USUAL for value in eps.values())
    return {} if usual else {NORM_EPS: {name: float(value) for name, value in eps.items()}}


def norm_eps_of(checkpoint: Checkpoint, tensors: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """By name of the norm; empty where the file tells none.

    Args:
        tensors: the checkpoint's under other names, which the result then has, too; by default its own.

    Raises:
        UserError: what it tells is no eps.
    """
    told = checkpoint.metadata.get(NORM_EPS, {})
    if not isinstance(told, dict) or not all(_is_eps(value) for value in told.values()):
        raise UserError(
            f"{checkpoint.path}: its '{NORM_EPS}' is not the eps of each norm, so the file is damaged; "
            "write it again with gn-detect convert"
        )
    names = {id(tensor): name for name, tensor in (tensors or checkpoint.tensors).items()}

    def renamed(norm: str) -> str:
        weight = checkpoint.tensors.get(_weight_of(norm))
        name = names.get(id(weight))
        return str(norm) if name is None else name.removesuffix("weight").removesuffix(".")

    return {renamed(norm): float(value) for norm, value in told.items()}


def set_norm_eps(model: nn.Module, eps: Mapping[str, float]) -> list[str]:
    """Give the GroupNorms of these names this eps; returns the names of those whose eps changed."""
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and name in eps and module.eps != eps[name]:
            module.eps = eps[name]
            changed.append(name)
    return changed


def _weight_of(norm: str) -> str:
    return f"{norm}.weight" if norm else "weight"


def _is_eps(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
