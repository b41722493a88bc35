"""Mask head (He et al. 2017, arXiv 1703.06870): convolutions, one upsampling, a mask for each class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv2d
from ..ops import rasterize_masks
from ..structures import Target
from .init import init_he, init_normal
from .resnet import NormFactory


class MaskHead(nn.Module):
    """3x3 convolutions with norm and ReLU, a 2x2 transposed convolution with ReLU, and a 1x1 predictor.

    Args:
        in_channels: C of the pooled features.
        conv_dims: widths of the 3x3 convolutions.
        deconv_dim: width of the upsampled features.
        num_masks: one for each class, or 1 for a class-agnostic head.
        norm: norm of the 3x3 convolutions; bias only where there is none.
    """

    def __init__(
        self, in_channels: int, conv_dims: Sequence[int], deconv_dim: int, num_masks: int, norm: NormFactory
    ) -> None:
        super().__init__()
        channels = in_channels
        self.num_convs = len(conv_dims)
        for i, width in enumerate(conv_dims, start=1):
            layer_norm = norm(width)
            convolution = Conv2d(
                channels, width, 3, padding=1, bias=layer_norm is None, norm=layer_norm, activation="relu"
            )
            init_he(convolution)
            self.add_module(f"mask_fcn{i}", convolution)
            channels = width
        self.deconv = nn.ConvTranspose2d(channels, deconv_dim, 2, stride=2)
        self.predictor = nn.Conv2d(deconv_dim, num_masks, 1)
        init_he(self.deconv)
        init_normal(self.predictor, std=0.001)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """(R, C, S, S) features and (R,) classes -> (R, 2S, 2S) logits of the mask of each RoI's class."""
        for i in range(1, self.num_convs + 1):
            x = getattr(self, f"mask_fcn{i}")(x)
        x = F.relu_(self.deconv(x))
        if self.predictor.out_channels == 1:
            return self.predictor(x)[:, 0]
        if _sums_as_detectron2(x):
            return self.predictor(x)[torch.arange(len(x)), labels]
        # A RoI needs the mask of one class, so only that class' 1x1 filter is applied: for COCO an 80th of
        # the predictor's work and memory.
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)  # (R, 4 * S * S, C)
        logits = torch.bmm(cells, self.predictor.weight[labels, :, 0])[..., 0]
        if self.predictor.bias is not None:
            logits = logits + self.predictor.bias[labels, None]
        return logits.view(-1, *x.shape[2:])


def _sums_as_detectron2(x: Tensor) -> bool:
    """Where RoIAlign is exact, too: another order of summation turns over pixels at the threshold."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.device.type == "cpu" and x.is_contiguous() and not torch.is_grad_enabled() and not recorded


def mask_loss(
    logits: Tensor, boxes: Sequence[Tensor], matched: Sequence[Tensor], targets: Sequence[Target]
) -> Tensor:
    """Mean binary cross-entropy over the pixels of all foreground RoIs; 0 where there is none.

    Args:
        logits: (R, S, S) of all images' foreground RoIs.
        boxes: for each image (R_n, 4) foreground RoIs in input pixels.
        matched: for each image (R_n,) the object that each RoI stands for.
        targets: ground truth with masks.

    Raises:
        ValueError: a target without masks.
    """
    if len(logits) == 0:
        return logits.sum() * 0.0
    side = logits.shape[-1]
    wanted = []
    for target, index, box in zip(targets, matched, boxes, strict=True):
        if target.masks is None:
            raise ValueError("a model with a mask head needs targets with masks")
        wanted.append(rasterize_masks(target.masks, index, box, side))
    return F.binary_cross_entropy_with_logits(logits, torch.cat(wanted).to(logits.dtype))
