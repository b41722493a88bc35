"""Inputs of the benchmarks, as plain data: the flags of ``gn-detect bench`` list them without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Input of one step.

    Attributes:
        height, width: of each image in pixels, which is also the network's input.
        images: in a batch.
        objects: in each image, ellipses of 40 to 220 pixels.
        proposals: in each image; half of them lie near an object.
    """

    height: int = 512
    width: int = 640
    images: int = 1
    objects: int = 7
    proposals: int = 1000


@dataclass(frozen=True)
class Layer:
    """A normalised tensor.

    Attributes:
        shape: (N, C, H, W) for one image of 800 x 1344, or all its RoIs.
        residual, relu: operations after the norm.
        count: norms of this kind in the model.
    """

    shape: tuple[int, int, int, int]
    residual: bool
    relu: bool
    count: int

    def of_images(self, images: int) -> Layer:
        return Layer((self.shape[0] * images, *self.shape[1:]), self.residual, self.relu, self.count)


# All 69 normalised tensors of Mask R-CNN R-50-FPN with GN everywhere.
LAYERS = {
    "stem": Layer((1, 64, 400, 672), False, True, 1),
    "res2 conv1, conv2": Layer((1, 64, 200, 336), False, True, 6),
    "res2 conv3": Layer((1, 256, 200, 336), True, True, 3),
    "res2 shortcut, p2": Layer((1, 256, 200, 336), False, False, 3),
    "res3.0 conv1": Layer((1, 128, 200, 336), False, True, 1),
    "res3 conv1, conv2": Layer((1, 128, 100, 168), False, True, 7),
    "res3 conv3": Layer((1, 512, 100, 168), True, True, 4),
    "res3 shortcut": Layer((1, 512, 100, 168), False, False, 1),
    "res4.0 conv1": Layer((1, 256, 100, 168), False, True, 1),
    "res4 conv1, conv2": Layer((1, 256, 50, 84), False, True, 11),
    "res4 conv3": Layer((1, 1024, 50, 84), True, True, 6),
    "res4 shortcut": Layer((1, 1024, 50, 84), False, False, 1),
    "res5.0 conv1": Layer((1, 512, 50, 84), False, True, 1),
    "res5 conv1, conv2": Layer((1, 512, 25, 42), False, True, 5),
    "res5 conv3": Layer((1, 2048, 25, 42), True, True, 3),
    "res5 shortcut": Layer((1, 2048, 25, 42), False, False, 1),
    "p3": Layer((1, 256, 100, 168), False, False, 2),
    "p4": Layer((1, 256, 50, 84), False, False, 2),
    "p5": Layer((1, 256, 25, 42), False, False, 2),
    "box head": Layer((512, 256, 7, 7), False, True, 4),
    "mask head": Layer((128, 256, 14, 14), False, True, 4),
}
