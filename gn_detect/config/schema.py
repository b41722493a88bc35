"""The whole schema: detectron2's keys with its defaults, and keys of ours.

A key has one declaration: its type, bounds, default, description and implemented values.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo

from .types import NEVER_READ, Section, as_names, as_tuple, from_text, key, only, unread

NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "GN1", "IN", "LN")
CONVS = ("", "WS", "StdConv")
RESNET_BACKBONES = ("build_resnet_backbone", "build_resnet_fpn_backbone")
LIBRARY_BACKBONES = {
    "build_torchvision_backbone": "torchvision",
    "build_torchvision_fpn_backbone": "torchvision",
    "build_timm_backbone": "timm",
    "build_timm_fpn_backbone": "timm",
}  # name -> library of the network
BACKBONES = (*RESNET_BACKBONES, *LIBRARY_BACKBONES)
ROI_HEADS = ("StandardROIHeads", "Res5ROIHeads", "CascadeROIHeads")
POOLERS = ("ROIAlignV2", "ROIAlign")
MATCH_LABELS = "0 background, -1 ignored, 1 object, for each range of IOU_THRESHOLDS."

LEAST_TILE = 64  # pixels; two cells of the coarsest level of an FPN

# Bytes of a dataset's name: file systems allow 255, and endings follow.
_LONGEST_NAME = 150


def _increasing(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(b <= a for a, b in itertools.pairwise(values)):
        raise ValueError("must increase from left to right")
    return values


def _fits_64_bits(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError("must fit into 64 bits")
    return value


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


def _metric(name: str) -> str:
    if name != "auto" and not re.fullmatch(r"(bbox|segm|boundary)/\S.*", name):
        raise ValueError("must be 'auto' or such as 'bbox/AP', 'segm/AP50'")
    return name


def _tile(side: int) -> int:
    if side and not LEAST_TILE <= side <= 2**15:
        raise ValueError(f"must be 0, or {LEAST_TILE} to {2**15} pixels")
    return side


def _below_one(pair: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= value < 1 for value in pair):
        raise ValueError("must be two numbers from 0 to below 1")
    return pair


def _folder_names(names: Iterable[str]) -> Any:
    for name in names:  # they name folders and files of a run
        if not name.isprintable() or re.search(r"[/\\]", name) or name.strip(" .") != name or not name:
            raise ValueError(
                f"the name {name[:40]!r} is also that of a folder: leave out slashes and control characters, "
                "and dots and spaces at its ends"
            )
        if len(name.encode("utf-8", "replace")) > _LONGEST_NAME:
            raise ValueError(f"the name {name[:40]!r}... is longer than {_LONGEST_NAME} bytes; shorten it")
    return names


FromText = BeforeValidator(from_text)
Bool = Annotated[bool, Strict(), FromText]
Int = Annotated[int, Strict(), AfterValidator(_fits_64_bits), FromText]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False), FromText]
Str = Annotated[str, Strict()]
Count = Annotated[Int, Field(ge=0)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
PossiblyInfinite = Annotated[float, Strict(), Field(gt=0), FromText]
BoolOrAuto = Annotated[Literal["auto", True, False], FromText]
Depth = Annotated[Literal[18, 34, 50, 101, 152], FromText]
Dilation = Annotated[Literal[1, 2], FromText]
Device = Annotated[Str, AfterValidator(_device)]
Metric = Annotated[Str, AfterValidator(_metric)]
TileSide = Annotated[Int, AfterValidator(_tile)]

# Sizes of tensors are bounded: a file of a few lines must not make something huge.
Channels = Annotated[Int, Field(gt=0, le=2**14)]
Small = Annotated[Int, Field(ge=0, le=64)]  # layers; samples in each direction
Cells = Annotated[Int, Field(gt=0, le=64)]  # in each direction of a pooled RoI
Amount = Annotated[Int, Field(gt=0, le=10**6)]  # boxes, images or parts that are computed at once
Parts = Annotated[Int, Field(ge=0, le=10**6), BeforeValidator(lambda parts: 0 if parts == "auto" else parts)]
Side = Annotated[Int, Field(gt=0, le=2**15)]  # of an image, pixels

AsTuple = BeforeValidator(as_tuple)
BoolOfEachStage = Annotated[tuple[Bool, Bool, Bool, Bool], AsTuple]
Ints = Annotated[tuple[Int, ...], AsTuple]
Floats = Annotated[tuple[Float, ...], AsTuple]
FloatLists = Annotated[tuple[Floats, ...], AsTuple]
Lengths = Annotated[tuple[Side, ...], Field(min_length=1, max_length=1000), AsTuple]
Milestones = Annotated[tuple[PositiveInt, ...], AsTuple, AfterValidator(_increasing)]
Increasing = Annotated[tuple[Positive, ...], AsTuple, AfterValidator(_increasing)]
MatchLabels = Annotated[tuple[Literal[-1, 0, 1], ...], AsTuple]
ClassWeights = Annotated[Literal["auto"] | tuple[NonNegative, ...], AsTuple]
ConvDims = Annotated[Ints, AfterValidator(_conv_dims)]
Pair = Annotated[tuple[Float, Float], AsTuple]
PerChannel = Annotated[tuple[Float, Float, Float], AsTuple]
PositivePerChannel = Annotated[tuple[Positive, Positive, Positive], AsTuple]
BoxWeights = Annotated[tuple[Positive, Positive, Positive, Positive], AsTuple]
BoxWeightsOfStages = Annotated[tuple[BoxWeights, ...], Field(min_length=1, max_length=16), AsTuple]
FractionsOfStages = Annotated[tuple[Fraction, ...], Field(min_length=1, max_length=16), AsTuple]
FloatsOfLevel = Annotated[tuple[Positive, ...], Field(min_length=1, max_length=64)]
FloatsPerLevel = Annotated[tuple[FloatsOfLevel, ...], Field(min_length=1, max_length=64), AsTuple]
Names = Annotated[tuple[Str, ...], BeforeValidator(as_names)]
Loggers = Annotated[tuple[Literal["wandb", "mlflow", "trackio"], ...], BeforeValidator(as_names)]
Stages = Annotated[Names, AfterValidator(_known_stages)]
DatasetNames = Annotated[Names, AfterValidator(_folder_names)]


class Backbone(Section):
    name: Str = key(
        "build_resnet_backbone",
        "build_resnet_fpn_backbone adds a feature pyramid; build_resnet_backbone (C4, DC5) has none; with "
        "torchvision or timm in place of resnet, the network that MODEL.BACKBONE.MODEL names.",
        BACKBONES,
    )
    model: Str = key(
        "",
        "Network of torchvision (mobilenet_v2) or timm (mobilenetv2_100), as NAME says; weights are a file.",
    )
    norm: Literal["keep", "FrozenBN", "SyncBN", "GN"] = key(
        "keep",
        "The BatchNorms of MODEL.BACKBONE.MODEL: as the library builds them, or these in their place; GN "
        "converts the BatchNorms of MODEL.WEIGHTS while they are loaded. Other norms stay.",
    )
    drop_path_rate: Float = key(
        0.0, "Largest part of the samples for which a block of MODEL.BACKBONE.MODEL is left out.", ge=0, lt=1
    )
    freeze_at: Int = key(
        2,
        "Parts that are not trained: 0 none, 1 the stem, 2 the stem and res2, ...; of MODEL.BACKBONE.MODEL "
        "all up to the feature of stride 2, 4, ...; set it to 0 to train from random weights (gn-detect "
        "train without --config-file does).",
        ge=0,
        le=5,
    )
    activation_checkpointing: Bool = key(False, "Compute blocks twice in training, to save memory.")


class ResNets(Section):
    depth: Depth = key(50, "Layers of the ResNet.")
    out_features: Stages = key(
        ("res4",),
        "Stages that the backbone returns; the last ends it. Of MODEL.BACKBONE.MODEL res2 to res5 are the "
        "last features of stride 4 to 32.",
        min_length=1,
    )
    num_groups: Channels = key(1, "Groups of the 3x3 convolutions (ResNeXt's cardinality); unrelated to GN.")
    norm: Str = key("FrozenBN", "Norm of the backbone.", NORMS)
    conv: Str = key(
        "",
        "Convolutions of the backbone: WS standardises their weights as mmdetection's ConvWS does, StdConv "
        "as timm's and BiT's StdConv2d do. Weights of one kind compute something else with another.",
        CONVS,
    )
    width_per_group: Channels = key(64, "Channels of the 3x3 convolutions of res2, for each group.")
    stride_in_1x1: Bool = key(
        True,
        "Stride of a bottleneck: on its first 1x1 convolution (True: MSRA weights) or on its 3x3 convolution "
        "(False: weights with GN, and torchvision's).",
    )
    res5_dilation: Dilation = key(1, "2 keeps res5 at stride 16 (DC5).")
    res2_out_channels: Channels = key(256, "Channels of res2, doubled by each stage; 64 in ResNet-18 and 34.")
    stem_out_channels: Channels = key(64, "Channels of the stem.")
    deform_on_per_stage: BoolOfEachStage = key(
        (False, False, False, False),
        "Stages res2 to res5 whose 3x3 convolutions are deformable, for DEPTH 50 or more.",
    )
    deform_modulated: Bool = key(False, "Deformable convolutions multiply each sample by a learned factor.")
    deform_num_groups: Channels = key(1, "Parts of the channels that have offsets of their own.")


class FPN(Section):
    in_features: Stages = key((), "Stages that feed the pyramid.")
    out_channels: Channels = key(256, "Channels of each level of the pyramid.")
    norm: Str = key("", "Norm of the pyramid.", NORMS)
    conv: Str = key("", "Convolutions of the pyramid; see MODEL.RESNETS.CONV.", CONVS)
    fuse_type: Literal["sum", "avg"] = key("sum", "Operation that joins a level and the one above it.")


class GN(Section):
    num_groups: Channels = key(
        32,
        "Groups of every norm named GN: exactly this number, which must divide the channels; with "
        "MIN_CHANNELS_PER_GROUP above 1, at most this number.",
    )
    min_channels_per_group: Channels = key(
        1,
        "Above 1: least channels in a group, so that narrow layers get fewer groups; 16 in models that "
        "gn-detect convert makes by default.",
    )
    eps: Positive = key(1e-5, "Added to the variance of every GN; the eps in a checkpoint takes its place.")


class ProposalGenerator(Section):
    name: Str = only("RPN")
    min_size: NonNegative = key(0.0, "Drop proposals with a side of this length or less, in network pixels.")


class AnchorGenerator(Section):
    name: Str = only("DefaultAnchorGenerator")
    sizes: FloatsPerLevel = key(
        ((32.0, 64.0, 128.0, 256.0, 512.0),),
        "Square roots of anchor areas, pixels of the network's input: a list for each level, or one for all.",
    )
    aspect_ratios: FloatsPerLevel = key(
        ((0.5, 1.0, 2.0),), "Height / width of anchors: a list for each level, or one for all."
    )
    angles: FloatLists = unread(((-90.0, 0.0, 90.0),))
    offset: Float = key(0.0, "Centre of the first anchor, in strides.", ge=0, lt=1)


class RPN(Section):
    head_name: Str = only("StandardRPNHead")
    in_features: Names = key(("res4",), "Features on which the RPN searches for objects.", min_length=1)
    boundary_thresh: Int = key(-1, "Pixels that an anchor may extend beyond the image in training; -1: any.")
    iou_thresholds: Increasing = key((0.3, 0.7), "IoU that divide anchors into the IOU_LABELS.")
    iou_labels: MatchLabels = key((0, -1, 1), MATCH_LABELS)
    batch_size_per_image: Amount = key(256, "Anchors of each image that count in the loss.")
    positive_fraction: Fraction = key(0.5, "Largest part of these anchors that are objects.")
    bbox_reg_loss_type: Str = only("smooth_l1")
    bbox_reg_loss_weight: NonNegative = key(1.0, "Weight of the box loss; that of the classification is 1.")
    bbox_reg_weights: BoxWeights = key((1.0, 1.0, 1.0, 1.0), "Factors of the box deltas dx, dy, dw, dh.")
    smooth_l1_beta: NonNegative = key(0.0, "Difference at which smooth L1 becomes L1; 0: L1.")
    loss_weight: NonNegative = key(1.0, "Weight of both RPN losses.")
    pre_nms_topk_train: Amount = key(12000, "Proposals of each level before NMS, in training.")
    pre_nms_topk_test: Amount = key(6000, "The same in evaluation and prediction.")
    post_nms_topk_train: Amount = key(2000, "Proposals of each image after NMS, in training.")
    post_nms_topk_test: Amount = key(1000, "The same in evaluation and prediction.")
    nms_thresh: Fraction = key(0.7, "IoU above which the weaker of two proposals is dropped.")
    conv_dims: ConvDims = key((-1,), "Channels of the RPN's 3x3 convolutions; -1: as many as the input has.")


class ROIHeads(Section):
    name: Str = key(
        "Res5ROIHeads",
        "StandardROIHeads (FPN, DC5), Res5ROIHeads (C4), or CascadeROIHeads (FPN, DC5): Cascade R-CNN.",
        ROI_HEADS,
    )
    num_classes: Int = key(80, "Categories, without the background.", gt=0, le=10**5)
    in_features: Names = key(("res4",), "Features from which RoIs are pooled.", min_length=1)
    iou_thresholds: Increasing = key((0.5,), "IoU that divide proposals into the IOU_LABELS.")
    iou_labels: MatchLabels = key((0, 1), MATCH_LABELS)
    batch_size_per_image: Amount = key(512, "RoIs of each image that count in the loss.")
    positive_fraction: Fraction = key(0.25, "Largest part of these RoIs that are objects.")
    score_thresh_test: Float = key(0.05, "Detections score more than this.")
    nms_thresh_test: Fraction = key(0.5, "IoU above which the weaker of two detections is dropped, by class.")
    proposal_append_gt: Bool = key(True, "Add the ground truth to the proposals in training.")


class ROIBoxHead(Section):
    name: Str = key(
        "", "FastRCNNConvFCHead with StandardROIHeads and CascadeROIHeads.", ("FastRCNNConvFCHead",)
    )
    bbox_reg_loss_type: Str = only("smooth_l1")
    bbox_reg_loss_weight: NonNegative = key(1.0, "Weight of the box loss.")
    bbox_reg_weights: BoxWeights = key(
        (10.0, 10.0, 5.0, 5.0),
        "Factors of the box deltas dx, dy, dw, dh; a cascade has MODEL.ROI_BOX_CASCADE_HEAD's.",
    )
    smooth_l1_beta: NonNegative = key(0.0, "Difference at which smooth L1 becomes L1; 0: L1.")
    pooler_resolution: Cells = key(14, "Cells on each side of a pooled RoI.")
    pooler_sampling_ratio: Small = key(0, "Samples on each side of a cell; 0: as many as fit.")
    pooler_type: Str = key(
        "ROIAlignV2", "ROIAlignV2 shifts by half a pixel; ROIAlign is Detectron's.", POOLERS
    )
    num_fc: Small = key(0, "Fully connected layers of the box head; the paper uses 1, after 4 convolutions.")
    fc_dim: Channels = key(1024, "Outputs of each fully connected layer.")
    num_conv: Small = key(0, "Convolutions before the fully connected layers; 4 in the paper.")
    conv_dim: Channels = key(256, "Channels of these convolutions.")
    norm: Str = key("", "Norm of the box head's convolutions.", NORMS)
    conv: Str = key("", "The box head's convolutions; see MODEL.RESNETS.CONV.", CONVS)
    cls_agnostic_bbox_reg: Bool = key(
        False, "One box for each RoI instead of one for each class; CascadeROIHeads need it."
    )
    class_weights: ClassWeights = key(
        (),
        "Factors of the classification loss by class, 1 for background; auto: 1 / sqrt(number of objects), "
        "scaled to a mean of 1 over the objects; empty: none.",
    )
    train_on_pred_boxes: Bool = only(False)
    use_fed_loss: Bool = only(False)
    use_sigmoid_ce: Bool = only(False)
    fed_loss_freq_weight_power: Float = unread(0.5)
    fed_loss_num_classes: Int = unread(50)


class ROIMaskHead(Section):
    name: Str = only("MaskRCNNConvUpsampleHead")
    pooler_resolution: Cells = key(14, "Cells on each side of a pooled RoI; masks have twice as many.")
    pooler_sampling_ratio: Small = key(0, "Samples on each side of a cell; 0: as many as fit.")
    num_conv: Small = key(0, "Convolutions of the mask head before the upsampling.")
    conv_dim: Channels = key(256, "Channels of these convolutions and of the upsampling.")
    norm: Str = key("", "Norm of the mask head's convolutions.", NORMS)
    conv: Str = key("", "The mask head's convolutions before the upsampling; see MODEL.RESNETS.CONV.", CONVS)
    cls_agnostic_mask: Bool = key(False, "One mask for each RoI instead of one for each class.")
    pooler_type: Str = key("ROIAlignV2", "See MODEL.ROI_BOX_HEAD.POOLER_TYPE.", POOLERS)


class ROIBoxCascadeHead(Section):
    bbox_reg_weights: BoxWeightsOfStages = key(
        ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
        "Factors of the box deltas dx, dy, dw, dh in each stage of CascadeROIHeads.",
    )
    ious: FractionsOfStages = key(
        (0.5, 0.6, 0.7),
        "Least IoU of a proposal with an object that each stage of CascadeROIHeads learns from; the first is "
        "that of MODEL.ROI_HEADS.IOU_THRESHOLDS.",
    )


# The next sections belong to architectures that are not implemented.
class ROIKeypointHead(Section):
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
    name: Str = "SemSegFPNHead"
    in_features: Names = ("p2", "p3", "p4", "p5")
    ignore_value: Int = 255
    num_classes: Int = 54
    convs_dim: Int = 128
    common_stride: Int = 4
    norm: Str = "GN"
    loss_weight: Float = 1.0


class PanopticCombine(Section):
    enabled: Bool = True
    overlap_thresh: Float = 0.5
    stuff_area_limit: Int = 4096
    instances_confidence_thresh: Float = 0.5


class PanopticFPN(Section):
    instance_loss_weight: Float = 1.0
    combine: PanopticCombine = PanopticCombine()


class RetinaNet(Section):
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
    load_proposals: Bool = only(False)
    mask_on: Bool = key(False, "Mask R-CNN; False: Faster R-CNN, boxes alone.")
    keypoint_on: Bool = only(False)
    device: Device = key("auto", "auto (cuda if there is a GPU, else cpu), cpu, cuda or cuda:N.")
    meta_architecture: Str = only("GeneralizedRCNN")
    weights: Str = key(
        "",
        "Checkpoint to start from or to evaluate: a file, zoo://NAME, hf://USER/REPO, detectron2://..., "
        "https://...; empty: random weights.",
    )
    pixel_mean: PerChannel = key(
        (103.53, 116.28, 123.675), "Mean to subtract from pixels of 0 to 255, in the order of INPUT.FORMAT."
    )
    pixel_std: PositivePerChannel = key(
        (1.0, 1.0, 1.0), "Deviation to divide pixels by, in the order of INPUT.FORMAT."
    )
    channels_last: BoolOrAuto = key(
        "auto", "Memory format of backbone and heads; auto: channels-last for training on a CPU."
    )
    compile: Bool = key(False, "torch.compile of backbone and FPN in training.")
    conv_style: Literal["detectron2", "tensorpack"] = key(
        "detectron2",
        "Convolutions with a norm in FPN, box head and mask head. detectron2: no bias, and ReLU after the "
        "norm; tensorpack: a bias, and ReLU before the norm.",
    )
    freeze: Names = key(
        (), "Parameters that are not trained: names of modules or parameters, or patterns with *."
    )
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
    roi_keypoint_head: ROIKeypointHead = unread(ROIKeypointHead())
    sem_seg_head: SemSegHead = unread(SemSegHead())
    panoptic_fpn: PanopticFPN = unread(PanopticFPN())
    retinanet: RetinaNet = unread(RetinaNet())


class Crop(Section):
    enabled: Bool = key(False, "Train on random crops; each keeps at least one object.")
    type: Literal["relative_range", "relative", "absolute", "absolute_range"] = key(
        "relative_range", "Meaning of SIZE: fractions of the image or pixels, exact or the least of a range."
    )
    size: Pair = key((0.9, 0.9), "(height, width) of the crop.")


class ColorJitter(Section):
    enabled: Bool = key(False, "Change brightness, contrast, saturation and hue (torchvision's ColorJitter).")
    brightness: NonNegative = key(0.4, "Strength of the change of brightness; 0.4: a factor of 0.6 to 1.4.")
    contrast: NonNegative = key(0.4, "Strength of the change of contrast; 0.4: a factor of 0.6 to 1.4.")
    saturation: NonNegative = key(0.4, "Strength of the change of saturation; 0.4: a factor of 0.6 to 1.4.")
    hue: Float = key(0.1, "Strength of the change of hue, up to 0.5 (half the circle).", ge=0, le=0.5)


class LargeScaleJitter(Section):
    enabled: Bool = key(
        False,
        "Resize by a random factor and cut or pad to SIZE (arXiv 2012.07177), instead of MIN_SIZE_TRAIN.",
    )
    min_scale: Float = key(0.1, "Least factor of the resize.", gt=0, le=100)
    max_scale: Float = key(2.0, "Largest factor of the resize.", gt=0, le=100)
    size: Lengths = key((1024, 1024), "(height, width) of the canvas, pixels.")


class Affine(Section):
    enabled: Bool = key(False, "Rotate, scale and move training images at random; their size stays.")
    degrees: Float = key(10.0, "Largest rotation to each side.", ge=0, le=180)
    translate: Fraction = key(0.1, "Largest move to each side, as a part of width and height.")
    min_scale: Float = key(0.8, "Least factor of the size.", ge=0.1, le=10)
    max_scale: Float = key(1.25, "Largest factor of the size.", ge=0.1, le=10)


class Input(Section):
    min_size_train: Lengths = key((800,), "Lengths of the shorter side in training, pixels; drawn at random.")
    min_size_train_sampling: Literal["choice", "range"] = key(
        "choice", "choice: one of MIN_SIZE_TRAIN; range: any length between its two."
    )
    max_size_train: Amount = key(1333, "Limit of the longer side in training, pixels.")
    min_size_test: Int = key(
        800, "Shorter side in evaluation and prediction, pixels; 0: no resize.", ge=0, le=2**15
    )
    max_size_test: Amount = key(1333, "Limit of the longer side in evaluation and prediction, pixels.")
    random_flip: Literal["horizontal", "vertical", "none"] = key(
        "horizontal", "Mirror half of the training images."
    )
    crop: Crop = Crop()
    format: Str = key("BGR", "Order of the channels that the weights expect.", ("BGR", "RGB"))
    mask_format: Literal["polygon", "bitmask"] = key(
        "polygon", "polygon keeps polygons and rasterises them in each RoI; bitmask draws them in the image."
    )
    color_jitter: ColorJitter = ColorJitter()
    large_scale_jitter: LargeScaleJitter = LargeScaleJitter()
    rotate_90: Bool = key(False, "Turn training images by 0, 90, 180 or 270 degrees, at random.")
    affine: Affine = Affine()
    copy_paste: Fraction = key(
        0.0,
        "Part of the training images onto which random objects of another one are pasted, by their masks "
        "(arXiv 2012.07177).",
    )
    albumentations: Str = key(
        "",
        "Pipeline file of albumentations 2, as its save() writes it (JSON or YAML): applied to each training "
        "image after all else but COPY_PASTE; empty: none.",
    )


class RegisteredDataset(Section):
    """An entry of ``DATASETS.REGISTER``: a COCO JSON and the folder of its images; keys in any case."""

    model_config = ConfigDict(populate_by_name=True)

    annotations: Str
    images: Str


class Datasets(Section):
    train: DatasetNames = key((), "Names of the datasets to train on, joined.")
    proposal_files_train: Names = unread(())
    precomputed_proposal_topk_train: Int = unread(2000)
    test: DatasetNames = key((), "Names of the datasets to evaluate on, each by itself.")
    proposal_files_test: Names = unread(())
    precomputed_proposal_topk_test: Int = unread(1000)
    allow_outside: Bool = key(
        False,
        "Read images whose path in the annotation file is absolute or contains `..`: its author then chooses "
        "which files of this machine are opened.",
    )
    # Every class has a method "register" already.
    registered: Annotated[dict[str, RegisteredDataset], FromText, AfterValidator(_folder_names)] = key(
        {}, "Names of your own: {name: {annotations: COCO JSON, images: folder}}.", alias="REGISTER"
    )
    root: Str = key(
        "", "Folder of the built-in datasets; empty: $GN_DETECT_DATASETS, $DETECTRON2_DATASETS or ./datasets."
    )


class Tiles(Section):
    size: TileSide = key(
        0,
        "Side of square tiles, pixels of the file, 64 or more: each is searched as an image of its own, and "
        "parts of an object are joined by their masks. 0: whole images.",
    )
    overlap: Float = key(
        0.2,
        "Least part of a tile's side that the next one shares, up to 0.9. Objects up to that size are whole "
        "in some tile.",
        ge=0,
        le=0.9,
    )


class TrainTiles(Tiles):
    size: TileSide = key(
        0, "Side of square tiles to train on, pixels of the file, 64 or more. 0: whole images."
    )
    min_visible: Float = key(
        0.3,
        "Least part of an object's mask, or without masks of its box, that a tile must show; smaller parts "
        "are background.",
        gt=0,
        le=1,
    )


class DataLoader(Section):
    num_workers: Int = key(4, "Processes of the loader; 0: none.", ge=0, le=1024)
    aspect_ratio_grouping: Bool = key(True, "Put wide and tall images into different batches.")
    sampler_train: Str = key(
        "TrainingSampler",
        "RepeatFactorTrainingSampler repeats images of rare categories.",
        ("TrainingSampler", "RepeatFactorTrainingSampler"),
    )
    repeat_threshold: Fraction = key(0.0, "Share of the images below which a category is rare.")
    repeat_sqrt: Bool = key(True, "Repeat by the square root of the shortage (LVIS).")
    filter_empty_annotations: Bool = key(
        True, "Leave out training images, or with TILES tiles, without objects."
    )
    tiles: TrainTiles = TrainTiles()


class ClipGradients(Section):
    enabled: Bool = key(False, "Limit gradients.")
    clip_type: Literal["value", "norm", "full_model"] = key(
        "value", "Limit each value, each parameter's norm, or the norm of all together."
    )
    clip_value: Positive = key(1.0, "The limit of value or norm.")
    norm_type: PossiblyInfinite = key(2.0, "p of the norm; 2: Euclidean.")


class AMP(Section):
    enabled: Bool = key(False, "Mixed precision.")
    dtype: Literal["float16", "bfloat16"] = key(
        "float16", "float16 with a loss scaler, or bfloat16; on a CPU always bfloat16."
    )


class EMA(Section):
    enabled: Bool = key(False, "Keep a moving average of the weights, and evaluate and save it.")
    decay: Float = key(
        0.9998,
        "Part of the average that stays at each iteration; less at the start: (1 + n) / (10 + n) after n.",
        gt=0,
        lt=1,
    )


class EarlyStop(Section):
    patience: Count = key(
        0, "Evaluations without a better BEST_CHECKPOINT_METRIC after which training ends; 0: it never does."
    )


class Solver(Section):
    lr_scheduler_name: Str = key(
        "WarmupMultiStepLR",
        "Learning rate: falls at STEPS, or by half a cosine down to BASE_LR_END.",
        ("WarmupMultiStepLR", "WarmupCosineLR"),
    )
    max_iter: PositiveInt = key(40000, "Iterations, each of IMS_PER_BATCH images.")
    base_lr: Positive = key(0.001, "Learning rate for IMS_PER_BATCH images; detectron2 has 0.02 for 16.")
    base_lr_end: NonNegative = key(0.0, "Last learning rate of the cosine.")
    momentum: Float = key(0.9, "Momentum of SGD.", ge=0, lt=1)
    nesterov: Bool = key(False, "Nesterov's momentum in SGD.")
    weight_decay: NonNegative = key(0.0001, "Weight decay of all parameters except those of norms.")
    weight_decay_norm: NonNegative = key(0.0, "Weight decay of norms' parameters; GN needs 0 (the paper).")
    gamma: Positive = key(0.1, "Factor of the learning rate at each of STEPS.")
    steps: Milestones = key((30000,), "Iterations after which the learning rate falls.")
    num_decays: Int = unread(3)
    warmup_factor: NonNegative = key(1.0 / 1000, "First learning rate as a part of BASE_LR.")
    warmup_iters: Count = key(1000, "Iterations until BASE_LR is reached.")
    warmup_method: Literal["linear", "constant"] = key(
        "linear", "Warm-up: linear rises; constant stays at WARMUP_FACTOR."
    )
    rescale_interval: Bool = only(False)
    checkpoint_period: Count = key(5000, "Iterations between checkpoints; 0: the final one alone.")
    ims_per_batch: Amount = key(16, "Images of an iteration, over all processes.")
    reference_world_size: Int = key(
        0,
        "Processes that batch and schedule are meant for; other numbers scale both. 0: no scaling.",
        ge=0,
        le=10**6,
    )
    lr_multipliers: Annotated[dict[Str, NonNegative], FromText] = key(
        {},
        "Factors of the learning rate, such as {'backbone': 0.1}: by names of modules or parameters, or "
        "patterns with *; of several that fit the last counts.",
    )
    bias_lr_factor: NonNegative = key(1.0, "Factor of the learning rate of biases.")
    weight_decay_bias: Annotated[NonNegative | None, FromText] = key(
        None, "Weight decay of biases; none: that of their layer's weights."
    )
    clip_gradients: ClipGradients = ClipGradients()
    amp: AMP = AMP()
    optimizer: Literal["SGD", "AdamW"] = key("SGD", "SGD or AdamW.")
    betas: Annotated[Pair, AfterValidator(_below_one)] = key((0.9, 0.999), "The two betas of AdamW.")
    best_checkpoint_metric: Metric = key(
        "auto",
        "Metric that selects model_best.pth, such as bbox/AP-person; auto: segm/AP, without masks bbox/AP.",
    )
    log_period: PositiveInt = key(20, "Iterations between log lines.")
    accumulate: Parts = key(
        1,
        "Parts of IMS_PER_BATCH that go through the model one after the other: less memory, the same update. "
        "auto, or 0: as few as fit into the memory; a step is measured before the first iteration, and "
        "config.yaml has the number.",
    )
    cuda_graphs: BoolOrAuto = key(
        "auto",
        "Launch forward and backward as one CUDA graph for each set of input shapes; auto: where this was "
        "proven with the installed PyTorch, so far nowhere.",
    )
    ema: EMA = EMA()
    early_stop: EarlyStop = EarlyStop()
    non_finite: Literal["stop", "skip"] = key(
        "stop", "Stop at, or skip, a step with a non-finite loss or gradient."
    )


class Checkpoint(Section):
    keep: Count = key(0, "Newest checkpoints to keep, in addition to the best and the final one; 0: all.")


class Augmentation(Section):
    enabled: Bool = key(
        False,
        "Test-time augmentation: detect in several sizes of each image, and merge. An evaluation gives AP "
        "without it (bbox, segm) and with it (bbox_TTA, segm_TTA).",
    )
    min_sizes: Lengths = key(
        (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
        "Lengths of the shorter side, pixels, of the images made from that of INPUT.MIN_SIZE_TEST.",
    )
    max_size: Amount = key(4000, "Limit of the longer side of these images, pixels.")
    flip: Bool = key(True, "Detect in the mirror image of each, too.")


class PreciseBN(Section):
    enabled: Bool = key(
        False,
        "Before each evaluation in training, and at its end, set the statistics of BatchNorms that are "
        "trained to their means over the next NUM_ITER batches.",
    )
    num_iter: Amount = key(200, "Training batches for these means.")


class Test(Section):
    expected_results: Annotated[tuple[Any, ...], FromText] = only(())
    eval_period: Count = key(0, "Iterations between evaluations; 0: at the end alone.")
    keypoint_oks_sigmas: Annotated[tuple[Float, ...], FromText] = unread(())
    detections_per_image: Amount = key(
        100, "Limit of the detections of an image, or with TILES of a tile; COCO's AP counts 100."
    )
    aug: Augmentation = Augmentation()
    tiles: Tiles = Tiles()
    precise_bn: PreciseBN = PreciseBN()
    ims_per_batch: Amount = key(1, "Images that each process reads and evaluates together.")
    coco_eval_backend: Literal["auto", "hotcoco", "faster_coco_eval", "pycocotools"] = key(
        "auto", "Library that computes AP; all give the same numbers."
    )
    loss_images: Count = key(
        0,
        "Images of each test set, evenly spread, whose losses each evaluation computes, too, without "
        "augmentation; 0: none.",
    )
    boundary_ap: Bool = key(False, "Compute the Boundary AP of masks, too: how well outlines fit.")


class Vis(Section):
    num_images: Count = key(8, "Pictures drawn after the final evaluation.")


class Global(Section):
    hack: Float = only(1.0)


class Root(Section):
    version: Int = key(2, "Version of detectron2's config format.", (2,))
    model: Model = Model()
    input: Input = Input()
    datasets: Datasets = Datasets()
    dataloader: DataLoader = DataLoader()
    solver: Solver = Solver()
    checkpoint: Checkpoint = Checkpoint()
    test: Test = Test()
    output_dir: Str = key(
        "./output", "Folder of the run: config, log, metrics, checkpoints, results, pictures.", min_length=1
    )
    seed: Int = key(
        -1,
        "Seed of weights, order of images and augmentation; negative: a new one for each run, "
        "written into its config.",
        lt=2**31,
    )
    cudnn_benchmark: Bool = key(False, "Let cuDNN time its algorithms; helps where all inputs have one size.")
    float32_precision: Literal["", "highest", "high", "medium"] = key(
        "", "Precision of float32 matrix products (torch.set_float32_matmul_precision); empty: PyTorch's own."
    )
    loggers: Loggers = key(
        (),
        "Loggers in addition to TensorBoard: wandb, mlflow, trackio. Each gets the config and the metrics.",
    )
    vis_period: Int = only(0)
    vis: Vis = Vis()
    global_: Global = Global()


@cache
def key_fields() -> dict[str, FieldInfo]:
    """Return the declaration of every dotted key and group, in the order of the schema."""
    return dict(_walk(Root, ""))


def _walk(section: type[Section], prefix: str) -> Iterable[tuple[str, FieldInfo]]:
    for field in section.model_fields.values():
        yield f"{prefix}{field.alias}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _walk(field.annotation, f"{prefix}{field.alias}.")


def known_keys() -> list[str]:
    """Return all dotted keys, groups included."""
    return list(key_fields())


def implemented(name: str) -> tuple[Any, ...]:
    """Return the values of a dotted key that are implemented; none for a key that takes any of its type."""
    extra = key_fields()[name].json_schema_extra
    return extra["implemented"] if isinstance(extra, dict) else ()  # type: ignore[return-value]


def never_read() -> list[str]:
    """Return the keys, and the groups of keys, that no architecture reads."""
    return [name for name, field in key_fields().items() if field.description == NEVER_READ]


def is_below(name: str, groups: Iterable[str]) -> bool:
    """Return whether a dotted key is one of ``groups`` or lies below one."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)
