"""Batch normalisation with fixed statistics."""

from __future__ import annotations

import torch
from torch import Tensor


def frozen_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """Compute ``F.batch_norm`` in evaluation, also with an eps of 0, which PyTorch 2.11's refuses.

    Args:
        x: (N, C, *).
        mean, var, weight, bias: (C,).
        eps: added to ``var``.
    """
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, cudnn)
