"""What a state dict does not tell of GroupNorms: eps and number of groups, in a converted model by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..layers import choose_groups
from .checkpoint import Checkpoint, strip_wrappers
from .mmdetection_config import told_norms

NORM_EPS, NORM_GROUPS = "group_norm_eps", "group_norm_groups"
"""The keys in a checkpoint's metadata: eps and number of groups by name of the norm."""

_LARGEST_EPS = 3.4e38
"""The largest number in float32, in which the norm adds it."""

USUAL_EPS = 1e-5
"""PyTorch's, detectron2's and the config's default eps."""


def norm_settings(model: nn.Module) -> dict[str, Any]:
    """What to add to the metadata of a checkpoint with ``model.state_dict()``; see :func:`as_metadata`.

    Names are those that :func:`read_checkpoint` gives the tensors: without what wraps the whole model.
    """
    keys = [key for key, value in model.state_dict().items() if isinstance(value, Tensor)]
    inner, outer = next(iter(strip_wrappers({key: key for key in keys}).items()), ("", ""))
    wrapper = outer.removesuffix(inner)
    norms = {
        f"{name}.".removeprefix(wrapper).removesuffix("."): module
        for name, module in model.named_modules()
        if isinstance(module, nn.GroupNorm)
    }
    return as_metadata(
        {name: norm.eps for name, norm in norms.items()},
        {name: norm.num_groups for name, norm in norms.items()},
    )


def as_metadata(eps: Mapping[str, float], groups: Mapping[str, int]) -> dict[str, Any]:
    """By name: the groups of all norms, and the eps of all if one is not ``USUAL_EPS``."""
    found: dict[str, Any] = {}
    if not all(value == USUAL_EPS for value in eps.values()):
        found[NORM_EPS] = {name: float(value) for name, value in eps.items()}
    if groups:
        found[NORM_GROUPS] = dict(groups)
    return found


def norm_eps_of(checkpoint: Checkpoint, tensors: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """By name of the norm; empty where the file tells none, nor the config in a file of mmdetection's.

    Args:
        tensors: the checkpoint's under other names, which the result then has, too; by default its own.

    Raises:
        UserError: what it tells is no eps.
    """
    told = checkpoint.metadata.get(NORM_EPS, told_norms(checkpoint, "eps"))
    _refuse_damaged(checkpoint, told, NORM_EPS, "eps", _is_eps)
    return {name: float(value) for name, value in _renamed(told, checkpoint, tensors).items()}


def norm_groups_of(checkpoint: Checkpoint, tensors: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """As :func:`norm_eps_of`, the numbers of groups."""
    told = checkpoint.metadata.get(NORM_GROUPS, told_norms(checkpoint, "num_groups"))
    _refuse_damaged(checkpoint, told, NORM_GROUPS, "number of groups", _is_number)
    return _renamed(told, checkpoint, tensors)


def _refuse_damaged(
    checkpoint: Checkpoint, told: Any, key: str, what: str, is_valid: Callable[[Any], bool]
) -> None:
    is_dict = isinstance(told, dict) and all(isinstance(name, str) for name in told)
    if not is_dict or not all(is_valid(value) for value in told.values()):
        raise UserError(
            f"{checkpoint.path}: its '{key}' is not the {what} of each norm, so the file is damaged; "
            "write it again with gn-detect convert"
        )


def _renamed(
    told: dict[str, Any], checkpoint: Checkpoint, tensors: Mapping[str, Tensor] | None
) -> dict[str, Any]:
    names = {id(tensor): name for name, tensor in (tensors or checkpoint.tensors).items()}

    def renamed(norm: Any) -> str:
        key = _weight_of(norm)
        weight = checkpoint.tensors.get(key, checkpoint.stored.get(key))
        name = names.get(id(weight))
        return str(norm) if name is None else name.removesuffix("weight").removesuffix(".")

    return {renamed(norm): value for norm, value in told.items()}


def refuse_other_groups(model: nn.Module, checkpoint: Checkpoint, groups: Mapping[str, int]) -> None:
    """Weights of other groups load, and compute another function.

    Args:
        groups: what the checkpoint tells, by the model's names.

    Raises:
        UserError: a norm of the model has another number of groups.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.GroupNorm) and n in groups}
    for name, norm in norms.items():
        if norm.num_groups != groups[name]:
            raise UserError(
                f"{checkpoint.path} has {groups[name]} groups in '{name}', and the model {norm.num_groups}; "
                + _remedy({(norm.num_channels, groups[name]) for name, norm in norms.items()})
            )


def refuse_lost_norms(model: nn.Module, checkpoint: Checkpoint, told: Collection[str]) -> None:
    """A file that tells of norms by names that nothing has would load, with another eps or other groups.

    Args:
        checkpoint: with the model's names.
        told: the names of the norms that it tells of, by the model's names.

    Raises:
        UserError: one of them is in neither, and a norm that is in both is not told of.
    """
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    lost = [name for name in sorted(told) if name not in norms and _weight_of(name) not in checkpoint.tensors]
    untold = [name for name in sorted(norms) if name not in told and _weight_of(name) in checkpoint.tensors]
    if lost and untold:
        raise UserError(
            f"{checkpoint.path}: its '{NORM_GROUPS}' or '{NORM_EPS}' names '{lost[0]}', which is not in the "
            f"file, and not '{untold[0]}', so what that norm computes is not known; write it again with "
            "norm_settings(model) of the model that the file was made of, or without these keys"
        )


def group_keys(layers: set[tuple[int, int]]) -> tuple[int, int] | None:
    """``MODEL.GN.NUM_GROUPS`` and ``MIN_CHANNELS_PER_GROUP`` with which each layer has its groups.

    Args:
        layers: pairs of channels and groups.

    Returns:
        None where no such numbers are.
    """
    most = max(groups for _, groups in layers)
    if all(groups == most for _, groups in layers):
        return most, 1  # exactly so many
    least = min(channels // groups for channels, groups in layers)
    fits = least > 1 and all(choose_groups(channels, most, least) == groups for channels, groups in layers)
    return (most, least) if fits else None


def _remedy(layers: set[tuple[int, int]]) -> str:
    if all(channels == groups for channels, groups in layers):
        return "set the NORM keys to IN"
    if (keys := group_keys(layers)) is None:
        return "build it with the groups that it had when the file was made"
    return (
        f"set MODEL.GN.NUM_GROUPS {keys[0]} MODEL.GN.MIN_CHANNELS_PER_GROUP {keys[1]} (gn-detect calibrate: "
        f"--num-groups {keys[0]} --min-channels-per-group {keys[1]})"
    )


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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _LARGEST_EPS


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
