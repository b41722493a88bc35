"""Normalisation layers: detectron2's names, and the variants of the paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import misc

from ..ops import frozen_batch_norm, group_norm

NORM_NAMES = ("", "BN", "SyncBN", "FrozenBN", "GN", "GN1", "IN", "LN")  # values of a NORM key


class GroupNorm(nn.GroupNorm):
    """``activation(GN(x) + residual)`` with nn.GroupNorm's arguments, parameters and state dict.

    Args:
        num_groups: must divide ``num_channels``.
        num_channels: C.
        eps: added to the variance of a group.
        affine: learn a scale and a shift for each channel.
        activation: None or ``"relu"``.
        bias: learn a shift; needs ``affine``.
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
        """Normalise (N, C, *); ``residual`` has x's shape, ``activation`` serves a norm without its own."""
        relu = self.activation or activation
        return group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, residual=residual, activation=relu
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"


class GroupNormAct(GroupNorm):
    """``act(drop(GN(x)))``, the layout of timm's BatchNormAct2d: norm and activation under one name.

    ``drop`` and ``act`` are any modules, ``nn.Identity`` for none. The norm's kernel computes a ReLU that
    follows it directly.
    """

    drop: nn.Module
    act: nn.Module

    def attach(self, act: nn.Module | None, drop: nn.Module | None = None) -> None:
        """Set the modules that follow the norm."""
        fused = type(act) is nn.ReLU and drop is None
        self.activation = "relu" if fused else None
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None or fused else act

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """Normalise (N, C, *); ``residual`` and ``activation`` come before ``drop``."""
        y: Tensor = self.act(self.drop(super().forward(x, residual, activation)))
        return y


class FrozenBatchNorm2d(misc.FrozenBatchNorm2d):
    """torchvision's layer: the identity until weights are loaded, one pass where no gradient is needed."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        # The variance comes first so that 1 / sqrt(running_var + eps) is one, as in detectron2.
        self.running_var.fill_(1.0 - eps)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the affine function of each channel to (N, C, H, W)."""
        # An exported program does not know the number of RoIs, and F.batch_norm asks for it.
        if x.requires_grad or torch.compiler.is_compiling():
            return super().forward(x)
        return frozen_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> FrozenBatchNorm2d:
        """Return a layer that computes what ``norm`` computes in evaluation mode."""
        frozen = cls(norm.num_features, norm.eps)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(norm, name)
                if value is not None:
                    getattr(frozen, name).copy_(value)
        return frozen


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """``act(drop(FrozenBN(x)))``, the layout of timm's BatchNormAct2d, as :class:`GroupNormAct`."""

    drop: nn.Module
    act: nn.Module

    def attach(self, act: nn.Module | None, drop: nn.Module | None = None) -> None:
        """Set the modules that follow the norm."""
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


def frozen_norm(norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> FrozenBatchNorm2d:
    """Return a layer that computes what ``norm``, which may be timm's BatchNormAct2d, does in evaluation."""
    act, drop = getattr(norm, "act", None), getattr(norm, "drop", None)
    if not isinstance(act, nn.Module):
        return FrozenBatchNorm2d.from_batch_norm(norm)
    joined = FrozenBatchNormAct2d.from_batch_norm(norm)
    assert isinstance(joined, FrozenBatchNormAct2d)
    joined.attach(act, drop if isinstance(drop, nn.Module) else None)
    return joined


class LayerNorm2d(nn.Module):
    """detectron2's ``LN``: over the channels of each pixel, eps 1e-6. The paper's LN is ``GN1``."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels of each pixel of (N, C, H, W)."""
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
    """Return whether the module is a norm: its own parameters get no weight decay by default."""
    return isinstance(module, _NORM_TYPES)


def choose_groups(
    channels: int,
    num_groups: int = 32,
    min_channels_per_group: int = 1,
    group_size: int | None = None,
) -> int:
    """Return the largest divisor of ``channels`` up to ``num_groups`` that leaves large enough groups.

    Args:
        channels: C.
        num_groups: largest number; 1 is Layer Normalization (over C, H and W), C Instance Normalization.
        min_channels_per_group: least channels in a group; a layer with fewer is one group.
        group_size: exact number of channels in a group instead, as in table 3 of the paper.

    Raises:
        ValueError: an argument is below 1, or ``channels`` is no multiple of ``group_size``.
    """
    if min(channels, num_groups, min_channels_per_group, group_size or 1) < 1:
        raise ValueError("channels, num_groups, min_channels_per_group and group_size are at least 1")
    if group_size is not None:
        if channels % group_size:
            raise ValueError(f"{channels} channels cannot be split into groups of {group_size}")
        return channels // group_size
    most = max(1, min(num_groups, channels // min_channels_per_group))
    return max(groups for groups in range(1, most + 1) if channels % groups == 0)


def make_norm(
    name: str, channels: int, num_groups: int = 32, eps: float = 1e-5, min_channels_per_group: int = 1
) -> nn.Module | None:
    """Return the normalisation layer that a config's ``NORM`` key names.

    Args:
        name: one of :data:`NORM_NAMES`; ``""`` gives None.
        channels: C.
        num_groups: number of groups of ``GN``.
        eps: eps of ``GN``, ``GN1`` and ``IN``.
        min_channels_per_group: above 1, ``num_groups`` is the largest number of groups, see
            :func:`choose_groups`; at 1 it is the exact number.

    Raises:
        ValueError: the name is unknown, or the number of groups does not divide C.
    """
    if name == "":
        return None
    without_groups = {
        "BN": nn.BatchNorm2d,
        "SyncBN": nn.SyncBatchNorm,
        "FrozenBN": FrozenBatchNorm2d,
        "LN": LayerNorm2d,
    }
    if name in without_groups:
        return without_groups[name](channels)
    if min_channels_per_group > 1:
        num_groups = choose_groups(channels, num_groups, min_channels_per_group)
    groups = {"GN": num_groups, "GN1": 1, "IN": channels}.get(name)
    if groups is None:
        raise ValueError(f"unknown norm {name!r}; choose one of {', '.join(map(repr, NORM_NAMES))}")
    if channels % groups:
        raise ValueError(f"{channels} channels cannot be split into {groups} groups; set MODEL.GN.NUM_GROUPS")
    return GroupNorm(groups, channels, eps)
