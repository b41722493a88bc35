"""Models of torchvision and timm by name, with their weights and their preparation of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from ..errors import UserError
from ..weights import read_checkpoint

TIMM = "timm/"  # prefix of timm's models, as on the Hugging Face hub
DEFAULT = "DEFAULT"  # the weights that the library recommends

# torchvision runs the weights COCO_V1 of these with an eps of 0 (``overwrite_eps`` in their builders).
EPS_OF_ZERO = tuple(
    f"{kind}_resnet50_fpn" for kind in ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")
)


@dataclass(frozen=True)
class LibraryModel:
    """A model with its weights, in evaluation mode.

    Attributes:
        prepare: makes the model's input (C, H, W) from a PIL image; None for models that do not take one
            picture of one size, such as detectors and video models.
    """

    model: nn.Module
    prepare: Callable[[Any], Tensor] | None


def is_library_model(name: str) -> bool:
    """Return True for the name of a model, False for a file."""
    return name.startswith(TIMM) or name in torchvision.models.list_models()


def load_library_model(name: str, weights: str | Path | None) -> LibraryModel:
    """Build a model by name and load its weights.

    Args:
        name: ``resnet50``, a name of ``torchvision.models.list_models()``, or ``timm/resnet50``.
        weights: a checkpoint file, ``DEFAULT``, or the name of other published weights of torchvision
            (``IMAGENET1K_V1``).

    Raises:
        UserError: timm is not installed, there is no such model, there are no such weights, or they do not
            fit or cannot be downloaded.
    """
    if not weights:
        raise UserError(
            "no-weights",
            f"{name} has no weights yet: add --weights FILE, or --weights {DEFAULT} to download them",
        )
    load = _timm_model if name.startswith(TIMM) else _torchvision_model
    found = load(name, str(weights))
    found.model.eval()
    return found


def _torchvision_model(name: str, weights: str) -> LibraryModel:
    models = torchvision.models
    published = models.get_model_weights(name)
    # A file that was downloaded by other means still has its published name.
    entry = next((e for e in published if Path(weights).name == Path(e.url).name), None)
    if Path(weights).is_file():
        state: Mapping[str, Any] = read_checkpoint(weights).tensors
    elif weights in published.__members__:
        entry = published[weights]
        state = _download(name, entry)
    else:
        choices = ", ".join([DEFAULT, *(entry.name for entry in published)])
        raise UserError("missing-weights", f"--weights {weights}: no such file, and {name} has {choices}")
    if name == "googlenet" and entry is not None:  # torchvision drops these heads, which were never trained
        state = {key: tensor for key, tensor in state.items() if not key.startswith("aux")}
    model = models.get_model(name, weights=None, **_builder_options(name, state))
    _fill(model, state, name, weights)
    if name in EPS_OF_ZERO and entry is not None and entry.name == "COCO_V1":
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d)):
                module.eps = 0.0
    takes_a_picture = not any(
        part in type(model).__module__ for part in ("detection", "video", "optical_flow")
    )
    return LibraryModel(model, published.DEFAULT.transforms() if takes_a_picture and len(published) else None)


def _builder_options(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the builder sets for published weights, for any weights that fit."""
    module = torchvision.models.get_model_builder(name).__module__
    has_auxiliary = any(key.lower().startswith("aux") for key in state)
    if "segmentation" in module:
        auxiliary = {} if "lraspp" in module else {"aux_loss": has_auxiliary}
        return {"weights_backbone": None, **auxiliary}
    if "detection" in module:
        return {"weights_backbone": None}
    if name in ("googlenet", "inception_v3"):  # their input is normalised as TensorFlow's was
        return {"init_weights": False, "transform_input": True, "aux_logits": has_auxiliary}
    return {}


def _download(name: str, weights: Any) -> Mapping[str, Any]:
    try:
        state: Mapping[str, Any] = weights.get_state_dict(
            progress=True, check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError) as error:
        raise UserError(
            "download-failed",
            f"cannot download the weights of {name} from {weights.url} ({error}); fetch the file by other "
            "means and give its path as --weights",
        ) from error
    return state


def _timm_model(name: str, weights: str) -> LibraryModel:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise UserError(
            "missing-package", f"{name} is a model of timm, which is not installed: pip install timm"
        ) from error
    plain = name.removeprefix(TIMM)
    if not timm.is_model(plain):
        raise UserError("unknown-weights", f"timm has no model {plain!r}; timm.list_models() names them")
    from_file = Path(weights).is_file()
    if not from_file and weights != DEFAULT:
        raise UserError(
            "missing-weights", f"--weights {weights}: no such file; give one, or {DEFAULT} to download timm's"
        )
    try:
        model = timm.create_model(plain, pretrained=not from_file)
    except Exception as error:  # its download library raises many kinds
        raise UserError(
            "download-failed",
            f"timm cannot make {plain} with its weights ({error}); give a file that was fetched otherwise",
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
        raise UserError("other-network", f"{weights} does not fit {name}: {' '.join(lines)[:300]}") from error
