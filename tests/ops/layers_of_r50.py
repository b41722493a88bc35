"""Every normalised tensor of Mask R-CNN R-50-FPN at 800 x 1344: (N, C, H, W), residual, ReLU."""

from __future__ import annotations

LAYERS = {
    "stem": ((1, 64, 400, 672), False, True),
    "res2 conv1, conv2": ((1, 64, 200, 336), False, True),
    "res2 conv3": ((1, 256, 200, 336), True, True),
    "res2 shortcut, p2": ((1, 256, 200, 336), False, False),
    "res3.0 conv1": ((1, 128, 200, 336), False, True),
    "res3 conv1, conv2": ((1, 128, 100, 168), False, True),
    "res3 conv3": ((1, 512, 100, 168), True, True),
    "res3 shortcut": ((1, 512, 100, 168), False, False),
    "res4.0 conv1": ((1, 256, 100, 168), False, True),
    "res4 conv1, conv2": ((1, 256, 50, 84), False, True),
    "res4 conv3": ((1, 1024, 50, 84), True, True),
    "res4 shortcut": ((1, 1024, 50, 84), False, False),
    "res5.0 conv1": ((1, 512, 50, 84), False, True),
    "res5 conv1, conv2": ((1, 512, 25, 42), False, True),
    "res5 conv3": ((1, 2048, 25, 42), True, True),
    "res5 shortcut": ((1, 2048, 25, 42), False, False),
    "p3": ((1, 256, 100, 168), False, False),
    "p4": ((1, 256, 50, 84), False, False),
    "p5": ((1, 256, 25, 42), False, False),
    "box head": ((512, 256, 7, 7), False, True),
    "mask head": ((128, 256, 14, 14), False, True),
    "mask head, inference": ((100, 256, 14, 14), False, True),
}
