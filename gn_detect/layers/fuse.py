"""Fused GroupNorm in anybody's model."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import nn

from .norm import GroupNorm


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every ``nn.GroupNorm`` by :class:`GroupNorm`, with the ReLU behind it where that is certain.

    It is certain where a ReLU follows the norm in an ``nn.Sequential`` (it becomes an ``nn.Identity``; names
    stay), and in detectron2's ``Conv2d``, which holds both. A norm in several places keeps its ReLU apart. A
    norm with hooks is left as it is, as are subclasses of ``nn.GroupNorm``, whose forward may differ, and a
    ReLU with hooks.

    Parameters, their names and the state dict do not change, nor does the function. A block that calls its
    ReLU or adds its residual in its own ``forward`` can be given :func:`gn_detect.ops.group_norm` by hand.

    Args:
        model: any module.
        inplace: change ``model``; its parameters stay the same objects, and their optimizer valid.

    Returns:
        The model or its copy. If it is itself an ``nn.GroupNorm``, a new module.
    """
    model = model if inplace else copy.deepcopy(model)
    if _is_plain_norm(model):
        return _fused(model)
    places = _places(model)
    fused: dict[nn.Module, GroupNorm] = {}
    for parent, name, child in places:
        if _is_plain_norm(child):
            # A shared norm stays shared.
            fused[child] = fused.get(child) or _fused(child)
            _replace(parent, name, fused[child])
    shared = {new for old, new in fused.items() if sum(child is old for _, _, child in places) > 1}
    for module in list(model.modules()):
        if type(module).forward is nn.Sequential.forward:
            _absorb_next(module, set(fused.values()) - shared)
        elif isinstance(module, nn.Conv2d) and getattr(module, "norm", None) in fused.values():
            _absorb_activation(module, shared)
    return model


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Each parent, name and child; a child in several places comes several times."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]


def _is_plain_norm(module: nn.Module) -> bool:
    return type(module) is nn.GroupNorm and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches or changes what the module is given or gives."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _fused(norm: nn.Module) -> GroupNorm:
    """The same norm with the same parameters."""
    assert isinstance(norm, nn.GroupNorm)
    new = GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False)
    new.affine = norm.affine
    new.weight, new.bias = norm.weight, norm.bias
    new.train(norm.training)
    return new


def _replace(parent: nn.Module, name: str, child: nn.Module) -> None:
    parent._modules[name] = child


def _absorb_next(sequential: nn.Module, norms: set[GroupNorm]) -> None:
    """A norm takes over the ReLU that follows it."""
    children = list(sequential._modules.items())
    for (_, norm), (name, after) in zip(children, children[1:], strict=False):
        if norm in norms and type(after) is nn.ReLU and not has_hooks(after):
            norm.activation = "relu"
            _replace(sequential, name, nn.Identity())


def _absorb_activation(conv: Any, shared: set[GroupNorm]) -> None:
    """A norm takes over the ReLU of detectron2's ``Conv2d`` (detectron2/layers/wrappers.py)."""
    activation = getattr(conv, "activation", None)
    is_relu = activation in (F.relu, F.relu_) or (type(activation) is nn.ReLU and not has_hooks(activation))
    if conv.norm not in shared and is_relu and type(conv).__module__.startswith("detectron2."):
        conv.norm.activation = "relu"
        conv.activation = None
