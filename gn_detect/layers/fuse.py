"""Fused GroupNorm in anybody's model."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import nn

from .norm import GroupNorm


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every ``nn.GroupNorm`` by :class:`GroupNorm`, and compute the ReLU behind it in its kernel.

    That is done where an ``nn.Sequential`` calls the ReLU right after the norm, also one of ours, and in
    detectron2's ``Conv2d``, which holds both. Called by itself, as by a loop over the children or in a slice
    of them, a norm gives what it gave. A norm with hooks is left as it is, as are subclasses of
    ``nn.GroupNorm``, whose forward may differ; a norm or ReLU with hooks is called by itself.

    Modules, parameters, their names and the state dict do not change, nor does the function. A block that
    calls its ReLU or adds its residual in its own ``forward`` can be given :func:`gn_detect.ops.group_norm`
    by hand.

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
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            children = list(module)
            if any(map(_is_pair, children, children[1:])):
                kind: Any = type(module)
                module.__class__ = _fused_kind(kind)
        elif isinstance(module, nn.Conv2d) and getattr(module, "norm", None) in fused.values():
            _absorb_activation(module, shared)
    return model


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential``, or a subclass with its forward, whose norms compute the ReLU behind them."""

    _unfused: type[nn.Module] = nn.Sequential

    def forward(self, input: Any) -> Any:
        """As before, with fewer passes over memory."""
        children = list(self)
        while children:
            module = children.pop(0)
            if _is_pair(module, *children[:1]) and not has_hooks(module) and not has_hooks(children[0]):
                input = module(input, activation="relu")
                del children[0]
            else:
                input = module(input)
        return input

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The kinds of subclasses are made when needed, so a pickle names the subclass instead."""
        _, _, *state = tuple(super().__reduce_ex__(2))
        return (_new, (self._unfused,), *state)


@cache
def _fused_kind(kind: Any) -> Any:
    """A subclass of :class:`FusedSequential` and of ``kind``."""
    if kind is nn.Sequential:
        return FusedSequential
    return type(kind.__name__, (FusedSequential, kind), {"_unfused": kind})


def _new(kind: Any) -> Any:
    fused = _fused_kind(kind)
    return fused.__new__(fused)


def _is_pair(norm: nn.Module, after: nn.Module | None = None) -> bool:
    return type(norm) is GroupNorm and norm.activation is None and type(after) is nn.ReLU


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


def _absorb_activation(conv: Any, shared: set[GroupNorm]) -> None:
    """A norm takes over the ReLU of detectron2's ``Conv2d`` (detectron2/layers/wrappers.py)."""
    activation = getattr(conv, "activation", None)
    is_relu = activation in (F.relu, F.relu_) or (type(activation) is nn.ReLU and not has_hooks(activation))
    if conv.norm not in shared and is_relu and type(conv).__module__.startswith("detectron2."):
        conv.norm.activation = "relu"
        conv.activation = None
