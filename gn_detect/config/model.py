"""The ``MODEL`` section: detectron2's keys and defaults, with ``GN``, ``CHANNELS_LAST`` and more of ours."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from .types import (
    Amount,
    AsTuple,
    Bins,
    Bool,
    BoolOrAuto,
    Bools,
    BoxWeights,
    Channels,
    Float,
    Floats,
    FloatsPerLevel,
    Fraction,
    Int,
    Ints,
    Layers,
    Names,
    NonNegative,
    PerChannel,
    Positive,
    PositiveInt,
    PositivePerChannel,
    Samples,
    Section,
    Str,
    Thresholds,
    _from_text,
)

Depth = Annotated[Literal[18, 34, 50, 101, 152], BeforeValidator(_from_text)]
Dilation = Annotated[Literal[1, 2], BeforeValidator(_from_text)]
MatchLabels = Annotated[tuple[Literal[-1, 0, 1], ...], AsTuple]  # ignored, background, foreground
Stages = Annotated[Names, Field(min_length=1)]


def _known_stages(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if name not in ("res2", "res3", "res4", "res5"):
            raise ValueError(f"{name!r} is not a stage; choose from res2, res3, res4, res5")
    return names


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
    return name


def _conv_dims(channels: tuple[int, ...]) -> tuple[int, ...]:
    if not channels or len(channels) > 64 or any(c != -1 and not 0 < c <= 2**14 for c in channels):
        raise ValueError("needs 1 to 64 numbers, each of 1 to 16384 channels or -1 (as many as the input)")
    return channels


class Backbone(Section):
    """``MODEL.BACKBONE``."""

    name: Str = "build_resnet_backbone"
    freeze_at: Annotated[Int, Field(ge=0, le=5)] = 2  # 1: stem, 2: stem and res2, ...
    activation_checkpointing: Bool = False  # ours: less memory, as each block is computed twice


class ResNets(Section):
    """``MODEL.RESNETS``."""

    depth: Depth = 50
    out_features: Annotated[Stages, AfterValidator(_known_stages)] = ("res4",)
    num_groups: Channels = 1  # of the 3x3 convolutions: ResNeXt's cardinality
    norm: Str = "FrozenBN"
    width_per_group: Channels = 64
    stride_in_1x1: Bool = True  # True for the MSRA weights, False for GN and torchvision weights
    res5_dilation: Dilation = 1
    res2_out_channels: Channels = 256  # 64 in ResNet-18 and 34
    stem_out_channels: Channels = 64
    deform_on_per_stage: Bools = (False, False, False, False)
    deform_modulated: Bool = False
    deform_num_groups: PositiveInt = 1


class FPN(Section):
    """``MODEL.FPN``."""

    in_features: Annotated[Names, AfterValidator(_known_stages)] = ()
    out_channels: Channels = 256
    norm: Str = ""
    fuse_type: Literal["sum", "avg"] = "sum"


class GN(Section):
    """``MODEL.GN``, ours: every norm that is called ``GN``."""

    num_groups: Channels = 32
    min_channels_per_group: Channels = 1  # narrow layers get fewer groups, as converted models have
    eps: Positive = 1e-5


class ProposalGenerator(Section):
    """``MODEL.PROPOSAL_GENERATOR``."""

    name: Str = "RPN"
    min_size: NonNegative = 0.0  # pixels of the network's input; smaller proposals are dropped


class AnchorGenerator(Section):
    """``MODEL.ANCHOR_GENERATOR``."""

    name: Str = "DefaultAnchorGenerator"
    sizes: FloatsPerLevel = ((32.0, 64.0, 128.0, 256.0, 512.0),)  # square root of the area, in pixels
    aspect_ratios: FloatsPerLevel = ((0.5, 1.0, 2.0),)  # height / width
    angles: Annotated[tuple[Floats, ...], AsTuple] = ((-90.0, 0.0, 90.0),)
    offset: Annotated[Float, Field(ge=0, lt=1)] = 0.0  # of the first centre, in strides


class RPN(Section):
    """``MODEL.RPN``."""

    head_name: Str = "StandardRPNHead"
    in_features: Stages = ("res4",)
    boundary_thresh: Int = -1  # pixels that an anchor may stick out of the image; -1: any
    iou_thresholds: Thresholds = (0.3, 0.7)
    iou_labels: MatchLabels = (0, -1, 1)
    batch_size_per_image: Amount = 256
    positive_fraction: Fraction = 0.5
    bbox_reg_loss_type: Str = "smooth_l1"
    bbox_reg_loss_weight: NonNegative = 1.0
    bbox_reg_weights: BoxWeights = (1.0, 1.0, 1.0, 1.0)
    smooth_l1_beta: NonNegative = 0.0  # 0: plain L1
    loss_weight: NonNegative = 1.0
    pre_nms_topk_train: Amount = 12000  # of each level
    pre_nms_topk_test: Amount = 6000
    post_nms_topk_train: Amount = 2000  # of each image
    post_nms_topk_test: Amount = 1000
    nms_thresh: Fraction = 0.7
    conv_dims: Annotated[Ints, AfterValidator(_conv_dims)] = (-1,)


class ROIHeads(Section):
    """``MODEL.ROI_HEADS``."""

    name: Str = "Res5ROIHeads"
    num_classes: Annotated[Int, Field(gt=0, le=10**5)] = 80  # without the background
    in_features: Stages = ("res4",)
    iou_thresholds: Thresholds = (0.5,)
    iou_labels: MatchLabels = (0, 1)
    batch_size_per_image: Amount = 512
    positive_fraction: Fraction = 0.25
    score_thresh_test: Float = 0.05
    nms_thresh_test: Fraction = 0.5
    proposal_append_gt: Bool = True


class ROIBoxHead(Section):
    """``MODEL.ROI_BOX_HEAD``."""

    name: Str = ""
    bbox_reg_loss_type: Str = "smooth_l1"
    bbox_reg_loss_weight: NonNegative = 1.0
    bbox_reg_weights: BoxWeights = (10.0, 10.0, 5.0, 5.0)
    smooth_l1_beta: NonNegative = 0.0
    pooler_resolution: Bins = 14
    pooler_sampling_ratio: Samples = 0  # 0: as many samples as fit a bin
    pooler_type: Str = "ROIAlignV2"
    num_fc: Layers = 0
    fc_dim: Channels = 1024
    num_conv: Layers = 0
    conv_dim: Channels = 256
    norm: Str = ""
    cls_agnostic_bbox_reg: Bool = False
    train_on_pred_boxes: Bool = False
    use_fed_loss: Bool = False
    use_sigmoid_ce: Bool = False
    fed_loss_freq_weight_power: Float = 0.5
    fed_loss_num_classes: Int = 50


class ROIMaskHead(Section):
    """``MODEL.ROI_MASK_HEAD``."""

    name: Str = "MaskRCNNConvUpsampleHead"
    pooler_resolution: Bins = 14
    pooler_sampling_ratio: Samples = 0
    num_conv: Layers = 0
    conv_dim: Channels = 256
    norm: Str = ""
    cls_agnostic_mask: Bool = False
    pooler_type: Str = "ROIAlignV2"


class ROIBoxCascadeHead(Section):
    """``MODEL.ROI_BOX_CASCADE_HEAD``, of architectures that are not implemented: accepted, never read."""

    bbox_reg_weights: Annotated[tuple[Floats, ...], AsTuple] = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    ious: Floats = (0.5, 0.6, 0.7)


class ROIKeypointHead(Section):
    """``MODEL.ROI_KEYPOINT_HEAD``, of architectures that are not implemented: accepted, never read."""

    name: Str = "KRCNNConvDeconvUpsampleHead"
    pooler_resolution: Int = 14
    pooler_sampling_ratio: Int = 0
    conv_dims: Ints = (512,) * 8
    num_keypoints: Int = 17
    min_keypoints_per_image: Int = 1
    normalize_loss_by_visible_keypoints: Bool = True
    loss_weight: Float = 1.0
    pooler_type: Str = "ROIAlignV2"


class SemSegHead(Section):
    """``MODEL.SEM_SEG_HEAD``, of architectures that are not implemented: accepted, never read."""

    name: Str = "SemSegFPNHead"
    in_features: Names = ("p2", "p3", "p4", "p5")
    ignore_value: Int = 255
    num_classes: Int = 54
    convs_dim: Int = 128
    common_stride: Int = 4
    norm: Str = "GN"
    loss_weight: Float = 1.0


class PanopticCombine(Section):
    """``MODEL.PANOPTIC_FPN.COMBINE``, of architectures that are not implemented: accepted, never read."""

    enabled: Bool = True
    overlap_thresh: Float = 0.5
    stuff_area_limit: Int = 4096
    instances_confidence_thresh: Float = 0.5


class PanopticFPN(Section):
    """``MODEL.PANOPTIC_FPN``, of architectures that are not implemented: accepted, never read."""

    instance_loss_weight: Float = 1.0
    combine: PanopticCombine = PanopticCombine()


class RetinaNet(Section):
    """``MODEL.RETINANET``, of architectures that are not implemented: accepted, never read."""

    num_classes: Int = 80
    in_features: Names = ("p3", "p4", "p5", "p6", "p7")
    num_convs: Int = 4
    iou_thresholds: Floats = (0.4, 0.5)
    iou_labels: Ints = (0, -1, 1)
    prior_prob: Float = 0.01
    score_thresh_test: Float = 0.05
    topk_candidates_test: Int = 1000
    nms_thresh_test: Float = 0.5
    bbox_reg_weights: Floats = (1.0, 1.0, 1.0, 1.0)
    focal_loss_gamma: Float = 2.0
    focal_loss_alpha: Float = 0.25
    smooth_l1_loss_beta: Float = 0.1
    bbox_reg_loss_type: Str = "smooth_l1"
    norm: Str = ""


class Model(Section):
    """``MODEL``."""

    load_proposals: Bool = False
    mask_on: Bool = False
    keypoint_on: Bool = False
    device: Annotated[Str, AfterValidator(_device)] = "auto"  # auto: cuda where there is one, else cpu
    meta_architecture: Str = "GeneralizedRCNN"
    weights: Str = ""  # file, URL or name in the model zoo; empty: from scratch
    pixel_mean: PerChannel = (103.53, 116.28, 123.675)  # in the order of INPUT.FORMAT, 0..255
    pixel_std: PositivePerChannel = (1.0, 1.0, 1.0)
    channels_last: BoolOrAuto = "auto"  # memory format of the backbone and heads
    compile: Bool = False  # torch.compile of backbone and FPN in training
    gn: GN = GN()
    backbone: Backbone = Backbone()
    resnets: ResNets = ResNets()
    fpn: FPN = FPN()
    proposal_generator: ProposalGenerator = ProposalGenerator()
    anchor_generator: AnchorGenerator = AnchorGenerator()
    rpn: RPN = RPN()
    roi_heads: ROIHeads = ROIHeads()
    roi_box_head: ROIBoxHead = ROIBoxHead()
    roi_mask_head: ROIMaskHead = ROIMaskHead()
    roi_box_cascade_head: ROIBoxCascadeHead = ROIBoxCascadeHead()
    roi_keypoint_head: ROIKeypointHead = ROIKeypointHead()
    sem_seg_head: SemSegHead = SemSegHead()
    panoptic_fpn: PanopticFPN = PanopticFPN()
    retinanet: RetinaNet = RetinaNet()
