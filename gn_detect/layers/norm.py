"""Normalisation layers by the names that detectron2's configs use, and the paper's variants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import misc

from ..ops import frozen_batch_norm, group_norm
from .groups import choose_groups

NORM_NAMES = ("", "BN", "SyncBN", "FrozenBN", "GN", "GN1", "IN", "LN")
"""Values of every ``NORM`` key."""


class GroupNorm(nn.GroupNorm):
    """``activation(GN(x) + residual)`` with nn.GroupNorm's parameters and state dict.

    Args:
        num_groups: number of groups; must divide ``num_channels``.
        num_channels: C.
        eps: added to the variance of a group.
        affine: learn a scale and a shift for each channel.
        activation: None or ``"relu"``.
        bias: learn a shift; with ``affine`` only.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """(N, C, *) -> (N, C, *); ``residual`` has x's shape, ``activation`` is for a norm without one."""
        return group_norm(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            residual=residual,
            activation=self.activation or activation,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"


class GroupNormAct(GroupNorm):
    """``act(drop(GN(x)))``, the layout of timm's BatchNormAct2d: norm and activation under one name.

    Attributes:
        drop, act: any module; ``nn.Identity`` for none. A ReLU right behind the norm is part of its kernel.
    """

    drop: nn.Module
    act: nn.Module

    def attach(self, act: nn.Module | None, drop: nn.Module | None = None) -> None:
        """Set what follows the norm."""
        fused = type(act) is nn.ReLU and drop is None
        self.activation = "relu" if fused else None
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None or fused else act

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """(N, C, *) -> (N, C, *); what is given here comes before ``drop``."""
        y: Tensor = self.act(self.drop(super().forward(x, residual, activation)))
        return y


class FrozenBatchNorm2d(misc.FrozenBatchNorm2d):
    """torchvision's layer; the identity until weights are loaded, one pass where no gradient is needed."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        # The variance comes first so that 1 / sqrt(running_var + eps) is one, as in detectron2.
        self.running_var.fill_(1.0 - eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        # A program that is exported knows no number of RoIs, which F.batch_norm asks for.
        if x.requires_grad or torch.compiler.is_compiling():
            return super().forward(x)
        return frozen_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> FrozenBatchNorm2d:
        """The same function as ``norm`` in evaluation mode."""
        frozen = cls(norm.num_features, norm.eps)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(norm, name)
                if value is not None:
                    getattr(frozen, name).copy_(value)
        return frozen


class LayerNorm2d(nn.Module):
    """detectron2's ``LN``: over the channels of each pixel, eps 1e-6. The paper's LN is ``GN1``."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        y = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


_NORM_TYPES = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    LayerNorm2d,
    misc.FrozenBatchNorm2d,
)


def is_norm(module: nn.Module) -> bool:
    """Whether the module's own parameters belong to a normalisation (weight decay is 0 there by default)."""
    return isinstance(module, _NORM_TYPES)


def make_norm(
    name: str, channels: int, num_groups: int = 32, eps: float = 1e-5, min_channels_per_group: int = 1
) -> nn.Module | None:
    """The normalisation layer of a config's ``NORM`` key.

    Args:
        name: one of :data:`NORM_NAMES`; ``""`` gives None.
        channels: C.
        num_groups, eps: of ``GN``; ``eps`` also of ``GN1`` and ``IN``.
        min_channels_per_group: above 1, ``num_groups`` is the most groups of a ``GN``, see
            :func:`choose_groups`; at 1 each has exactly so many.

    Raises:
        ValueError: unknown name, or C not divisible by the number of groups.
    """
    if name == "":
        return None
    if name == "BN":
        return nn.BatchNorm2d(channels)
    if name == "SyncBN":
        return nn.SyncBatchNorm(channels)
    if name == "FrozenBN":
        return FrozenBatchNorm2d(channels)
    if name == "LN":
        return LayerNorm2d(channels)
    if min_channels_per_group > 1:
        num_groups = choose_groups(channels, num_groups, min_channels_per_group)
    groups = {"GN": num_groups, "GN1": 1, "IN": channels}.get(name)
    if groups is None:
        raise ValueError(f"unknown norm {name!r}; choose one of {', '.join(map(repr, NORM_NAMES))}")
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be split into {groups} groups; set MODEL.GN.NUM_GROUPS")
    return GroupNorm(groups, channels, eps)
