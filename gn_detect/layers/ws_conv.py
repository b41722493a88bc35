"""Convolution whose weight is standardised in each forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.weight_standardization import STANDARDIZATIONS, standardize_weight
from .conv import Conv2d


@dataclass(frozen=True)
class _Cached:
    """A standardised weight, and the weight that it was made of: its memory and its version."""

    source: Tensor  # an alias, so that its memory is not given to another tensor
    version: int
    result: Tensor

    def is_of(self, weight: Tensor) -> bool:
        same = weight.data_ptr() == self.source.data_ptr() and weight.stride() == self.source.stride()
        return same and weight.dtype == self.source.dtype and weight._version == self.version


class WSConv2d(Conv2d):
    """:class:`Conv2d` with Weight Standardization; its state dict holds the weight as it is trained.

    In evaluation without gradients the standardised weight is kept until the weight changes.

    Args:
        *args, **kwargs: arguments of :class:`Conv2d`.
        kind: ``"WS"`` (mmcv's ConvWS) or ``"StdConv"`` (timm's StdConv2d, BiT), see
            :func:`gn_detect.ops.standardize_weight`.
        eps: by default that of the kind's library.

    Raises:
        ValueError: an unknown kind, or filters of one value.
    """

    def __init__(self, *args: Any, kind: str = "WS", eps: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if kind not in STANDARDIZATIONS:
            raise ValueError(f"unknown weight standardization {kind!r}; choose WS or StdConv")
        if self.weight[0].numel() < 2:
            raise ValueError("filters of one value cannot be standardised")
        self.kind = kind
        self.eps = STANDARDIZATIONS[kind] if eps is None else eps
        self._cached: _Cached | None = None

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, kind: str, eps: float | None = None) -> WSConv2d:
        """Return a convolution with the parameters, norm and activation of ``conv``."""
        new = cls(*_arguments(conv), kind=kind, eps=eps, **_parts(conv), device="meta")
        new.weight, new.bias = conv.weight, conv.bias
        new.train(conv.training)
        return new

    def to_conv(self) -> Conv2d:
        """Return the plain convolution that computes the same."""
        plain = Conv2d(*_arguments(self), **_parts(self), device="meta")
        trains = self.weight.requires_grad
        plain.weight = nn.Parameter(self.standardised_weight().detach().clone(), requires_grad=trains)
        plain.bias = self.bias
        plain.train(self.training)
        return plain

    def standardised_weight(self) -> Tensor:
        """Return the weight of the convolution, (C, I / groups, kH, kW)."""
        weight = self.weight
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if self.training or torch.is_grad_enabled() or recorded or weight.is_inference() or weight.is_meta:
            return standardize_weight(weight, self.kind, self.eps)
        if self._cached is None or not self._cached.is_of(weight):
            with torch.inference_mode(False), torch.no_grad():
                result = standardize_weight(weight, self.kind, self.eps)
            self._cached = _Cached(weight.detach(), weight._version, result)
        return self._cached.result

    def train(self, mode: bool = True) -> WSConv2d:
        """Set the mode; what is kept of the weight goes: a CUDA graph changes weights without a trace."""
        self._cached = None
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}, eps={self.eps:g}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, self.standardised_weight(), bias)


def standardize_convs(module: nn.Module, kind: str) -> nn.Module:
    """Replace every :class:`Conv2d` in ``module`` by a :class:`WSConv2d` with its parameters.

    Args:
        module: a convolution itself is returned as a new module; others are changed.
        kind: of the standardization; ``""`` changes nothing.
    """
    return _replace(module, Conv2d, lambda conv: WSConv2d.from_conv(conv, kind)) if kind else module


def fold_standardization(module: nn.Module) -> nn.Module:
    """Replace every :class:`WSConv2d` in ``module`` by the plain convolution that computes the same."""
    return _replace(module, WSConv2d, lambda conv: conv.to_conv())


def _replace(module: nn.Module, kind: type, make: Any) -> nn.Module:
    if type(module) is kind:
        new: nn.Module = make(module)
        return new
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is kind:
                setattr(parent, name, make(child))
    return module


def _arguments(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding


def _parts(conv: nn.Conv2d) -> dict[str, Any]:
    return {
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": conv.bias is not None,
        "padding_mode": conv.padding_mode,
        "norm": getattr(conv, "norm", None),
        "activation": getattr(conv, "activation", None),
        "norm_last": getattr(conv, "norm_last", False),
    }
