"""Deduce the eps of a state dict's BatchNorms: the names of tensors identify the library.

Each eps is that of the library's own code. Names that models with different eps share are left out, such as
``conv_stem`` and ``blocks.0.0.bn1``: timm's efficientnet_b0 has 1e-5 and its tf_efficientnet_b0 1e-3.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

PYTORCH_EPS, TENSORFLOW_EPS = 1e-5, 1e-3  # the latter for models from TensorFlow and Keras, and for YOLO


class _Family(NamedTuple):
    """Models with one eps. The patterns are of names without the prefix of a wrapper."""

    mark: str  # a tensor that these models have, and no others
    norms: str  # their BatchNorms
    eps: float


_RESNET = (
    r"(?:layer0\.)?bn\d|conv1\.[14]|maxpool\.1"
    r"|layer[1-4]\.\d+\.(?:bn\d|bns\.\d|conv2\.bn[01]|downsample\.[0-2])"
)
_EFFICIENTNET = r"features\.\d\.(?:1|\d+\.block\.\d\.1)"
_MOBILENET_V3 = r"(?:features|backbone)\.\d+\.(?:1|block\.\d\.1)"
_SEGMENTATION = r"(?:aux_)?classifier\.(?:\d|cbr|0\.(?:convs\.\d|project))(?:\.\d)*"

_FAMILIES = (
    # ResNets of torchvision, timm, detectron2 and mmdetection, and what is built on them.
    _Family(r"layer1\.0\.conv1\.weight", _RESNET, PYTORCH_EPS),
    _Family(r"layer1\.0\.conv1(?:\.0)?\.0\.weight", r"stem\.[14]|layer[1-4]\.\d\..+", PYTORCH_EPS),
    _Family(r"(?:stem|res2\.0)\.conv1\.norm\.weight", r"(?:stem|res[2-5])\..+\.norm", PYTORCH_EPS),
    _Family(r"backbone\.bottom_up\..+", r"(?:backbone|proposal_generator|roi_heads)\..+\.norm", PYTORCH_EPS),
    _Family(r"backbone\.layer1\.0\.conv1\.weight", r"(?:neck|\w+_head)\..+\.bn", PYTORCH_EPS),
    # torchvision's detectors and segmenters; a backbone of MobileNetV3 has 1e-5 only in a detector.
    _Family(r"backbone\.body\..+", r"backbone\.(?:body\.\d+|fpn)\..+|roi_heads\..+|head\..+", PYTORCH_EPS),
    _Family(r"backbone\.features\.0\.1\.block\.0\.0\.weight", r"(?:backbone|head)\..+", TENSORFLOW_EPS),
    _Family(r"backbone\.(?:layer1\.0\.conv1|1\.block\.0\.0)\.weight", _SEGMENTATION, PYTORCH_EPS),
    # torchvision's classifiers.
    _Family(r"(?:features|backbone)\.\d+\.block\.\d\.fc1\.weight", _MOBILENET_V3, TENSORFLOW_EPS),
    _Family(r"features\.1\.2\.block\.0\.0\.weight", _EFFICIENTNET, TENSORFLOW_EPS),  # b5 to b7, v2_m, v2_l
    _Family(r"features\.7\.0\.weight", _EFFICIENTNET, TENSORFLOW_EPS),  # v2_s
    _Family(r"features\.1\.0\.block\.2\.0\.weight", _EFFICIENTNET, PYTORCH_EPS),  # b0 to b4
    _Family(r"classifier\.6\.weight", r"features\.\d+", PYTORCH_EPS),
    _Family(r"features\.denseblock1\.denselayer1\.norm1\.weight", r"features\..*norm\d?", PYTORCH_EPS),
    _Family(r"features\.1\.conv\.0\.1\.weight", r"features\.\d+\.(?:1|conv\.\d(?:\.1)?)", PYTORCH_EPS),
    _Family(r"features\.0\.0\.1\.weight", r"features\..+", TENSORFLOW_EPS),
    _Family(r"stage2\.0\.branch1\.1\.weight", r"conv[15]\.1|stage[2-4]\.\d+\.branch[12]\.\d", PYTORCH_EPS),
    _Family(r"layers\.8\.0\.layers\.0\.weight", r"layers\.\d+(?:\.\d+\.layers\.\d)?", PYTORCH_EPS),
    _Family(r"trunk_output\.block1\.block1-0\.f\.a\.0\.weight", r"stem\.1|trunk_output\..+", PYTORCH_EPS),
    _Family(r"(?:Mixed_5b\.branch1x1|inception3a\.branch1)\.conv\.weight", r".+\.bn", TENSORFLOW_EPS),
    _Family(r"blocks\.0\.layers\.0\.layers\.MBconv\..+", r"stem\..+|blocks\..+", TENSORFLOW_EPS),
    # timm's RegNets and Inception-ResNet.
    _Family(r"s1\.b1\.conv1\.bn\.weight", r"(?:stem|s[1-4])\..*bn|final_conv\.bn", PYTORCH_EPS),
    _Family(r"conv2d_1a\.bn\.weight", r".+\.bn", TENSORFLOW_EPS),
    # efficientnet_pytorch and efficientnet_lite_pytorch.
    _Family(r"_blocks\.0\._depthwise_conv\.weight", r"_bn\d|_blocks\.\d+\._bn\d", TENSORFLOW_EPS),
    # Ultralytics, YOLOv5, YOLOv7; YOLOX.
    _Family(r"\d+\.cv1\.bn\.weight", r"\d+\.(?:.+\.)?bn", TENSORFLOW_EPS),
    _Family(r"backbone\.backbone\.stem\.conv\.conv\.weight", r".+\.bn", TENSORFLOW_EPS),
)


def library_eps(names: Collection[str], norms: Collection[str]) -> dict[str, float]:
    """Return the eps of BatchNorms by name; norms of unknown models are absent.

    Args:
        names: names of a state dict's tensors, with any prefix (``model.``, ``module.``, ``backbone.``).
        norms: names of its BatchNorms.
    """
    found: dict[str, float] = {}
    for family in _FAMILIES:
        mark, pattern = re.compile(rf"((?:.+\.)?){family.mark}"), re.compile(family.norms)
        for root in {match[1] for name in names if (match := mark.fullmatch(name))}:
            for norm in norms:
                if norm.startswith(root) and pattern.fullmatch(norm, len(root)):
                    found.setdefault(norm, family.eps)
    return found
