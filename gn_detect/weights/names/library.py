"""Files of torchvision's and timm's classifiers, for a backbone that keeps their names below ``trunk``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from ...config.schema import LIBRARY_BACKBONES
from ...errors import UserError
from ..checkpoint import Checkpoint
from ..convention import TORCHVISION, InputConvention
from . import bit

if TYPE_CHECKING:
    from ...config import Config

# In a detector with and without an FPN, and in the backbone alone.
_TRUNK = re.compile(r"((?:backbone\.(?:bottom_up\.)?)?trunk\.).")

# efficientnet_pytorch and efficientnet_lite_pytorch: the layers of a block in the order of timm's names, with
# and without an expansion.
_EXPANDED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip
_DEPTHWISE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1"}


def trunk_of(names: Iterable[str]) -> str | None:
    """Return the prefix of a library's names in a model, such as ``backbone.bottom_up.trunk.``, or None."""
    return next((match[1] for name in names if (match := _TRUNK.match(name))), None)


def trunk_tensors(checkpoint: Checkpoint, own: Collection[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a file for a library's network, and the names in the file that are of no use.

    These are those of its classifier, and of layers after the last feature.

    Args:
        checkpoint: a classifier, or a detector with this backbone.
        own: names of the network's tensors in its library.

    Returns:
        Tensors by the library's names, also BatchNorm's statistics that the network lacks; and the others.
    """
    prefix = trunk_of(checkpoint.tensors)
    if prefix is not None:
        inside = {n: t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in inside.items()}, []
    found: dict[str, Tensor] = {}
    left_out = []
    modules = {name.rpartition(".")[0] for name in own}
    from_lukemelas = _efficientnet_names(checkpoint.tensors, own)
    # A network may have the prefix of a wrapper in its own names.
    fitting = [len(own & tensors.keys()) for tensors in (checkpoint.tensors, checkpoint.stored)]
    tensors = checkpoint.stored if fitting[1] > fitting[0] else checkpoint.tensors
    if bit.is_bit(tensors):
        tensors = bit.to_timm(tensors)
    for name, tensor in tensors.items():
        theirs = from_lukemelas.get(name, name)
        if theirs.rpartition(".")[0] in modules:
            found[theirs] = tensor
        else:
            left_out.append(name)
    return found, left_out


def _efficientnet_names(names: Collection[str], own: Collection[str]) -> dict[str, str]:
    """Translate ``_blocks.N`` to timm's ``blocks.STAGE.INDEX`` of a network with as many blocks.

    timm's ``tf_`` networks compute the same: they pad as TensorFlow does, and have its eps.
    """
    if "_conv_stem.weight" not in names:
        return {}
    places = {tuple(map(int, m.groups())) for name in own if (m := re.match(r"blocks\.(\d+)\.(\d+)\.", name))}
    blocks = [f"blocks.{stage}.{index}." for stage, index in sorted(places)]
    translated = {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        if layer in _STEM:
            translated[name] = f"{_STEM[layer]}.{leaf}"
        elif (block := re.fullmatch(r"_blocks\.(\d+)\.(\w+)", layer)) and int(block[1]) < len(blocks):
            has_expansion = f"_blocks.{block[1]}._expand_conv.weight" in names
            layers = (_EXPANDED if has_expansion else _DEPTHWISE) | _SQUEEZE
            if block[2] in layers:
                translated[name] = f"{blocks[int(block[1])]}{layers[block[2]]}.{leaf}"
    return translated


def refuse_other_padding(cfg: Config, checkpoint: Checkpoint) -> None:
    """Refuse weights of efficientnet_pytorch for a network of timm that pads and normalises in another way.

    Raises:
        UserError: ``MODEL.BACKBONE.MODEL`` is not one of timm's ``tf_`` networks.
    """
    model = cfg.model.backbone.model
    if "_conv_stem.weight" in checkpoint.tensors and model and not model.startswith("tf_"):
        raise UserError(
            "other-network",
            f"{checkpoint.path} is of efficientnet_pytorch, which pads and normalises as TensorFlow does; "
            f"{model} would load it and compute something else; set MODEL.BACKBONE.MODEL tf_{model} of timm",
        )


def library_convention(cfg: Config) -> InputConvention | None:
    """Return the input of the weights that a library publishes for ``MODEL.BACKBONE.MODEL``.

    It is that of the tag in ``NAME.TAG`` of timm, otherwise of the default weights; ImageNet's without any.
    None for a config without such a network.
    """
    library, model = LIBRARY_BACKBONES.get(cfg.model.backbone.name), cfg.model.backbone.model
    if library is None:
        return None
    if library == "timm":
        import timm

        described = timm.get_pretrained_cfg(model)
    else:
        from torchvision.models import get_model_weights

        published = list(get_model_weights(model))
        described = published[-1].transforms() if published else None
    if described is None:
        return InputConvention("RGB", TORCHVISION.pixel_mean, TORCHVISION.pixel_std)
    mean, std = (tuple(round(255 * x, 3) for x in values) for values in (described.mean, described.std))
    return InputConvention("RGB", mean, std)
