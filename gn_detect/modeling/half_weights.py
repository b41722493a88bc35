"""Weights in half precision for a forward pass under autocast, rounded by one operator.

Autocast rounds each weight by itself, and widens each gradient by itself: two launches for each of some 150
weights and biases in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Conv2d

ROUNDED = (Conv2d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # autocast rounds their weights, and no others


@contextmanager
def half_weights(model: nn.Module, dtype: torch.dtype, without: nn.Module | None = None) -> Iterator[None]:
    """Replace weights of convolutions and linear layers by rounded ones inside the ``with`` block.

    Gradients reach the weights themselves, and have the bits that autocast gives.

    Args:
        model: on one device.
        dtype: of autocast.
        without: a module that keeps its weights.
    """
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        if type(module) in ROUNDED and module is not without
        for name, parameter in module.named_parameters(recurse=False)
    ]
    rounded = _Round.apply(dtype, *(parameter for _, _, parameter in places))
    try:
        for (owner, name, _), value in zip(places, rounded, strict=True):
            owner[name] = value
        yield
    finally:
        for owner, name, parameter in places:
            owner[name] = parameter


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        rounded = _converted(weights, dtype)
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(r for r, needed in zip(rounded, ctx.needs_input_grad[1:], strict=True) if not needed)
        )
        return tuple(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        wide = iter(_converted([g for g in gradients if g is not None], ctx.dtype))
        return None, *(None if g is None else next(wide) for g in gradients)


def _converted(tensors: Any, dtype: torch.dtype) -> list[Tensor]:
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, tensors)
    return results
