"""Recognise the norms that can be converted, by their tensors and function rather than by their class."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import misc

from ..errors import UserError

_TENSORS = ("weight", "bias", "running_mean", "running_var")

# These compute batch normalisation; other forwards are tried on random numbers.
_STOCK_FORWARDS = {
    nn.modules.batchnorm._BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    misc.FrozenBatchNorm2d.forward,
}

# Between a norm of unknown class and the formula, on numbers of size 1; other functions differ far more.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SourceNorm:
    """A norm whose function in evaluation mode is ``scale * x + shift`` for each channel.

    Attributes:
        kind: name of its class.
        scale, shift: (C,) float64 on the CPU: ``weight / sqrt(var + eps)`` and ``bias - mean * scale``.
        weight, bias: (C,) float64; ones and zeros for a norm without.
        mean, var: (C,) float64, the running statistics. None for a norm without: Caffe2's affine-only
            layers, and fresh models, whose statistics are 0 and 1 in every channel.
        tracked: its function is fixed; False for a BatchNorm that uses the batch even in evaluation mode.
        affine: it has a weight and a bias of its own.
        trainable: its weight, and its bias, require gradients.
        activation, dropout: modules that it applies to its output, as timm's BatchNormAct2d does.
    """

    kind: str
    channels: int
    eps: float
    scale: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    var: Tensor | None
    tracked: bool
    affine: bool
    trainable: tuple[bool, bool]
    activation: nn.Module | None
    dropout: nn.Module | None
    device: torch.device
    dtype: torch.dtype


def read_norm(name: str, module: nn.Module) -> SourceNorm | None:
    """Read a BatchNorm, a FrozenBatchNorm or an affine-only norm; return None for any other module.

    Args:
        name: for messages.

    Raises:
        UserError: it is lazy, on the meta device, holds a BatchNorm's tensors and computes something else, or
            has numbers that no BatchNorm can have.
    """
    is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    is_lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params()
    if is_lazy and not is_batch_norm:
        return None
    if not is_batch_norm and not _holds_statistics(module) and not _is_affine_only(module):
        return None
    if is_lazy:
        raise UserError(
            "unconvertible-norm",
            f"{_called(name)} is a {type(module).__name__} without shape; run one forward pass first",
        )
    norm = _read(name, module)
    _refuse_impossible(name, module)
    stock = is_batch_norm and type(module).forward in _STOCK_FORWARDS
    if not stock and norm.tracked and not _computes(module, norm):
        raise UserError(
            "unconvertible-norm",
            f"{_called(name)} is a {type(module).__name__}, which holds a BatchNorm's tensors but computes "
            f"something else; leave it out with exclude={name!r}",
        )
    return norm


def _called(name: str) -> str:
    return f"'{name}'" if name else "the model"


def _holds_statistics(module: nn.Module) -> bool:
    """Recognise detectron2's and torchvision's FrozenBatchNorm2d and their many copies."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return _are_channels([getattr(module, name, None) for name in _TENSORS])


def _is_affine_only(module: nn.Module) -> bool:
    """Recognise Caffe2's AffineChannel: a scale and a shift, and nothing else."""
    if type(module).__module__.startswith("torch.") or next(module.children(), None) is not None:
        return False
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if set(tensors) != {"weight", "bias"} or not _are_channels(list(tensors.values())):
        return False
    return _computes(module, _read("", module))


def _are_channels(tensors: list[object]) -> bool:
    first = tensors[0]
    return (
        isinstance(first, Tensor)
        and first.dim() == 1
        and all(isinstance(tensor, Tensor) and tensor.shape == first.shape for tensor in tensors)
    )


def _read(name: str, module: nn.Module) -> SourceNorm:
    held = {key: getattr(module, key, None) for key in _TENSORS}
    first = next((tensor for tensor in held.values() if isinstance(tensor, Tensor)), None)
    channels = first.numel() if first is not None else int(getattr(module, "num_features", 0))
    if first is not None and first.is_meta:
        raise UserError(
            "unconvertible-norm", f"{_called(name)} is on the meta device; load the weights before converting"
        )
    double = {
        key: None if tensor is None else tensor.detach().to("cpu", torch.float64)
        for key, tensor in held.items()
    }
    weight = double["weight"] if double["weight"] is not None else torch.ones(channels, dtype=torch.float64)
    bias = double["bias"] if double["bias"] is not None else torch.zeros(channels, dtype=torch.float64)
    mean, var = double["running_mean"], double["running_var"]
    eps = float(getattr(module, "eps", 0.0))
    scale, shift = weight, bias
    if mean is not None and var is not None:
        scale = weight / (var + eps).sqrt()
        shift = bias - mean * scale
        if bool((var < 0).any()):  # its eps was subtracted, see _refuse_impossible
            var = var + eps
        # Initial: 0 and 1 everywhere, or 1 - eps as detectron2 writes it, in float32.
        if bool((mean == 0).all()) and bool(((var - 1).abs() <= eps + 1e-6).all()):
            mean = var = None

    def requires_grad(tensor: Tensor | None) -> bool:
        return tensor is not None and tensor.requires_grad

    def child(name: str) -> nn.Module | None:
        found = getattr(module, name, None)
        return found if isinstance(found, nn.Module) and not isinstance(found, nn.Identity) else None

    return SourceNorm(
        kind=type(module).__name__,
        channels=channels,
        eps=eps or 1e-5,
        scale=scale,
        shift=shift,
        weight=weight,
        bias=bias,
        mean=mean,
        var=var,
        tracked=double["running_mean"] is not None or not isinstance(module, nn.modules.batchnorm._BatchNorm),
        affine=held["weight"] is not None,
        trainable=(requires_grad(held["weight"]), requires_grad(held["bias"])),
        activation=child("act"),
        dropout=child("drop"),
        device=first.device if first is not None else torch.device("cpu"),
        dtype=first.dtype if first is not None else torch.get_default_dtype(),
    )


def _refuse_impossible(name: str, module: nn.Module) -> None:
    for key in _TENSORS:
        tensor = getattr(module, key, None)
        if isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
            raise UserError(
                "not-finite",
                f"{_called(name)} has a {key} with values that are not finite; take weights from before the "
                "training diverged",
            )
    var = getattr(module, "running_var", None)
    if isinstance(var, Tensor):
        # A norm with eps 0 computes the same with another eps, subtracted from its variances. Those of
        # channels that hardly vary are below 0 then. Only the sum counts, in the norm's own precision.
        eps = float(getattr(module, "eps", 0.0))
        under_root = var.to(torch.promote_types(var.dtype, torch.float32)) + eps
        if bool((under_root <= 0).any()):
            raise UserError(
                "unconvertible-norm",
                f"{_called(name)} has a running_var of {var.min():g} and an eps of {eps:g}, and divides by "
                "the root of their sum, which is not above 0; give weights whose variances are, or the eps "
                "that they were trained with",
            )


def _computes(module: nn.Module, norm: SourceNorm) -> bool:
    """Compare the module with scale, shift and activation, on random numbers of its own size, in float64."""
    trial = copy.deepcopy(module).to("cpu", torch.float64).eval()
    dimensions = {"BatchNorm1d": 1, "BatchNorm3d": 3}
    spatial = [dimensions[base.__name__] for base in type(module).__mro__ if base.__name__ in dimensions]
    per_channel = (1, norm.channels) + (1,) * (spatial[0] if spatial else 2)
    shape = (2, norm.channels) + (3,) * (len(per_channel) - 2)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if norm.mean is not None and norm.var is not None:
        x = x * (norm.var + norm.eps).sqrt().view(per_channel) + norm.mean.view(per_channel)
    expected = x * norm.scale.view(per_channel) + norm.shift.view(per_channel)
    if norm.activation is not None:
        expected = copy.deepcopy(norm.activation).to("cpu", torch.float64).eval()(expected)
    try:
        with torch.no_grad():
            found = trial(x)
    except Exception:  # a module that wants other arguments is no norm
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return bool(((found - expected).abs() <= _TOLERANCE * (1 + expected.abs())).all())
