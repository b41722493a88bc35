"""The weights that a training starts from, with BatchNorms converted where the config has GroupNorms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..config.conflicts import has_fpn
from ..config.schema import LIBRARY_BACKBONES
from ..convert import convert_norm
from ..modeling import make_library_backbone
from ..weights import (
    Checkpoint,
    library_convention,
    load_weights,
    norm_settings,
    read_checkpoint,
    refuse_other_padding,
    trunk_of,
    trunk_tensors,
)

if TYPE_CHECKING:
    from ..config import Config


def read_starting_weights(cfg: Config) -> tuple[Checkpoint, list[str]]:
    """Read ``MODEL.WEIGHTS``, and convert what ``MODEL.BACKBONE.NORM GN`` asks for.

    The BatchNorms of a network of torchvision or timm become the GroupNorms that continue their function most
    closely, from the running statistics alone (:func:`gn_detect.convert_norm`). A file whose norms are
    GroupNorms, as ``gn-detect convert`` writes it, stays as it is.

    Returns:
        The checkpoint, and what was changed, in words.

    Raises:
        UserError: the file cannot be read, or does not fit the network.
    """
    checkpoint = read_checkpoint(cfg.model.weights)
    if cfg.model.backbone.name not in LIBRARY_BACKBONES or cfg.model.backbone.norm != "GN":
        return checkpoint, []
    refuse_other_padding(cfg, checkpoint)
    original = make_library_backbone(cfg)
    theirs, left_out = trunk_tensors(checkpoint, original.trunk.state_dict().keys())
    if not any(name.endswith(".running_var") for name in theirs):
        return checkpoint, []
    inside = {f"trunk.{name}": tensor for name, tensor in theirs.items()}
    report = load_weights(original, Checkpoint(inside, path=checkpoint.path), for_training=True)
    gn = cfg.model.gn
    converted, conversion = convert_norm(
        original,
        num_groups=gn.num_groups,
        min_channels_per_group=gn.min_channels_per_group,
        requires_grad=None,
        inplace=True,
    )
    place = "backbone.bottom_up." if has_fpn(cfg) else "backbone."
    loaded = set(report.matched)
    tensors = {place + name: value for name, value in converted.state_dict().items() if name in loaded}
    if (prefix := trunk_of(checkpoint.tensors)) is not None:  # a detector: its other parts stay
        others = (name for name in checkpoint.tensors if not name.startswith(prefix))
        tensors |= {name: checkpoint.tensors[name] for name in others}
    norms = norm_settings(converted)
    groups = {place + name: value for name, value in norms.group_norm_groups.items()}
    eps = {place + name: value for name, value in norms.norm_eps.items()}
    known = checkpoint.metadata
    metadata = replace(
        known,
        input=known.input or library_convention(cfg),
        group_norm_groups=known.group_norm_groups | groups,
        group_norm_eps=known.norm_eps | eps,
    )
    count = sum(layer.init.startswith("match") for layer in conversion.layers)
    changes = [f"{count} BatchNorms of the backbone converted to GroupNorm by their running statistics"]
    if left_out:
        changes.append(f"{len(left_out)} tensors are of no use to a detector, such as '{left_out[0]}'")
    return replace(checkpoint, tensors=tensors, stored=tensors, metadata=metadata), changes
