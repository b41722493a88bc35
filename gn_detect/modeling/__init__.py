"""Mask R-CNN with any norm, in detectron2's names and numerics."""

from .build import build_model, detection_format, make_model
from .library_backbone import find_library, has_batch_norm, make_library_backbone
from .mask_rcnn import MaskRCNN
from .paired_outputs import paired_outputs

__all__ = [
    "MaskRCNN",
    "build_model",
    "detection_format",
    "find_library",
    "has_batch_norm",
    "make_library_backbone",
    "make_model",
    "paired_outputs",
]
