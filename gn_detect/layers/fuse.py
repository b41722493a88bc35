"""Fused GroupNorm and ReLU in any model."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import nn

from .norm import GroupNorm


def fuse_relu(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every ``nn.GroupNorm`` by :class:`GroupNorm`, and let it compute the ReLU that follows.

    A ReLU follows for certain where an ``nn.Sequential`` calls it right after the norm (also after a norm
    that is ours already), and in detectron2's ``Conv2d``, which holds both. The norm then has
    ``activation="relu"``, and ``nn.Identity`` replaces the ReLU in the ``nn.Sequential``. The norm's own
    output, as a hook or a slice of the ``nn.Sequential`` reads it, is then the output of the ReLU.

    Subclasses of ``nn.GroupNorm``, whose forward may differ, and norms with hooks stay as they are. A norm in
    several places and a ReLU with hooks are not joined. A block that calls its ReLU or adds its residual in
    its own ``forward`` can call :func:`gn_detect.ops.group_norm` instead.

    Parameters, their names, the state dict and the function of the model do not change.

    Args:
        model: any module.
        inplace: change ``model``. Its parameters stay the same objects, and their optimizer valid.

    Returns:
        The model or its copy; a new module if the model itself is an ``nn.GroupNorm``.
    """
    model = model if inplace else copy.deepcopy(model)
    if _is_plain_norm(model):
        return _fused(model)
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]
    fused = {child: _fused(child) for _, _, child in places if _is_plain_norm(child)}
    for parent, name, child in places:
        if child in fused:
            parent._modules[name] = fused[child]
    uses = Counter(fused.get(child, child) for _, _, child in places)
    for module in model.modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            _absorb_relus(module, uses)
        elif isinstance(module, nn.Conv2d) and getattr(module, "norm", None) in fused.values():
            _absorb_activation(module, uses)
    return model


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Call :func:`fuse_relu`; the old name, which goes with the next release."""
    warnings.warn("fuse is renamed to fuse_relu", DeprecationWarning, stacklevel=2)
    return fuse_relu(model, inplace=inplace)


def has_hooks(module: nn.Module) -> bool:
    """Return whether something watches or changes the inputs or outputs of the module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def _is_plain_norm(module: nn.Module) -> bool:
    return type(module) is nn.GroupNorm and not has_hooks(module)


def _fused(norm: nn.Module) -> GroupNorm:
    """Return the same norm with the same parameters."""
    assert isinstance(norm, nn.GroupNorm)
    new = GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine=False)
    new.affine = norm.affine
    new.weight, new.bias = norm.weight, norm.bias
    new.train(norm.training)
    return new


def _absorb_relus(sequential: nn.Sequential, uses: Counter[nn.Module]) -> None:
    children = sequential._modules
    for name, following in pairwise(children):
        norm, relu = children[name], children[following]
        if type(norm) is GroupNorm and norm.activation is None and type(relu) is nn.ReLU:
            if uses[norm] == 1 and not has_hooks(norm) and not has_hooks(relu):
                norm.activation = "relu"
                children[following] = nn.Identity()


def _absorb_activation(conv: Any, uses: Counter[nn.Module]) -> None:
    """Move the ReLU of detectron2's ``Conv2d`` (detectron2/layers/wrappers.py) into its norm."""
    activation = getattr(conv, "activation", None)
    is_relu = activation in (F.relu, F.relu_) or (type(activation) is nn.ReLU and not has_hooks(activation))
    if uses[conv.norm] == 1 and is_relu and type(conv).__module__.startswith("detectron2."):
        conv.norm.activation = "relu"
        conv.activation = None
