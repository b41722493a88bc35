"""Convolutions with Weight Standardization: the record of a file, against a model and a config."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config.types import value_at
from ..errors import UserError
from ..layers import WSConv2d
from ..ops import standardize_weight
from .convention import as_command_line
from .names.library import trunk_of
from .zoo import entry_of

if TYPE_CHECKING:
    from ..config import Config
    from .checkpoint import Checkpoint

Standardized = dict[str, list[Any]]
"""Kind (``"WS"``, ``"StdConv"``) and eps by name of the convolution; others are plain."""

# The convolutions that each CONV key is about, in our names.
_SECTIONS = {
    "MODEL.RESNETS.CONV": r"(backbone\.(bottom_up\.)?(stem|res\d)|roi_heads\.res5)\.",
    "MODEL.FPN.CONV": r"backbone\.fpn_",
    "MODEL.ROI_BOX_HEAD.CONV": r"roi_heads\.box_head\.(\d+\.)?conv\d",
    "MODEL.ROI_MASK_HEAD.CONV": r"roi_heads\.mask_head\.mask_fcn\d",
}
CONV_KEYS = tuple(_SECTIONS)


def standardized_convs(model: nn.Module) -> dict[str, WSConv2d]:
    """Return the convolutions of a model that standardise their weights, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WSConv2d)}


def is_known(checkpoint: Checkpoint) -> bool:
    """Return whether a file says which convolutions are standardised, if only by its config."""
    metadata = checkpoint.metadata
    stated = metadata.weight_standardization or metadata.config or metadata.mmdetection_config
    return bool(stated) or entry_of(checkpoint.path) is not None


def conv_keys(found: Standardized, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the ``CONV`` keys of a model with these weights; ``""`` for plain convolutions.

    Args:
        found: the record, in our names.
        tensors: all weights, in our names; keys of parts that are not among them are absent.
    """
    keys = {}
    for key, pattern in _SECTIONS.items():
        layers = [
            name.removesuffix(".weight")
            for name, tensor in tensors.items()
            if tensor.dim() == 4 and re.match(pattern, name)
        ]
        kinds = {found[layer][0] if layer in found else "" for layer in layers}
        if len(kinds) == 1:
            keys[key] = kinds.pop()
    return keys


def differing_conv_keys(cfg: Config, keys: Mapping[str, str]) -> dict[str, Any]:
    """Return those of :func:`conv_keys` that a config has otherwise."""
    return {key: kind for key, kind in keys.items() if value_at(cfg, key) != kind}


def refuse_other_convs(
    model: nn.Module,
    checkpoint: Checkpoint,
    found: Standardized,
    tensors: Mapping[str, Tensor],
    matched: Collection[str],
) -> None:
    """Refuse weights that were trained with another standardisation.

    They would load, and compute another function. A file that says nothing is taken to fit, and so are those
    of a library's network, whose name says which convolutions it has.

    Args:
        found: the checkpoint's record, by the model's names.
        tensors: the checkpoint's tensors, by the model's names.
        matched: names of the tensors that would be loaded.

    Raises:
        UserError: a convolution is standardised in another way in the model.
    """
    if not is_known(checkpoint):
        return
    own: Standardized = {name: [conv.kind, conv.eps] for name, conv in standardized_convs(model).items()}

    def kinds(name: str) -> tuple[str, str]:
        return found.get(name, [""])[0], own.get(name, [""])[0]

    names = [name for name in own.keys() | found.keys() if f"{name}.weight" in matched]
    names = [name for name in names if trunk_of([name]) is None]
    other = min((name for name in names if len(set(kinds(name))) > 1), default=None)
    if other is None:
        return
    present = conv_keys(own, tensors)
    keys = {key: kind for key, kind in conv_keys(found, tensors).items() if present.get(key) != kind}
    remedy = f"set {as_command_line(keys)}" if keys else "build it with those of training"
    theirs, ours = (kind and f"standardised weights ({kind})" for kind in kinds(other))
    if theirs and not ours:
        remedy += ", or make plain convolutions of them with gn-detect convert --keep-norm"
    raise UserError(
        "other-convolution",
        f"{checkpoint.path} has {theirs or 'plain weights'} in '{other}', and the model "
        f"{ours or 'plain ones'}; {remedy}",
    )


def set_conv_eps(model: nn.Module, found: Standardized) -> list[str]:
    """Set the eps of standardised convolutions by name, and return the names of those whose eps changed."""
    own = standardized_convs(model)
    changed = {name: conv for name, conv in own.items() if name in found and conv.eps != found[name][1]}
    for name, conv in changed.items():
        conv.eps = float(found[name][1])
        conv.train(conv.training)  # what it keeps has the former eps
    return list(changed)


@torch.no_grad()
def folded(tensors: Mapping[str, Tensor], found: Standardized) -> dict[str, Tensor]:
    """Return tensors for plain convolutions that compute the same, standardised in float64."""
    result = dict(tensors)
    for name, (kind, eps) in found.items():
        weight = tensors.get(f"{name}.weight")
        if weight is not None:
            wide = standardize_weight(weight.double(), kind, eps)
            result[f"{name}.weight"] = wide.to(torch.promote_types(weight.dtype, torch.float32))
    return result
