"""Converting a checkpoint whose model is not at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from .report import ConversionReport
from .surgery import DEFAULT_GROUPS, DEFAULT_MIN_CHANNELS, convert_norm

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def convert_state_dict(
    tensors: Mapping[str, Tensor],
    *,
    eps: float = 1e-5,
    num_groups: int = DEFAULT_GROUPS,
    min_channels_per_group: int = DEFAULT_MIN_CHANNELS,
    group_size: int | None = None,
    init: Literal["match", "copy", "reset"] = "match",
) -> tuple[dict[str, Tensor], ConversionReport]:
    """The state dict of the GroupNorm model; see :func:`convert_norm`.

    A BatchNorm is what has ``weight``, ``bias``, ``running_mean`` and ``running_var`` of one length.

    Args:
        tensors: by name, in any library's naming; not changed.
        eps: of the BatchNorms, which no checkpoint tells: 1e-5 in torchvision and detectron2, 1e-3 in
            TensorFlow's models. The GroupNorms must be built with it too.

    Raises:
        UserError: there is no BatchNorm in it, or its channels cannot be split.
    """
    norms = {
        name.removesuffix(".running_var")
        for name in tensors
        if name.endswith(".running_var") and _is_batch_norm(tensors, name.removesuffix(".running_var"))
    }
    if not norms:
        raise UserError(
            "there is no BatchNorm with running statistics among the tensors; it has another norm, or its "
            "statistics were folded into the scale: then convert the model itself, with images"
        )
    report = ConversionReport()
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner not in norms:
            converted[name] = tensor
        elif leaf == "weight":
            norm, found = convert_norm(
                _batch_norm(tensors, owner, eps),
                num_groups=num_groups,
                min_channels_per_group=min_channels_per_group,
                group_size=group_size,
                init=init,
            )
            layer = found.layers[0]
            layer.name = owner
            report.layers.append(layer)
            for key, value in norm.state_dict().items():
                converted[f"{owner}.{key}"] = value
    report.parameters_before = sum(
        tensor.numel() for name, tensor in tensors.items() if not name.endswith(_STATISTICS)
    )
    report.parameters_after = sum(tensor.numel() for tensor in converted.values())
    return converted, report


def _is_batch_norm(tensors: Mapping[str, Tensor], owner: str) -> bool:
    shapes = {tensors[f"{owner}.{leaf}"].shape for leaf in _TENSORS if f"{owner}.{leaf}" in tensors}
    return all(f"{owner}.{leaf}" in tensors for leaf in _TENSORS) and len(shapes) == 1


def _batch_norm(tensors: Mapping[str, Tensor], owner: str, eps: float) -> nn.BatchNorm2d:
    weight = tensors[f"{owner}.weight"]
    norm = nn.BatchNorm2d(len(weight), eps=eps, dtype=weight.dtype)
    with torch.no_grad():
        for leaf in _TENSORS:
            getattr(norm, leaf).copy_(tensors[f"{owner}.{leaf}"])
    return norm
