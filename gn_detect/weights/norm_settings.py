"""The eps and the number of groups of each GroupNorm, which no tensor of a state dict implies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import Tensor, nn

from ..errors import UserError
from ..layers import choose_groups
from .checkpoint import Checkpoint, strip_wrappers
from .metadata import USUAL_EPS, CheckpointMetadata

Value = TypeVar("Value", int, float)


def norm_settings(model: nn.Module) -> CheckpointMetadata:
    """Return what a checkpoint with ``model.state_dict()`` must say of the model's norms.

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
    return norm_metadata(
        {name: norm.eps for name, norm in norms.items()},
        {name: norm.num_groups for name, norm in norms.items()},
    )


def norm_metadata(eps: Mapping[str, float], groups: Mapping[str, int]) -> CheckpointMetadata:
    """Return a record of these norms; it has the eps of all if one is not ``USUAL_EPS``."""
    usual = all(value == USUAL_EPS for value in eps.values())
    return CheckpointMetadata(
        group_norm_eps={} if usual else {name: float(value) for name, value in eps.items()},
        group_norm_groups=dict(groups),
    )


def norm_eps_of(checkpoint: Checkpoint, tensors: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Return the eps of each norm by name; empty where the file gives none.

    Args:
        tensors: the checkpoint's tensors under other names, which the result then has, too.
    """
    eps = {name: float(value) for name, value in checkpoint.metadata.group_norm_eps.items()}
    return _renamed(eps, checkpoint, tensors)


def norm_groups_of(checkpoint: Checkpoint, tensors: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """Return the number of groups of each norm; see :func:`norm_eps_of`."""
    return _renamed(checkpoint.metadata.group_norm_groups, checkpoint, tensors)


def _renamed(
    values: dict[str, Value], checkpoint: Checkpoint, tensors: Mapping[str, Tensor] | None
) -> dict[str, Value]:
    names = {id(tensor): name for name, tensor in (tensors or checkpoint.tensors).items()}

    def renamed(norm: str) -> str:
        key = _weight_of(norm)
        weight = checkpoint.tensors.get(key, checkpoint.stored.get(key))
        name = names.get(id(weight))
        return norm if name is None else name.removesuffix("weight").removesuffix(".")

    return {renamed(norm): value for norm, value in values.items()}


def refuse_other_groups(model: nn.Module, checkpoint: Checkpoint, groups: Mapping[str, int]) -> None:
    """Refuse weights of other groups: they would load, and compute another function.

    Args:
        groups: those of the checkpoint, by the model's names.

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


def refuse_lost_norms(model: nn.Module, checkpoint: Checkpoint, named: Collection[str]) -> None:
    """Refuse a file whose settings of norms have names that neither the model nor the file has.

    It would load, with another eps or other groups.

    Args:
        checkpoint: with the model's names.
        named: norms whose settings the file has, by the model's names.

    Raises:
        UserError: one of them is in neither, and the file has no settings for a norm that is in both.
    """
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    present = {name for name in norms | set(named) if _weight_of(name) in checkpoint.tensors}
    lost = sorted(set(named) - norms - present)
    unspecified = sorted((norms & present) - set(named))
    if lost and unspecified:
        raise UserError(
            f"{checkpoint.path}: its 'group_norm_groups' or 'group_norm_eps' names '{lost[0]}', which is "
            f"not in the file, and not '{unspecified[0]}', so what that norm computes is not known; write it "
            "again with norm_settings(model) of the model that the file was made of, or without these keys"
        )


def group_keys(layers: set[tuple[int, int]]) -> tuple[int, int] | None:
    """Find ``MODEL.GN.NUM_GROUPS`` and ``MIN_CHANNELS_PER_GROUP`` with which each layer has its groups.

    Args:
        layers: pairs of channels and groups.

    Returns:
        None where there are no such numbers.
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
    """Set the eps of GroupNorms by name, and return the names of those whose eps changed."""
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and name in eps and module.eps != eps[name]:
            module.eps = eps[name]
            changed.append(name)
    return changed


def _weight_of(norm: str) -> str:
    return f"{norm}.weight" if norm else "weight"
