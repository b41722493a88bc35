"""From BatchNorm to GroupNorm: what is replaced, by what, and with which parameters."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import GroupNorm, GroupNormAct, choose_groups, fuse_relu
from .match import constant_channels, expected_statistics, matched_affine
from .moments import measure_moments
from .readers import refuse_readers
from .report import COPIED, ConversionReport, LayerReport, count_parameters
from .source import SourceNorm, read_norm

DEFAULT_GROUPS, DEFAULT_MIN_CHANNELS = 32, 16
"""The paper's 32 groups where they are wide; small groups, whose statistics differ most from image to image,
lose most of the function (see benchmarks/conversion)."""


@dataclass(frozen=True)
class GroupRule:
    """How channels are split; see :func:`gn_detect.layers.choose_groups`."""

    to: str = "GN"
    num_groups: int = DEFAULT_GROUPS
    min_channels_per_group: int = DEFAULT_MIN_CHANNELS
    group_size: int | None = None

    def groups(self, channels: int) -> int:
        """Number of groups of a layer. Raises ValueError where the channels cannot be split."""
        if self.to == "GN":
            return choose_groups(channels, self.num_groups, self.min_channels_per_group, self.group_size)
        fixed = {"GN1": 1, "IN": channels}
        if self.to not in fixed:
            raise ValueError(f"cannot convert to {self.to!r}; choose 'GN', 'GN1' (Layer Norm) or 'IN'")
        return fixed[self.to]


def convert_norm(
    model: nn.Module,
    to: str = "GN",
    *,
    num_groups: int = DEFAULT_GROUPS,
    min_channels_per_group: int = DEFAULT_MIN_CHANNELS,
    group_size: int | None = None,
    init: Literal["match", "copy", "reset"] = "match",
    eps: float | Mapping[str, float] | None = None,
    relative_eps: float = 0.0,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    requires_grad: bool | None = True,
    images: Iterable[Any] | None = None,
    inplace: bool = False,
    dry_run: bool = False,
) -> tuple[nn.Module, ConversionReport]:
    """Replace every BatchNorm by the GroupNorm that continues its function most closely.

    BatchNorm1d/2d/3d and their subclasses, SyncBatchNorm, FrozenBatchNorm2d of any library, Caffe2's
    affine-only norms and timm's BatchNormAct2d (which keeps its activation) are converted; ``nn.GroupNorm``
    becomes the fused :class:`gn_detect.GroupNorm`. Everything else keeps its name, order, device, type and
    mode, and a norm in several places stays one norm. Converting twice is converting once.

    ``init="match"`` needs no data: from the running statistics of its channels follow the mean m and the
    variance v that a group is expected to have, and the new weight ``w sqrt(v + eps) / sqrt(var + eps_bn)``
    and bias ``b + w (m - mean) / sqrt(var + eps_bn)`` give BatchNorm's output where an image has them. A
    channel that hardly varies (:func:`gn_detect.convert.match.constant_channels`) stays the constant that it
    is: weight 0 and bias b.

    Args:
        model: any module; a norm itself gives its replacement.
        to: ``"GN"``; ``"GN1"``, one group (Layer Normalization); ``"IN"``, a group for each channel.
        num_groups, min_channels_per_group, group_size: see :func:`gn_detect.layers.choose_groups`.
        init: ``"match"``, ``"copy"`` (BatchNorm's weight and bias) or ``"reset"`` (ones and zeros).
        eps: of the new layers, one for all or by name; by default each BatchNorm's own.
        relative_eps: add this part of v (its mean over the groups) to each layer's eps, as ``0.3``. The more,
            the less a group norm changes where an image's contrast is not as expected: more of the function
            is kept, and less is normalised (at infinity only the mean is). 0 is the paper's GroupNorm. A
            model that is to take such weights needs the same eps in each layer: those of the report.
        include, exclude: patterns of names of modules, as in ``"backbone.*"``.
        requires_grad: of the new weights and biases; None gives each what it had (a frozen norm stays
            frozen, and one without them gets frozen ones). By default all can be trained: that GN can be is
            the point of it.
        images: inputs for ``model``, from which the statistics of norms that hold none are measured.
        inplace: change ``model`` instead of a copy; other parameters stay the same objects.
        dry_run: change nothing; the report says what would be done.

    Returns:
        The converted model (``model`` itself for ``dry_run``) and the report, whose ``str`` is a table.

    Raises:
        UserError: a norm is lazy, without statistics, not finite or unlike a BatchNorm, its channels cannot
            be split, a pattern fits no module, eps or relative_eps is no such number or both are given, or
            the model is scripted or wrapped for DDP. It is then as it was.
    """
    _refuse_wrapped(model)
    rule = GroupRule(to, num_groups, min_channels_per_group, group_size)
    if init not in ("match", "copy", "reset"):
        raise UserError(f"init is {init!r}; choose 'match', 'copy' or 'reset'")
    _check_eps(eps, relative_eps, init)
    norms = _find_norms(model, _as_patterns(include), _as_patterns(exclude))
    refuse_readers(model, [name for name, norm in norms.items() if isinstance(norm, SourceNorm)])
    report = ConversionReport.of_model(model)
    groups = {name: _groups(name, norm, rule) for name, norm in norms.items()}
    if init == "match":
        _refuse_untracked(norms)
    measured = _measure(model, norms, images) if init == "match" and images is not None else {}
    new: dict[str, nn.Module] = {}
    for name, norm in norms.items():
        if isinstance(norm, nn.GroupNorm):
            new[name] = fuse_relu(norm, inplace=inplace)
            report.layers.append(LayerReport.of(name, "GroupNorm", norm, "as it was"))
            continue
        new[name], layer = _group_norm(
            name, norm, groups[name], init, _own_eps(name, norm, eps), relative_eps, measured.get(name)
        )
        _set_trainable(new[name], norm.trainable if requires_grad is None else (requires_grad,) * 2)
        layer.trainable = any(parameter.requires_grad for parameter in new[name].parameters(recurse=False))
        report.layers.append(layer)
    if norms:
        report.warn_of_layers()
    else:
        report.warnings.append("there is no norm to convert")
    if dry_run:
        report.parameters_after += sum(
            count_parameters(norm) - count_parameters(model.get_submodule(name)) for name, norm in new.items()
        )
        return model, report
    if not inplace:  # together, so that an activation that a new norm keeps is the copy's
        model, new = copy.deepcopy((model, new))
    result = _replace(model, new)
    report.parameters_after = count_parameters(result)
    return result, report


def _refuse_wrapped(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("a scripted model cannot be converted; convert it before torch.jit.script")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UserError("a model in DistributedDataParallel cannot be converted; convert it before wrapping")


def _check_eps(eps: float | Mapping[str, float] | None, relative_eps: float, init: str) -> None:
    if not (math.isfinite(relative_eps) and relative_eps >= 0):
        raise UserError(f"relative_eps is {relative_eps}; it is a part of the variance, such as 0.3")
    if relative_eps and (eps is not None or init != "match"):
        raise UserError("relative_eps is for init='match', and without eps")
    for value in eps.values() if isinstance(eps, Mapping) else [] if eps is None else [eps]:
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"eps is {value}; it must be 0 or more, as 1e-5 is")


def _own_eps(name: str, norm: SourceNorm, eps: float | Mapping[str, float] | None) -> float:
    if isinstance(eps, Mapping):
        if name not in eps:
            raise UserError(f"eps names no '{name}'; give each converted norm's, or one for all")
        return eps[name]
    return norm.eps if eps is None else eps


def _as_patterns(patterns: str | Sequence[str] | None) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)


def _find_norms(
    model: nn.Module, include: list[str] | None, exclude: list[str] | None
) -> dict[str, SourceNorm | nn.GroupNorm]:
    """By name of its first place. What is excluded is not even looked at."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in [*(include or []), *(exclude or [])]:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"the pattern {pattern!r} fits no module of the model; see model.named_modules()")
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    found: dict[str, SourceNorm | nn.GroupNorm] = {}
    for module, called in places.items():
        if include is not None and not _fits(called, include):
            continue
        if exclude is not None and _fits(called, exclude):
            continue
        norm = module if type(module) is nn.GroupNorm else read_norm(called[0], module)
        if norm is not None:
            found[called[0]] = norm
    return found


def _fits(names: list[str], patterns: list[str]) -> bool:
    return any(fnmatch.filter(names, pattern) for pattern in patterns)


def _groups(name: str, norm: SourceNorm | nn.GroupNorm, rule: GroupRule) -> int:
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    try:
        return rule.groups(norm.channels)
    except ValueError as error:
        raise UserError(f"'{name}': {error}; leave it out with exclude={name!r}") from error


def _refuse_untracked(norms: dict[str, SourceNorm | nn.GroupNorm]) -> None:
    for name, norm in norms.items():
        if isinstance(norm, SourceNorm) and not norm.tracked:
            raise UserError(
                f"'{name}' is a {norm.kind} without running statistics, so it is no fixed function to match; "
                f"use init='copy', or leave it out with exclude={name!r}"
            )


def _measure(
    model: nn.Module, norms: dict[str, SourceNorm | nn.GroupNorm], images: Iterable[Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Statistics of the norms that hold none."""
    names = [name for name, norm in norms.items() if isinstance(norm, SourceNorm) and norm.mean is None]
    return measure_moments(model, names, images) if names else {}


def _group_norm(
    name: str,
    norm: SourceNorm,
    groups: int,
    init: str,
    eps: float,
    relative_eps: float,
    measured: tuple[Tensor, Tensor] | None,
) -> tuple[GroupNorm, LayerReport]:
    """The new layer, and how it was initialised."""
    matches = init == "match"
    mean, var = measured if measured is not None else (norm.mean, norm.var)
    expected = None if not matches or mean is None or var is None else expected_statistics(mean, var, groups)
    if relative_eps and expected is not None:
        eps += relative_eps * expected.var.mean().item()
    kind = GroupNorm if norm.activation is None and norm.dropout is None else GroupNormAct
    # Afresh, too, so that a model that is to take matched weights has a place for them.
    affine = norm.affine or init != "copy"
    new = kind(groups, norm.channels, eps, affine=affine, device=norm.device, dtype=norm.dtype)
    if isinstance(new, GroupNormAct):
        new.attach(norm.activation, norm.dropout)
    if new.weight is None or init == "reset":
        return new, LayerReport.of(name, norm.kind, new, "reset")
    if expected is None:
        _set_affine(name, new, norm.weight, norm.bias)  # with "match" its statistics are taken to be 0 and 1
        return new, LayerReport.of(name, norm.kind, new, COPIED if matches else "copy")
    weight, bias = matched_affine(norm, expected, new.eps)
    constant = constant_channels(norm, expected)
    _set_affine(name, new, weight.masked_fill(constant, 0.0), torch.where(constant, norm.bias, bias))
    layer = LayerReport.of(name, norm.kind, new, "match" if measured is None else "match, measured")
    layer.constant = int(constant.sum())
    return new, layer


@torch.no_grad()
def _set_affine(name: str, norm: GroupNorm, weight: Tensor, bias: Tensor) -> None:
    norm.weight.copy_(weight)
    norm.bias.copy_(bias)
    if not bool(norm.weight.isfinite().all() and norm.bias.isfinite().all()):
        raise UserError(
            f"'{name}' needs weights up to {weight.abs().max():.3g} and biases up to {bias.abs().max():.3g}, "
            f"which {str(norm.weight.dtype).removeprefix('torch.')} does not hold; convert it in float32"
        )


def _set_trainable(norm: nn.Module, trainable: tuple[bool, bool]) -> None:
    for key, trains in zip(("weight", "bias"), trainable, strict=True):
        if (parameter := getattr(norm, key)) is not None:
            parameter.requires_grad_(trains)


def _replace(model: nn.Module, new: dict[str, nn.Module]) -> nn.Module:
    """Put each new norm wherever the old one is: in modules, and in the lists and dicts that modules keep."""
    replaced: dict[nn.Module, nn.Module] = {}
    for name, norm in new.items():
        old = model.get_submodule(name)
        _keep_state(old, norm)
        replaced[old] = norm
    if model in replaced:
        return replaced[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
        for name, value in list(vars(parent).items()):
            if name not in ("_modules", "_parameters", "_buffers"):
                vars(parent)[name] = _in_container(value, replaced)
    return model


def _keep_state(old: nn.Module, new: nn.Module) -> None:
    """Mode and hooks."""
    new.train(old.training)
    new._is_full_backward_hook = old._is_full_backward_hook  # without it they are not called
    for name, held in vars(old).items():
        if "_hooks" in name and "state_dict" not in name:
            getattr(new, name).update(held)


def _in_container(value: Any, replaced: dict[nn.Module, nn.Module]) -> Any:
    """``value`` with its modules replaced; lists and dicts stay the same objects."""
    if isinstance(value, nn.Module):
        return replaced.get(value, value)
    if type(value) is list:
        value[:] = [_in_container(item, replaced) for item in value]
    elif type(value) is dict:
        value.update({key: _in_container(item, replaced) for key, item in value.items()})
    elif type(value) is tuple and any(isinstance(item, nn.Module) for item in value):
        return tuple(_in_container(item, replaced) for item in value)
    return value
