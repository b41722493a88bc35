"""Models of torchvision and timm by name, with their weights and their way to prepare an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from ..errors import UserError
from ..weights import read_checkpoint

TIMM = "timm/"
"""Before the name of a model of timm, as on the Hugging Face hub."""

EPS_OF_ZERO = tuple(
    f"{kind}_resnet50_fpn" for kind in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")
)
"""Detectors whose weights COCO_V1 torchvision runs with an eps of 0 (``overwrite_eps`` in their builders)."""

DEFAULT = "DEFAULT"
"""For ``--weights``: those that the library recommends; it downloads them."""


@dataclass(frozen=True)
class LibraryModel:
    """A model with its weights, in evaluation mode.

    Attributes:
        model: as the library builds it.
        prepare: from a PIL image to the model's input (C, H, W); None where the model takes something else
            than one picture of one size, as detectors and video models do.
    """

    model: nn.Module
    prepare: Callable[[Any], Tensor] | None


def is_library_model(name: str) -> bool:
    """Whether ``name`` means a model rather than a file."""
    return name.startswith(TIMM) or name in torchvision.models.list_models()


def load_library_model(name: str, weights: str | None) -> LibraryModel:
    """Build a model by name and give it weights.

    Args:
        name: ``resnet50``, as ``torchvision.models.list_models()`` has it, or ``timm/resnet50``.
        weights: a checkpoint file, ``DEFAULT``, or the name of other published weights
            (``IMAGENET1K_V1``; of torchvision only).

    Raises:
        UserError: timm is not installed, there is no such model, there are no such weights, or they do not
            fit or cannot be downloaded.
    """
    if not weights:
        raise UserError(
            f"{name} has no weights yet: add --weights FILE, or --weights {DEFAULT} to download them"
        )
    found = _timm_model(name, weights) if name.startswith(TIMM) else _torchvision_model(name, weights)
    found.model.eval()
    return found


def _torchvision_model(name: str, weights: str) -> LibraryModel:
    models = torchvision.models
    published = models.get_model_weights(name)
    # A file that was fetched by other means still has the name that it is published under.
    entry = next((e for e in published if Path(weights).name == Path(e.url).name), None)
    if Path(weights).is_file():
        state: Mapping[str, Any] = read_checkpoint(weights).tensors
    elif weights in published.__members__:
        entry = published[weights]
        state = _download(name, entry)
    else:
        choices = ", ".join([DEFAULT, *(entry.name for entry in published)])
        raise UserError(f"--weights {weights}: no such file, and {name} has {choices}")
    if name == "googlenet" and entry is not None:  # torchvision drops these heads, which were never trained
        state = {key: tensor for key, tensor in state.items() if not key.startswith("aux")}
    model = models.get_model(name, weights=None, **_settings(name, state))
    _fill(model, state, name, weights)
    if name in EPS_OF_ZERO and entry is not None and entry.name == "COCO_V1":
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d)):
                module.eps = 0.0
    transforms = published.DEFAULT.transforms() if len(published) else None
    takes_a_picture = not any(
        part in type(model).__module__ for part in ("detection", "video", "optical_flow")
    )
    return LibraryModel(model, transforms if takes_a_picture else None)


def _settings(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """What the builder does with published weights, for which any that fit are taken."""
    module = torchvision.models.get_model_builder(name).__module__
    has_auxiliary = any(key.lower().startswith("aux") for key in state)
    if "segmentation" in module:
        auxiliary = {} if "lraspp" in module else {"aux_loss": has_auxiliary}
        return {"weights_backbone": None, **auxiliary}
    if "detection" in module:
        return {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):  # whose input is normalised as TensorFlow's was
        return {"init_weights": False, "transform_input": True, "aux_logits": has_auxiliary}
    return {}


def _download(name: str, weights: Any) -> Mapping[str, Any]:
    try:
        state: Mapping[str, Any] = weights.get_state_dict(
            progress=True, check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download the weights of {name} from {weights.url} ({error}); fetch the file by other "
            "means and give its path as --weights"
        ) from error
    return state


def _timm_model(name: str, weights: str) -> LibraryModel:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise UserError(f"{name} is a model of timm, which is not installed: pip install timm") from error
    plain = name.removeprefix(TIMM)
    if not timm.is_model(plain):
        raise UserError(f"timm has no model {plain!r}; timm.list_models() names them")
    from_file = Path(weights).is_file()
    if not from_file and weights != DEFAULT:
        raise UserError(f"--weights {weights}: no such file; give one, or {DEFAULT} to download timm's")
    try:
        model = timm.create_model(plain, pretrained=not from_file)
    except Exception as error:  # of its download library's many kinds
        raise UserError(
            f"timm cannot make {plain} with its weights ({error}); give a file that was fetched otherwise"
        ) from error
    if from_file:
        _fill(model, read_checkpoint(weights).tensors, name, weights)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return LibraryModel(model, transform)


def _fill(model: nn.Module, state: Mapping[str, Any], name: str, weights: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise UserError(f"{weights} does not fit {name}: {' '.join(lines)[:300]}") from error
