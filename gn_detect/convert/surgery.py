"""Replace BatchNorms by GroupNorms."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import GroupNorm, GroupNormAct, choose_groups, fuse_relu
from .match import expected_statistics, keep_constants, matched_affine, measure_moments
from .readers import refuse_readers
from .report import COPIED, ConversionReport, LayerReport, count_parameters
from .source import SourceNorm, read_norm

# The paper's 32 groups in wide layers. The statistics of small groups differ most from image to image, so
# that they lose most of the function (see benchmarks/conversion).
DEFAULT_GROUPS, DEFAULT_MIN_CHANNELS = 32, 16


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
    becomes the fused :class:`gn_detect.GroupNorm`. All other modules keep their names, order, device, type
    and mode. A norm in several places stays one norm. A second conversion changes nothing.

    ``init="match"`` needs no data. The running statistics of a group's channels give its expected mean m and
    variance v. The new weight ``w sqrt(v + eps) / sqrt(var + eps_bn)`` and bias
    ``b + w (m - mean) / sqrt(var + eps_bn)`` then give BatchNorm's output wherever an image has these. A
    channel that hardly varies (:func:`gn_detect.convert.match.keep_constants`) becomes a constant: weight 0
    and bias b.

    Args:
        model: any module; a norm itself gives its replacement.
        to: ``"GN"``; ``"GN1"``, one group (Layer Normalization); ``"IN"``, one group for each channel.
        num_groups, min_channels_per_group, group_size: see :func:`gn_detect.layers.choose_groups`.
        init: ``"match"``, ``"copy"`` (BatchNorm's weight and bias) or ``"reset"`` (ones and zeros).
        eps: of the new layers, one for all or by name; by default each BatchNorm's own.
        relative_eps: part of v (its mean over the groups) to add to each layer's eps, such as ``0.3``. A
            large one keeps more of the function where an image's contrast is unexpected, and normalises less
            (at infinity only the mean). 0 is the paper's GroupNorm. A model that loads such weights needs
            the same eps in each layer: the report's.
        include, exclude: patterns of names of modules, such as ``"backbone.*"``.
        requires_grad: of the new weights and biases; None keeps the old ones' (a frozen norm stays frozen).
        images: inputs for ``model``, to measure the statistics of norms that hold none.
        inplace: change ``model`` instead of a copy; other parameters stay the same objects.
        dry_run: change nothing; the report says what would be done.

    Returns:
        The converted model (``model`` itself with ``dry_run``) and the report, whose ``str`` is a table.

    Raises:
        UserError: a norm is lazy, without statistics, not finite or unlike a BatchNorm, its channels cannot
            be split, a pattern fits no module, eps or relative_eps is no such number or both are given, or
            the model is scripted or wrapped for DDP. The model is unchanged then.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            "unconvertible-model", "a scripted model cannot be converted; convert it before torch.jit.script"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise UserError(
            "unconvertible-model",
            "a model in DistributedDataParallel cannot be converted; convert it before wrapping",
        )
    if init not in ("match", "copy", "reset"):
        raise UserError("bad-argument", f"init is {init!r}; choose 'match', 'copy' or 'reset'")
    _check_eps(eps, relative_eps, init)
    norms = _find_norms(model, include, exclude)
    sources = {name: norm for name, norm in norms.items() if isinstance(norm, SourceNorm)}
    refuse_readers(model, list(sources))
    size = count_parameters(model)
    report = ConversionReport(parameters_before=size, parameters_after=size)
    rule = {"GN": (num_groups, min_channels_per_group, group_size), "GN1": (1, 1, None), "IN": (1, 1, 1)}
    if sources and to not in rule:
        raise UserError("bad-argument", f"cannot convert to {to!r}; choose 'GN', 'GN1' (Layer Norm) or 'IN'")
    groups = {}
    for name, source in sources.items():
        try:
            groups[name] = choose_groups(source.channels, *rule[to])
        except ValueError as error:
            raise UserError(
                "unconvertible-norm", f"'{name}': {error}; leave it out with exclude={name!r}"
            ) from error
    measured: dict[str, tuple[Tensor, Tensor]] = {}
    if init == "match":
        for name, source in sources.items():
            if not source.tracked:
                raise UserError(
                    "unconvertible-norm",
                    f"'{name}' is a {source.kind} without running statistics, so it is no fixed function to "
                    f"match; use init='copy', or leave it out with exclude={name!r}",
                )
        unknown = [name for name, source in sources.items() if source.mean is None]
        if images is not None and unknown:
            measured = measure_moments(model, unknown, images)
    new: dict[str, nn.Module] = {}
    for name, norm in norms.items():
        if isinstance(norm, nn.GroupNorm):
            new[name] = fuse_relu(norm, inplace=inplace)
            report.layers.append(LayerReport.of(name, "GroupNorm", norm, "as it was"))
            continue
        own_eps = eps.get(name) if isinstance(eps, Mapping) else norm.eps if eps is None else eps
        if own_eps is None:
            raise UserError(
                "no-such-module", f"eps names no '{name}'; give each converted norm's, or one for all"
            )
        trains = norm.trainable if requires_grad is None else (requires_grad,) * 2
        new[name], layer = _group_norm(
            name, norm, groups[name], init, own_eps, relative_eps, measured.get(name), trains
        )
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


def _check_eps(eps: float | Mapping[str, float] | None, relative_eps: float, init: str) -> None:
    if not (math.isfinite(relative_eps) and relative_eps >= 0):
        raise UserError(
            "bad-argument", f"relative_eps is {relative_eps}; it is a part of the variance, such as 0.3"
        )
    if relative_eps and (eps is not None or init != "match"):
        raise UserError("bad-argument", "relative_eps is for init='match', and without eps")
    for value in eps.values() if isinstance(eps, Mapping) else [] if eps is None else [eps]:
        if not (math.isfinite(value) and value >= 0):
            raise UserError("bad-argument", f"eps is {value}; it must be 0 or more, as 1e-5 is")


def _find_norms(
    model: nn.Module, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> dict[str, SourceNorm | nn.GroupNorm]:
    """Return the norms by the name of their first place. Excluded modules are not even read."""
    included = [include] if isinstance(include, str) else ["*"] if include is None else list(include)
    excluded = [exclude] if isinstance(exclude, str) else list(exclude or [])
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    names = [name for called in places.values() for name in called]
    for pattern in [*included, *excluded]:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                "no-such-module",
                f"the pattern {pattern!r} fits no module of the model; see model.named_modules()",
            )

    def fits(names: list[str], patterns: list[str]) -> bool:
        return any(fnmatch.filter(names, pattern) for pattern in patterns)

    found: dict[str, SourceNorm | nn.GroupNorm] = {}
    for module, called in places.items():
        if fits(called, included) and not fits(called, excluded):
            norm = module if type(module) is nn.GroupNorm else read_norm(called[0], module)
            if norm is not None:
                found[called[0]] = norm
    return found


def _group_norm(
    name: str,
    norm: SourceNorm,
    groups: int,
    init: str,
    eps: float,
    relative_eps: float,
    measured: tuple[Tensor, Tensor] | None,
    trains: tuple[bool, bool],
) -> tuple[GroupNorm, LayerReport]:
    expected = expected_statistics(norm, groups, measured) if init == "match" else None
    if relative_eps and expected is not None:
        eps += relative_eps * expected.var.mean().item()
    kind = GroupNorm if norm.activation is None and norm.dropout is None else GroupNormAct
    # "reset" gives affine parameters too, so that the model has a place for matched weights.
    affine = norm.affine or init != "copy"
    new = kind(groups, norm.channels, eps, affine=affine, device=norm.device, dtype=norm.dtype)
    if isinstance(new, GroupNormAct):
        new.attach(norm.activation, norm.dropout)
    for parameter, trainable in zip((new.weight, new.bias), trains, strict=True):
        if parameter is not None:
            parameter.requires_grad_(trainable)
    constant = 0
    if new.weight is None or init == "reset":
        done = "reset"
    elif expected is None:
        done = COPIED if init == "match" else "copy"  # with "match" its statistics are taken to be 0 and 1
        _set_affine(name, new, norm.weight, norm.bias)
    else:
        done = "match" if measured is None else "match, measured"
        weight, bias, constant = keep_constants(norm, expected, *matched_affine(norm, expected, new.eps))
        _set_affine(name, new, weight, bias)
    layer = LayerReport.of(name, norm.kind, new, done)
    layer.constant = constant
    return new, layer


@torch.no_grad()
def _set_affine(name: str, norm: GroupNorm, weight: Tensor, bias: Tensor) -> None:
    norm.weight.copy_(weight)
    norm.bias.copy_(bias)
    if not bool(norm.weight.isfinite().all() and norm.bias.isfinite().all()):
        raise UserError(
            "unconvertible-norm",
            f"'{name}' needs weights up to {weight.abs().max():.3g} and biases up to {bias.abs().max():.3g}, "
            f"which {str(norm.weight.dtype).removeprefix('torch.')} does not hold; convert it in float32",
        )


def _replace(model: nn.Module, new: dict[str, nn.Module]) -> nn.Module:
    """Put each new norm wherever the old one is: in modules, and in the lists and dicts that modules keep."""
    replaced: dict[nn.Module, nn.Module] = {}
    for name, norm in new.items():
        old = model.get_submodule(name)
        norm.train(old.training)
        norm._is_full_backward_hook = old._is_full_backward_hook  # PyTorch calls no hook without it
        for attribute, held in vars(old).items():
            if "_hooks" in attribute and "state_dict" not in attribute:
                getattr(norm, attribute).update(held)
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


def _in_container(value: Any, replaced: dict[nn.Module, nn.Module]) -> Any:
    """Return ``value`` with its modules replaced; lists and dicts stay the same objects."""
    if isinstance(value, nn.Module):
        return replaced.get(value, value)
    if type(value) is list:
        value[:] = [_in_container(item, replaced) for item in value]
    elif type(value) is dict:
        value.update({key: _in_container(item, replaced) for key, item in value.items()})
    elif type(value) is tuple and any(isinstance(item, nn.Module) for item in value):
        return tuple(_in_container(item, replaced) for item in value)
    return value
