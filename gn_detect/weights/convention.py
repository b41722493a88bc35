"""The input that a network was trained with, as a checkpoint implies it and as a config sets it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config.schema import RESNET_BACKBONES

if TYPE_CHECKING:
    from ..config import Config

# Grey levels: Detectron's means and detectron2's differ by one, and detectron2 takes either for both.
MEAN_TOLERANCE = 2.0
STD_TOLERANCE = 0.05  # as a fraction


@dataclass(frozen=True)
class InputConvention:
    """The input that weights were trained with. None: not known.

    Attributes:
        format: ``"BGR"`` or ``"RGB"``.
        pixel_mean, pixel_std: in that order of channels, of pixels 0 to 255.
        stride_in_1x1: the stride of a bottleneck is on its first 1x1 convolution.
    """

    format: str | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    stride_in_1x1: bool | None = None

    def differing_keys(self, cfg: Config) -> dict[str, Any]:
        """Return the config keys to set for these weights, by name; empty if the config agrees."""
        keys: dict[str, Any] = {}
        if self.format is not None and cfg.input.format != self.format:
            keys["INPUT.FORMAT"] = self.format
        if self.pixel_mean is not None and not _near(cfg.model.pixel_mean, self.pixel_mean, MEAN_TOLERANCE):
            keys["MODEL.PIXEL_MEAN"] = list(self.pixel_mean)
        if self.pixel_std is not None:
            tolerance = STD_TOLERANCE * min(self.pixel_std)
            if not _near(cfg.model.pixel_std, self.pixel_std, tolerance):
                keys["MODEL.PIXEL_STD"] = list(self.pixel_std)
        resnets = cfg.model.resnets
        has_bottlenecks = cfg.model.backbone.name in RESNET_BACKBONES and resnets.depth >= 50
        if self.stride_in_1x1 not in (None, resnets.stride_in_1x1) and has_bottlenecks:
            keys["MODEL.RESNETS.STRIDE_IN_1X1"] = self.stride_in_1x1
        return keys

    @classmethod
    def of_config(cls, cfg: Config) -> InputConvention:
        """Return the convention of models of this config."""
        mean, std = tuple(cfg.model.pixel_mean), tuple(cfg.model.pixel_std)
        return cls(cfg.input.format, mean, std, cfg.model.resnets.stride_in_1x1)

    @classmethod
    def from_metadata(cls, value: dict[str, Any]) -> InputConvention:
        """Read the values of :meth:`as_metadata` from a file; values of other types are not known."""
        order, stride = value.get("format"), value.get("stride_in_1x1")
        return cls(
            order if isinstance(order, str) and order in ("BGR", "RGB") else None,
            _three_numbers(value.get("pixel_mean")),
            _three_numbers(value.get("pixel_std")),
            stride if isinstance(stride, bool) else None,
        )

    def as_metadata(self) -> dict[str, Any]:
        """Return plain values to be stored in a checkpoint."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


def as_command_line(keys: dict[str, Any]) -> str:
    """Return ``KEY VALUE ...`` as they are typed after a command."""
    return " ".join(
        f"{key} '{value}'" if isinstance(value, list) or value == "" else f"{key} {value}"
        for key, value in keys.items()
    )


def plain_text(values: Any, *keys: str) -> str:
    """Return the first text under these keys of a dict from a file, or ""; nothing else is made text."""
    found = [values.get(key) for key in keys] if isinstance(values, dict) else []
    return next((value for value in found if isinstance(value, str)), "")


def _near(found: Sequence[float], wanted: Sequence[float], tolerance: float) -> bool:
    pairs = zip(found, wanted, strict=False)
    return len(found) == len(wanted) and all(abs(a - b) <= tolerance for a, b in pairs)


def _three_numbers(value: Any) -> tuple[float, ...] | None:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    plain = all(isinstance(x, int | float) and -1e6 < x < 1e6 for x in value)
    return tuple(map(float, value)) if plain else None


_IMAGENET_RGB, _IMAGENET_RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_DETECTRON_BGR, _NO_STD = (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)

# torchvision's and timm's ResNets and detectors: 0 to 1 with ImageNet's mean and deviation, times 255.
TORCHVISION = InputConvention("RGB", _IMAGENET_RGB, _IMAGENET_RGB_STD, False)
# Detectron's GN models, and mmdetection's that were made from them.
DETECTRON_GN = InputConvention("BGR", _DETECTRON_BGR, _NO_STD, False)
# The ResNets of He et al. in Caffe2's format.
DETECTRON_MSRA = InputConvention("BGR", _DETECTRON_BGR, _NO_STD, True)
# tensorpack's ResNets and detectors read by OpenCV.
TENSORPACK = InputConvention("BGR", _IMAGENET_RGB[::-1], _IMAGENET_RGB_STD[::-1], False)
# FAIR's X-101-32x8d as detectron2 publishes it.
DETECTRON_RESNEXT = InputConvention("BGR", _IMAGENET_RGB[::-1], _IMAGENET_RGB_STD[::-1], False)
