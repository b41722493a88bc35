"""Mask head (He et al. 2017, arXiv 1703.06870): convolutions, one upsampling, a mask for each class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import ROIMaskHead
from ..layers import init_he, init_normal, make_conv
from ..ops import rasterize_masks
from ..structures import Target
from .resnet import NormFactory


class MaskHead(nn.Module):
    """3x3 convolutions with norm and ReLU, a 2x2 transposed convolution with ReLU, and a 1x1 predictor.

    ``num_masks`` is the number of classes, or 1 for a class-agnostic head; ``style`` is ``MODEL.CONV_STYLE``.
    """

    def __init__(
        self,
        in_channels: int,
        settings: ROIMaskHead,
        num_masks: int,
        norm: NormFactory,
        style: str = "detectron2",
    ) -> None:
        super().__init__()
        channels, width = in_channels, settings.conv_dim
        self.num_convs = settings.num_conv
        for i in range(1, self.num_convs + 1):
            convolution = make_conv(channels, width, 3, norm(width), "relu", style)
            init_he(convolution)
            self.add_module(f"mask_fcn{i}", convolution)
            channels = width
        self.deconv = nn.ConvTranspose2d(channels, width, 2, stride=2)
        self.predictor = nn.Conv2d(width, num_masks, 1)
        init_he(self.deconv)
        init_normal(self.predictor, std=0.001)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Map (R, C, S, S) features and (R,) classes to (R, 2S, 2S) logits of each RoI's class."""
        for i in range(1, self.num_convs + 1):
            x = getattr(self, f"mask_fcn{i}")(x)
        x = F.relu_(self.deconv(x))
        if self.predictor.out_channels == 1:
            return self.predictor(x)[:, 0]
        if _sums_as_detectron2(x):
            return self.predictor(x)[torch.arange(len(x)), labels]
        # A RoI needs the mask of one class, so only the 1x1 filter of that class is applied: for COCO 1/80 of
        # the predictor's work and memory.
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)  # (R, 4 * S * S, C)
        logits = torch.bmm(cells, self.predictor.weight[labels, :, 0])[..., 0]
        if self.predictor.bias is not None:
            logits = logits + self.predictor.bias[labels, None]
        return logits.view(-1, *x.shape[2:])


def _sums_as_detectron2(x: Tensor) -> bool:
    """Return whether to sum in detectron2's order, where RoIAlign is exact as well.

    Another order of summation flips pixels at the threshold.
    """
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return x.device.type == "cpu" and x.is_contiguous() and not torch.is_grad_enabled() and not recorded


def mask_loss(
    logits: Tensor, boxes: Sequence[Tensor], matched: Sequence[Tensor], targets: Sequence[Target]
) -> Tensor:
    """Return the mean binary cross-entropy over the pixels of all foreground RoIs, 0 if there are none.

    Args:
        logits: (R, S, S) of all images' foreground RoIs.
        boxes: for each image (R_n, 4) foreground RoIs in input pixels.
        matched: for each image (R_n,) the index of each RoI's object.
        targets: ground truth with masks.

    Raises:
        ValueError: a target has no masks.
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
