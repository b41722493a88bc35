"""Functions of Triton kernels on boxes.

A kernel that calls them is launched with ``enable_fp_fusion=False``, or it rounds otherwise than PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def corners(boxes, place, exists):
    """Return x1, y1, x2 and y2 of the ``xyxy`` boxes at ``place``, zeros where none exists."""
    x1 = tl.load(boxes + place * 4, mask=exists, other=0)
    y1 = tl.load(boxes + place * 4 + 1, mask=exists, other=0)
    x2 = tl.load(boxes + place * 4 + 2, mask=exists, other=0)
    y2 = tl.load(boxes + place * 4 + 3, mask=exists, other=0)
    return x1, y1, x2, y2


@triton.jit
def box_iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """Return the IoU of boxes a with boxes b by the operations of torchvision, in their order."""
    a = (ax2 - ax1) * (ay2 - ay1)
    b = (bx2 - bx1) * (by2 - by1)
    width = tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1)
    height = tl.minimum(ay2, by2) - tl.maximum(ay1, by1)
    both = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    return tl.div_rn(both, a + b - both)
