"""A model from a configuration: the one place where config keys become constructor arguments."""

from __future__ import annotations

import torch
from torch import nn

from ..config import Config
from ..config.model import ROIBoxHead, ROIMaskHead
from ..errors import UserError
from ..layers import make_norm
from .anchors import AnchorGenerator
from .box_head import BoxHead, BoxPredictor
from .fpn import FPN
from .mask_head import MaskHead
from .mask_rcnn import MaskRCNN
from .resnet import BLOCKS_PER_STAGE, NormFactory, ResNet, Stem, make_stage
from .roi_heads import Res5RoIHeads, SamplingSettings, StandardRoIHeads
from .roi_pooling import RoIPooler
from .rpn import RPN, RPNHead, RPNSettings

_STAGES = ("res2", "res3", "res4", "res5")

MOST_PARAMETERS = 2**29  # 2 GB in float32; the largest published Mask R-CNN has 2e8


def make_model(cfg: Config) -> MaskRCNN:
    """Build the model for training, evaluation or prediction, on the CPU, after a check of its size.

    ``FLOAT32_PRECISION`` and ``CUDNN_BENCHMARK`` are in effect from then on.

    Raises:
        UserError: numbers of channels, groups or levels in the config do not fit together, or are too large.
    """
    if cfg.float32_precision:
        torch.set_float32_matmul_precision(cfg.float32_precision)
    torch.backends.cudnn.benchmark = cfg.cudnn_benchmark
    try:
        with torch.device("meta"):  # shapes alone, before memory is taken
            count = sum(parameter.numel() for parameter in build_model(cfg).parameters())
        if count > MOST_PARAMETERS:
            raise ValueError(f"they make {count:.1e} parameters, more than {MOST_PARAMETERS:.1e}")
        return build_model(cfg)
    except ValueError as error:
        raise UserError(f"the MODEL keys do not fit together: {error}") from error


def build_model(cfg: Config) -> MaskRCNN:
    """The detector of ``cfg`` with freshly initialised weights, on the CPU, in training mode.

    It has the memory format to train in; see :func:`detection_format`. The random state of torch decides the
    weights; seed it for the same model twice.
    """
    backbone, channels, strides = _build_backbone(cfg)
    rpn = _build_rpn(cfg, channels, strides)
    if cfg.model.roi_heads.name == "Res5ROIHeads":
        heads: StandardRoIHeads | Res5RoIHeads = _build_res5_heads(cfg, channels, strides)
    else:
        heads = _build_standard_heads(cfg, channels, strides)
    return MaskRCNN(
        backbone,
        rpn,
        heads,
        cfg.model.pixel_mean,
        cfg.model.pixel_std,
        size_divisibility=getattr(backbone, "size_divisibility", 1),
        channels_last=_trains_channels_last(cfg),
    )


def detection_format(cfg: Config) -> torch.memory_format:
    """In which a model detects. ``auto``: NCHW, whose sums round as detectron2's do.

    Channels-last convolutions add in another order, which turns single pixels of masks over.
    """
    return torch.channels_last if cfg.model.channels_last is True else torch.contiguous_format


def _trains_channels_last(cfg: Config) -> bool:
    """``auto``: on an accelerator the native group norm converts to NCHW and back, so there it stays NCHW."""
    choice = cfg.model.channels_last
    if choice != "auto":
        return bool(choice)
    device = cfg.model.device
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def _norm(cfg: Config, name: str) -> NormFactory:
    """channels -> layer, for the value of one ``NORM`` key."""
    gn = cfg.model.gn
    return lambda channels: make_norm(name, channels, gn.num_groups, gn.eps, gn.min_channels_per_group)


def _build_backbone(cfg: Config) -> tuple[nn.Module, dict[str, int], dict[str, int]]:
    """The backbone, and the channels and strides of the features that it returns."""
    bottom_up, channels, strides = _build_resnet(cfg)
    if cfg.model.backbone.name == "build_resnet_backbone":
        return bottom_up, channels, strides
    fpn = cfg.model.fpn
    backbone = FPN(
        bottom_up,
        fpn.in_features,
        [channels[name] for name in fpn.in_features],
        [strides[name] for name in fpn.in_features],
        fpn.out_channels,
        _norm(cfg, fpn.norm),
        fpn.fuse_type,
    )
    levels = [*backbone.levels, backbone.levels[-1] + 1]
    return backbone, {f"p{i}": fpn.out_channels for i in levels}, {f"p{i}": 2**i for i in levels}


def _build_resnet(cfg: Config) -> tuple[ResNet, dict[str, int], dict[str, int]]:
    """Stages up to the last one that is asked for."""
    r = cfg.model.resnets
    norm = _norm(cfg, r.norm)
    last = max(_STAGES.index(name) for name in r.out_features)
    stages, channels, strides = {}, {}, {}
    in_channels, stride = r.stem_out_channels, 4
    for i, name in enumerate(_STAGES[: last + 1]):
        dilation = r.res5_dilation if name == "res5" else 1
        stages[name] = _make_resnet_stage(
            cfg, i + 2, BLOCKS_PER_STAGE[r.depth][i], in_channels, norm, dilation
        )
        in_channels = r.res2_out_channels * 2**i
        stride *= 1 if name == "res2" or dilation == 2 else 2
        channels[name], strides[name] = in_channels, stride
    backbone = cfg.model.backbone
    resnet = ResNet(
        Stem(r.stem_out_channels, norm),
        stages,
        r.out_features,
        backbone.freeze_at,
        backbone.activation_checkpointing,
    )
    return resnet, channels, strides


def _make_resnet_stage(
    cfg: Config, index: int, num_blocks: int, in_channels: int, norm: NormFactory, dilation: int = 1
) -> nn.Sequential:
    r = cfg.model.resnets
    widening = 2 ** (index - 2)
    return make_stage(
        index,
        num_blocks,
        depth=r.depth,
        in_channels=in_channels,
        out_channels=r.res2_out_channels * widening,
        bottleneck_channels=r.num_groups * r.width_per_group * widening,
        norm=norm,
        stride_in_1x1=r.stride_in_1x1,
        num_groups=r.num_groups,
        dilation=dilation,
    )


def _build_rpn(cfg: Config, channels: dict[str, int], strides: dict[str, int]) -> RPN:
    c, names = cfg.model.rpn, cfg.model.rpn.in_features
    a = cfg.model.anchor_generator
    anchors = AnchorGenerator(a.sizes, a.aspect_ratios, [strides[name] for name in names], a.offset)
    head = RPNHead(channels[names[0]], anchors.num_anchors, c.conv_dims)
    settings = RPNSettings(
        batch_size_per_image=c.batch_size_per_image,
        positive_fraction=c.positive_fraction,
        iou_thresholds=c.iou_thresholds,
        iou_labels=c.iou_labels,
        pre_nms_topk_train=c.pre_nms_topk_train,
        pre_nms_topk_test=c.pre_nms_topk_test,
        post_nms_topk_train=c.post_nms_topk_train,
        post_nms_topk_test=c.post_nms_topk_test,
        nms_thresh=c.nms_thresh,
        min_size=cfg.model.proposal_generator.min_size,
        boundary_thresh=c.boundary_thresh,
        bbox_reg_weights=c.bbox_reg_weights,
        smooth_l1_beta=c.smooth_l1_beta,
        loss_weight=c.loss_weight,
        bbox_reg_loss_weight=c.bbox_reg_loss_weight,
    )
    return RPN(names, head, anchors, settings)


def _build_sampling(cfg: Config) -> SamplingSettings:
    c = cfg.model.roi_heads
    return SamplingSettings(
        num_classes=c.num_classes,
        batch_size_per_image=c.batch_size_per_image,
        positive_fraction=c.positive_fraction,
        iou_thresholds=c.iou_thresholds,
        iou_labels=c.iou_labels,
        proposal_append_gt=c.proposal_append_gt,
    )


def _build_predictor(cfg: Config, in_features: int) -> BoxPredictor:
    box, heads = cfg.model.roi_box_head, cfg.model.roi_heads
    return BoxPredictor(
        in_features,
        heads.num_classes,
        class_agnostic=box.cls_agnostic_bbox_reg,
        bbox_reg_weights=box.bbox_reg_weights,
        smooth_l1_beta=box.smooth_l1_beta,
        bbox_reg_loss_weight=box.bbox_reg_loss_weight,
        score_thresh=heads.score_thresh_test,
        nms_thresh=heads.nms_thresh_test,
        detections_per_image=cfg.test.detections_per_image,
    )


def _build_mask_head(cfg: Config, in_channels: int) -> MaskHead | None:
    if not cfg.model.mask_on:
        return None
    mask = cfg.model.roi_mask_head
    return MaskHead(
        in_channels,
        [mask.conv_dim] * mask.num_conv,
        mask.conv_dim,
        1 if mask.cls_agnostic_mask else cfg.model.roi_heads.num_classes,
        _norm(cfg, mask.norm),
    )


def _build_pooler(head: ROIBoxHead | ROIMaskHead, strides: list[int]) -> RoIPooler:
    """``head``: the settings of the box or the mask head."""
    return RoIPooler(
        head.pooler_resolution, strides, head.pooler_sampling_ratio, aligned=head.pooler_type == "ROIAlignV2"
    )


def _build_standard_heads(cfg: Config, channels: dict[str, int], strides: dict[str, int]) -> StandardRoIHeads:
    names = cfg.model.roi_heads.in_features
    level_strides = [strides[name] for name in names]
    in_channels = channels[names[0]]
    box, mask = cfg.model.roi_box_head, cfg.model.roi_mask_head
    box_head = BoxHead(
        in_channels,
        box.pooler_resolution,
        [box.conv_dim] * box.num_conv,
        [box.fc_dim] * box.num_fc,
        _norm(cfg, box.norm),
    )
    return StandardRoIHeads(
        names,
        _build_pooler(box, level_strides),
        box_head,
        _build_predictor(cfg, box_head.output_size),
        _build_pooler(mask, level_strides) if cfg.model.mask_on else None,
        _build_mask_head(cfg, in_channels),
        _build_sampling(cfg),
    )


def _build_res5_heads(cfg: Config, channels: dict[str, int], strides: dict[str, int]) -> Res5RoIHeads:
    names = cfg.model.roi_heads.in_features
    r = cfg.model.resnets
    res5 = _make_resnet_stage(cfg, 5, BLOCKS_PER_STAGE[r.depth][3], channels[names[0]], _norm(cfg, r.norm))
    out_channels = r.res2_out_channels * 8
    pooler = _build_pooler(cfg.model.roi_box_head, [strides[name] for name in names])
    return Res5RoIHeads(
        names,
        pooler,
        res5,
        _build_predictor(cfg, out_channels),
        _build_mask_head(cfg, out_channels),
        _build_sampling(cfg),
    )
