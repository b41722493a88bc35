"""Losses shared by the RPN and the box head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def smooth_l1_sum(prediction: Tensor, target: Tensor, beta: float) -> Tensor:
    """Sum of the smooth L1 loss (Girshick 2015, arXiv 1504.08083, equation 3); plain L1 where beta is 0."""
    if beta < 1e-5:
        return F.l1_loss(prediction, target, reduction="sum")
    return F.smooth_l1_loss(prediction, target, reduction="sum", beta=beta)
