"""Choose parameters by patterns of their names, and stop the training of some."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import UserError
from ..layers import frozen_norm

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def fits(name: str, pattern: str) -> bool:
    """Return whether a parameter is named by a pattern: its whole name, a module's, or one with ``*``."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def check_patterns(key: str, patterns: Iterable[str], model: nn.Module) -> None:
    """Refuse patterns that no parameter fits.

    Args:
        key: the config key that has them, for the message.
        patterns: see :func:`fits`.
        model: has the parameters.

    Raises:
        UserError: one fits nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            parts = sorted({part_of(name) for name in names})
            raise UserError(
                "no-such-module",
                f"{key}: no parameter fits {pattern!r}; its parts are {', '.join(parts[:12])}; "
                "* stands for any text",
            )


def part_of(name: str) -> str:
    """Return the part of the detector that a parameter belongs to, such as ``backbone.bottom_up.res2``."""
    words = name.split(".")[:-1]
    if words[1:2] and words[1].startswith("fpn_"):
        return "backbone.fpn_*"
    return ".".join(words[: 3 if words[1:2] == ["bottom_up"] else 2])


def freeze(module: nn.Module) -> None:
    """Stop the training of all parameters of ``module``, and replace BN by FrozenBN."""
    for parameter in module.parameters():
        parameter.requires_grad = False
    _freeze_norms(module)


def freeze_by_name(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop the training of the parameters that fit one of the patterns (``MODEL.FREEZE``).

    A BN whose weight and bias are frozen becomes a FrozenBN: its statistics stay, too.

    Raises:
        UserError: a pattern fits nothing, or nothing is left to train.
    """
    if not patterns:
        return
    check_patterns("MODEL.FREEZE", patterns, model)
    for name, parameter in model.named_parameters():
        if any(fits(name, pattern) for pattern in patterns):
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("conflicting-keys", "MODEL.FREEZE leaves nothing to train; take out a pattern")
    _freeze_norms(model)


def _freeze_norms(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BATCH_NORMS) and not any(p.requires_grad for p in child.parameters()):
                setattr(parent, name, frozen_norm(child))
