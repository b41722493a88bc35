"""Convert a state dict without its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from ..errors import UserError
from .library_eps import PYTORCH_EPS, TENSORFLOW_EPS, library_eps
from .report import ConversionReport
from .surgery import DEFAULT_GROUPS, DEFAULT_MIN_CHANNELS, convert_norm

_AFFINE, _STATISTICS = ("weight", "bias"), ("running_mean", "running_var")
_LEAVES = (*_AFFINE, *_STATISTICS, "num_batches_tracked")


def convert_state_dict(
    tensors: Mapping[str, Tensor],
    *,
    eps: float | None = None,
    num_groups: int = DEFAULT_GROUPS,
    min_channels_per_group: int = DEFAULT_MIN_CHANNELS,
    group_size: int | None = None,
    init: Literal["match", "copy", "reset"] = "match",
) -> tuple[dict[str, Tensor], ConversionReport]:
    """Return the state dict of the GroupNorm model, and the report; see :func:`convert_norm`.

    A BatchNorm has ``running_mean`` and ``running_var``, and either ``weight`` and ``bias`` or neither: (C,)
    floating-point numbers each. Other layers with a ``running_var`` stay, with a warning.

    Args:
        tensors: tensors by name, in any library's naming; not changed.
        eps: of the BatchNorms. None takes that of the library whose names the tensors have
            (:mod:`gn_detect.convert.library_eps`), and 1e-5 with a warning for other names. The model that
            loads the result needs the same eps in its GroupNorms: the report's. It is 1e-5 if this is 0, as
            in torchvision's published detectors of version 1.

    Raises:
        UserError: there is no BatchNorm; one is part of a quantization-aware layer, cannot be split into
            groups, or has numbers that no BatchNorm can have; or eps is no such number.
    """
    owners = [name.removesuffix(".running_var") for name in tensors if name.endswith(".running_var")]
    norms = {owner for owner in owners if _is_batch_norm(tensors, owner)}
    if not norms:
        raise UserError(
            "no-batchnorm",
            "there is no BatchNorm with running statistics among the tensors; it has another norm, or its "
            "statistics were folded into the scale: then convert the model itself, with images",
        )
    _refuse_quantized(tensors, norms)
    known = library_eps(tensors, norms) if eps is None else dict.fromkeys(norms, eps)
    report = ConversionReport()
    converted: dict[str, Tensor] = {}
    done: set[str] = set()
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in norms or leaf not in _LEAVES:
            converted[name] = tensor
        elif owner not in done:  # at the place of its first tensor
            done.add(owner)
            own_eps = known.get(owner, PYTORCH_EPS)
            model, found = convert_norm(
                _batch_norm(tensors, owner, own_eps),
                num_groups=num_groups,
                min_channels_per_group=min_channels_per_group,
                group_size=group_size,
                init=init,
                eps=own_eps or None,
                inplace=True,
            )
            report.layers += found.layers
            converted |= {name: value.detach() for name, value in model.named_parameters()}
    report.parameters_before = sum(
        tensor.numel() for name, tensor in tensors.items() if name.rpartition(".")[2] not in _LEAVES[2:]
    )
    report.parameters_after = sum(tensor.numel() for tensor in converted.values())
    report.warn_of_layers()
    if unknown := [layer.name for layer in report.layers if layer.name not in known]:
        report.warnings.append(
            f"the eps of {len(unknown)} BatchNorms, such as '{unknown[0]}', does not follow from the names: "
            f"{PYTORCH_EPS:g}, PyTorch's, was taken; if their model has {TENSORFLOW_EPS:g}, TensorFlow's and "
            f"Keras's, convert with --eps {TENSORFLOW_EPS:g} (in Python eps={TENSORFLOW_EPS:g})"
        )
    if others := [owner for owner in owners if owner not in norms]:
        report.warnings.append(
            f"{len(others)} layers have running statistics and are no BatchNorm, such as '{others[0]}'; they "
            "stay unchanged"
        )
    return converted, report


def _refuse_quantized(tensors: Mapping[str, Tensor], norms: set[str]) -> None:
    """Refuse quantization-aware layers, which read the statistics of their BatchNorm."""
    layers = {name.rpartition("weight_fake_quant.")[0] for name in tensors if "weight_fake_quant." in name}
    for norm in sorted(norms):
        parent = norm.removesuffix(norm.rpartition(".")[2])
        if parent in layers:
            layer = f"'{parent.removesuffix('.')}'" if parent else "the model"
            raise UserError(
                "unconvertible-norm",
                f"{layer} is a quantization-aware layer (ConvBn or LinearBn), which reads the statistics of "
                f"its BatchNorm '{norm}', and a GroupNorm has none; convert weights of before",
            )


def _is_batch_norm(tensors: Mapping[str, Tensor], owner: str) -> bool:
    weight, bias, mean, var = (tensors.get(f"{owner}.{leaf}") for leaf in (*_AFFINE, *_STATISTICS))
    held = [tensor for tensor in (weight, bias, mean, var) if tensor is not None]
    return (
        mean is not None
        and (weight is None) == (bias is None)
        and all(tensor.dim() == 1 and tensor.is_floating_point() for tensor in held)
        and len({tensor.shape for tensor in held}) == 1
    )


def _batch_norm(tensors: Mapping[str, Tensor], owner: str, eps: float) -> nn.Module:
    """Return a model that holds only this norm, under its name, so that messages and the report have it.

    The tensors keep their types: float16 cannot hold all running statistics.
    """
    norm: nn.Module = nn.BatchNorm2d(len(tensors[f"{owner}.running_var"]), eps=eps, affine=False)
    for leaf in _STATISTICS:
        setattr(norm, leaf, tensors[f"{owner}.{leaf}"])
    for leaf in _AFFINE:
        if f"{owner}.{leaf}" in tensors:
            setattr(norm, leaf, nn.Parameter(tensors[f"{owner}.{leaf}"].detach()))
    for part in reversed(owner.split(".")):
        parent = nn.Module()
        parent._modules[part] = norm
        norm = parent
    return norm
