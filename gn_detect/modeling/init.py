"""Weight initialisation, as Caffe2 named it and detectron2 uses it."""

from __future__ import annotations

from torch import nn


def init_he(module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """He et al. 2015 (arXiv 1502.01852) normal, fan out, for a convolution before a ReLU; bias 0."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def init_xavier(module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> None:
    """Caffe2's XavierFill: uniform with variance 1 / fan in; bias 0."""
    nn.init.kaiming_uniform_(module.weight, a=1)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def init_normal(module: nn.Conv2d | nn.ConvTranspose2d | nn.Linear, std: float) -> None:
    """Zero-mean normal with standard deviation ``std``; bias 0."""
    nn.init.normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
