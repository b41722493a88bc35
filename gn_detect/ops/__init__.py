"""Functions on tensors, without modules and configuration."""

from .batch_norm import frozen_batch_norm
from .boxes import box_area, clip_boxes, decode_boxes, encode_boxes, nms_by_group, scale_boxes
from .group_norm import group_norm
from .mask_targets import PaddedMasks, crop_bitmaps, mask_targets, pad_masks, rasterize_masks
from .masks import paste_masks, paste_one_by_one, rasterize_polygons
from .matching import match_boxes_padded
from .nms import keep_best
from .normalize import normalize_images
from .roi_align import roi_align, rows_by_value
from .weight_standardization import STANDARDIZATIONS, standardize_weight

__all__ = [
    "STANDARDIZATIONS",
    "PaddedMasks",
    "box_area",
    "clip_boxes",
    "crop_bitmaps",
    "decode_boxes",
    "encode_boxes",
    "frozen_batch_norm",
    "group_norm",
    "keep_best",
    "mask_targets",
    "match_boxes_padded",
    "nms_by_group",
    "normalize_images",
    "pad_masks",
    "paste_masks",
    "paste_one_by_one",
    "rasterize_masks",
    "rasterize_polygons",
    "roi_align",
    "rows_by_value",
    "scale_boxes",
    "standardize_weight",
]
