"""The eps of each GroupNorm, which no state dict holds: a converted model may have another in each layer."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..errors import UserError
from .checkpoint import Checkpoint

NORM_EPS = "norm_eps"
"""The key in a checkpoint's metadata: eps by name of the norm."""

USUAL = 1e-5
"""PyTorch's, detectron2's and the config's default."""


def norm_eps(model: nn.Module) -> dict[str, Any]:
    """What to add to a checkpoint's metadata: nothing, or all GroupNorms' eps if one is not ``USUAL``."""
    found = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    return {NORM_EPS: found} if any(eps != USUAL for eps in found.values()) else {}


def norm_eps_of(checkpoint: Checkpoint) -> dict[str, float]:
    """By name, as the file has them; empty where it tells none.

    Raises:
        UserError: what it tells is no eps.
    """
    found = checkpoint.metadata.get(NORM_EPS, {})
    good = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(eps, float) and math.isfinite(eps) and eps > 0
        for name, eps in found.items()
    )
    if not good:
        raise UserError(
            f"{checkpoint.path}: its '{NORM_EPS}' is not the eps of each norm, so the file is damaged; "
            "write it again with gn-detect convert"
        )
    return found


def set_norm_eps(model: nn.Module, eps: dict[str, float]) -> list[str]:
    """Give the GroupNorms of these names this eps; returns the names of those whose eps changed."""
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and name in eps and module.eps != eps[name]:
            module.eps = eps[name]
            changed.append(name)
    return changed
