"""The eps and the number of groups of each GroupNorm, which no tensor of a state dict implies.

The record of a model's norms also has its convolutions with Weight Standardization
(:mod:`gn_detect.weights.standardization`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..errors import UserError
from ..layers import choose_groups
from .checkpoint import Checkpoint, strip_wrappers
from .metadata import USUAL_EPS, CheckpointMetadata
from .standardization import standardized_convs


def norm_settings(model: nn.Module) -> CheckpointMetadata:
    """Return the record of a model's norms and convolutions, for a checkpoint with ``model.state_dict()``.

    Names are those that :func:`read_checkpoint` gives the tensors: without what wraps the whole model.
    """
    keys = [key for key, value in model.state_dict().items() if isinstance(value, Tensor)]
    inner, outer = next(iter(strip_wrappers({key: key for key in keys}).items()), ("", ""))
    wrapper = outer.removesuffix(inner)

    def stored(name: str) -> str:
        return f"{name}.".removeprefix(wrapper).removesuffix(".")

    norms = {stored(name): module for name, module in _norms_in(model).items()}
    record = norm_metadata(
        {name: norm.eps for name, norm in norms.items()},
        {name: norm.num_groups for name, norm in norms.items()},
    )
    convs = {stored(name): [conv.kind, conv.eps] for name, conv in standardized_convs(model).items()}
    return replace(record, weight_standardization=convs)


def norm_metadata(eps: Mapping[str, float], groups: Mapping[str, int]) -> CheckpointMetadata:
    """Return a record of norms by name; it has the eps of all if one is not ``USUAL_EPS``."""
    usual = all(value == USUAL_EPS for value in eps.values())
    return CheckpointMetadata(
        group_norm_eps={} if usual else {name: float(value) for name, value in eps.items()},
        group_norm_groups=dict(groups),
    )


def norms_of(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> CheckpointMetadata:
    """Return the record of a checkpoint's norms and convolutions under other names.

    Args:
        tensors: the checkpoint's tensors by these names.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}

    def renamed(norm: str) -> str:
        key = _weight_of(norm)
        name = names.get(id(checkpoint.tensors.get(key, checkpoint.stored.get(key))))
        return norm if name is None else name.removesuffix("weight").removesuffix(".")

    metadata = checkpoint.metadata
    return CheckpointMetadata(
        group_norm_eps={renamed(norm): float(eps) for norm, eps in metadata.group_norm_eps.items()},
        group_norm_groups={renamed(norm): groups for norm, groups in metadata.group_norm_groups.items()},
        weight_standardization={renamed(n): found for n, found in metadata.weight_standardization.items()},
    )


def refuse_other_groups(model: nn.Module, checkpoint: Checkpoint, groups: Mapping[str, int]) -> None:
    """Refuse weights of other groups: they would load, and compute another function.

    Args:
        groups: those of the checkpoint, by the model's names.

    Raises:
        UserError: a norm of the model has another number of groups.
    """
    norms = {name: norm for name, norm in _norms_in(model).items() if name in groups}
    other = next((name for name, norm in norms.items() if norm.num_groups != groups[name]), None)
    if other is None:
        return
    layers = {(norm.num_channels, groups[name]) for name, norm in norms.items()}
    if all(channels == count for channels, count in layers):
        remedy = "set the NORM keys to IN"
    elif (keys := group_keys(layers)) is None:
        remedy = "build it with the groups that it had when the file was made"
    else:
        remedy = (
            f"set MODEL.GN.NUM_GROUPS {keys[0]} MODEL.GN.MIN_CHANNELS_PER_GROUP {keys[1]} (gn-detect "
            f"calibrate: --num-groups {keys[0]} --min-channels-per-group {keys[1]})"
        )
    found, wanted = groups[other], norms[other].num_groups
    raise UserError(
        "other-groups", f"{checkpoint.path} has {found} groups in '{other}', and the model {wanted}; {remedy}"
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
    norms, named = set(_norms_in(model)), set(named)
    present = {name for name in norms | named if _weight_of(name) in checkpoint.tensors}
    lost, unspecified = sorted(named - norms - present), sorted((norms & present) - named)
    if lost and unspecified:
        raise UserError(
            "damaged-record",
            f"{checkpoint.path}: its 'group_norm_groups' or 'group_norm_eps' names '{lost[0]}', which is "
            f"not in the file, and not '{unspecified[0]}', so what that norm computes is not known; write it "
            "again with norm_settings(model) of the model that the file was made of, or without these keys",
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


def set_norm_eps(model: nn.Module, eps: Mapping[str, float]) -> list[str]:
    """Set the eps of GroupNorms by name, and return the names of those whose eps changed."""
    changed = {n: norm for n, norm in _norms_in(model).items() if n in eps and norm.eps != eps[n]}
    for name, norm in changed.items():
        norm.eps = eps[name]
    return list(changed)


def _norms_in(model: nn.Module) -> dict[str, nn.GroupNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}


def _weight_of(norm: str) -> str:
    return f"{norm}.weight" if norm else "weight"
