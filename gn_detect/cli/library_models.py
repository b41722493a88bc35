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
    if Path(weights).is_file():
        state: Mapping[str, Any] = read_checkpoint(weights).tensors
    elif weights in published.__members__:
        state = _download(name, published[weights])
    else:
        choices = ", ".join([DEFAULT, *(entry.name for entry in published)])
        raise UserError(f"--weights {weights}: no such file, and {name} has {choices}")
    model = models.get_model(name, weights=None, **_no_other_weights(name))
    _fill(model, state, name, weights)
    transforms = published.DEFAULT.transforms() if len(published) else None
    takes_a_picture = not any(
        part in type(model).__module__ for part in ("detection", "video", "optical_flow")
    )
    return LibraryModel(model, transforms if takes_a_picture else None)


def _no_other_weights(name: str) -> dict[str, Any]:
    """Detectors and segmenters would download a backbone's, and old models fill themselves at random."""
    module = torchvision.models.get_model_builder(name).__module__
    if any(part in module for part in ("detection", "segmentation")):
        return {"weights_backbone": None}
    return {"init_weights": False} if name in ("googlenet", "inception_v3") else {}


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
