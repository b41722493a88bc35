"""A model from a configuration: constructors get their sections, and modules know nothing of the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..config import Config
from ..config.conflicts import has_fpn
from ..config.schema import LIBRARY_BACKBONES, ROIBoxHead, ROIMaskHead
from ..errors import UserError
from ..layers import make_norm, standardize_convs
from .anchors import AnchorGenerator
from .box_head import BoxHead, BoxPredictor
from .fpn import FPN
from .freezing import freeze_by_name
from .library_backbone import build_library_backbone
from .mask_head import MaskHead
from .mask_rcnn import MaskRCNN
from .resnet import STAGES, NormFactory, ResNet, Stem, make_stage
from .roi_heads import CascadeRoIHeads, Res5RoIHeads, RoIHeads, StandardRoIHeads
from .roi_pooling import RoIPooler
from .rpn import RPN, RPNHead

Features = dict[str, tuple[int, int]]  # name -> channels and stride

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
        raise UserError("conflicting-keys", f"the MODEL keys do not fit together: {error}") from error


def build_model(cfg: Config) -> MaskRCNN:
    """Return the detector of ``cfg`` with freshly initialised weights, on the CPU, in training mode.

    It has the memory format for training; :func:`detection_format` gives the other one. The random state of
    torch decides the weights.
    """
    backbone, features = _build_backbone(cfg)
    rpn = _build_rpn(cfg, features)
    builders = {"Res5ROIHeads": _build_res5_heads, "CascadeROIHeads": _build_cascade_heads}
    heads: Callable[[Config, Features], RoIHeads] = builders.get(
        cfg.model.roi_heads.name, _build_standard_heads
    )
    model = MaskRCNN(
        backbone,
        rpn,
        heads(cfg, features),
        cfg.model.pixel_mean,
        cfg.model.pixel_std,
        size_divisibility=getattr(backbone, "size_divisibility", 1),
        channels_last=_trains_channels_last(cfg),
    )
    freeze_by_name(model, cfg.model.freeze)
    return model


def detection_format(cfg: Config) -> torch.memory_format:
    """Return the memory format for detection: for ``auto`` NCHW, whose sums round as detectron2's do.

    Channels-last convolutions add in another order, which flips single pixels of masks.
    """
    return torch.channels_last if cfg.model.channels_last is True else torch.contiguous_format


def _trains_channels_last(cfg: Config) -> bool:
    choice, device = cfg.model.channels_last, cfg.model.device
    if choice != "auto":
        return bool(choice)
    # On an accelerator the native group norm converts to NCHW and back, so the model stays NCHW there.
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def _norm(cfg: Config, name: str) -> NormFactory:
    """Return the function from channels to a layer, for the value of one ``NORM`` key."""
    gn = cfg.model.gn
    return lambda channels: make_norm(name, channels, gn.num_groups, gn.eps, gn.min_channels_per_group)


def _build_backbone(cfg: Config) -> tuple[nn.Module, Features]:
    """Return the backbone and the channels and strides of its features."""
    bottom_up: nn.Module
    if cfg.model.backbone.name in LIBRARY_BACKBONES:
        bottom_up, features = build_library_backbone(cfg, _norm(cfg, "GN"))
    else:
        bottom_up, features = _build_resnet(cfg)
    if not has_fpn(cfg):
        return bottom_up, features
    settings = cfg.model.fpn
    levels = [features[name] for name in settings.in_features]
    fpn = FPN(bottom_up, settings, levels, _norm(cfg, settings.norm), cfg.model.conv_style)
    for name, conv in list(fpn.named_children()):
        if name != "bottom_up":
            setattr(fpn, name, standardize_convs(conv, settings.conv))
    return fpn, {f"p{i}": (settings.out_channels, 2**i) for i in (*fpn.levels, fpn.levels[-1] + 1)}


def _build_resnet(cfg: Config) -> tuple[ResNet, Features]:
    """Build the stages up to the last one that is needed."""
    settings, backbone = cfg.model.resnets, cfg.model.backbone
    norm = _norm(cfg, settings.norm)
    last = max(STAGES.index(name) for name in settings.out_features)
    stages: dict[str, nn.Sequential] = {}
    features: Features = {}
    channels, stride = settings.stem_out_channels, 4
    for i, name in enumerate(STAGES[: last + 1]):
        dilation = settings.res5_dilation if name == "res5" else 1
        stages[name] = make_stage(settings, name, channels, norm, dilation)
        channels = settings.res2_out_channels * 2**i
        stride *= 1 if name == "res2" or dilation == 2 else 2
        features[name] = channels, stride
    stem = Stem(settings.stem_out_channels, norm)
    resnet = ResNet(
        stem, stages, settings.out_features, backbone.freeze_at, backbone.activation_checkpointing
    )
    standardize_convs(resnet, settings.conv)
    return resnet, features


def _build_rpn(cfg: Config, features: Features) -> RPN:
    settings, a = cfg.model.rpn, cfg.model.anchor_generator
    levels = [features[name] for name in settings.in_features]
    anchors = AnchorGenerator(a.sizes, a.aspect_ratios, [stride for _, stride in levels], a.offset)
    head = RPNHead(levels[0][0], anchors.num_anchors, settings.conv_dims)
    return RPN(settings, head, anchors, cfg.model.proposal_generator.min_size)


def _build_predictor(cfg: Config, in_features: int) -> BoxPredictor:
    model = cfg.model
    return BoxPredictor(in_features, model.roi_heads, model.roi_box_head, cfg.test.detections_per_image)


def _build_mask_head(cfg: Config, in_channels: int) -> MaskHead | None:
    settings = cfg.model.roi_mask_head
    if not cfg.model.mask_on:
        return None
    num_masks = 1 if settings.cls_agnostic_mask else cfg.model.roi_heads.num_classes
    head = MaskHead(in_channels, settings, num_masks, _norm(cfg, settings.norm), cfg.model.conv_style)
    standardize_convs(head, settings.conv)
    return head


def _build_box_head(cfg: Config, channels: int) -> BoxHead:
    settings = cfg.model.roi_box_head
    head = BoxHead(channels, settings, _norm(cfg, settings.norm), cfg.model.conv_style)
    standardize_convs(head, settings.conv)
    return head


def _build_pooler(cfg: Config, head: ROIBoxHead | ROIMaskHead, features: Features) -> RoIPooler:
    strides = [features[name][1] for name in cfg.model.roi_heads.in_features]
    aligned = head.pooler_type == "ROIAlignV2"
    return RoIPooler(head.pooler_resolution, strides, head.pooler_sampling_ratio, aligned)


def _build_standard_heads(cfg: Config, features: Features) -> StandardRoIHeads:
    settings, box = cfg.model.roi_heads, cfg.model.roi_box_head
    channels, _ = features[settings.in_features[0]]
    box_head = _build_box_head(cfg, channels)
    return StandardRoIHeads(
        settings,
        _build_pooler(cfg, box, features),
        box_head,
        _build_predictor(cfg, box_head.output_size),
        _build_pooler(cfg, cfg.model.roi_mask_head, features) if cfg.model.mask_on else None,
        _build_mask_head(cfg, channels),
    )


def _build_cascade_heads(cfg: Config, features: Features) -> CascadeRoIHeads:
    model = cfg.model
    settings, box, cascade = model.roi_heads, model.roi_box_head, model.roi_box_cascade_head
    channels, _ = features[settings.in_features[0]]
    heads, predictors = [], []
    for weights in cascade.bbox_reg_weights:
        heads.append(_build_box_head(cfg, channels))
        own = box.model_copy(update={"bbox_reg_weights": weights})
        limit = cfg.test.detections_per_image
        predictors.append(BoxPredictor(heads[-1].output_size, settings, own, limit))
    return CascadeRoIHeads(
        settings,
        _build_pooler(cfg, box, features),
        heads,
        predictors,
        cascade.ious,
        _build_pooler(cfg, model.roi_mask_head, features) if model.mask_on else None,
        _build_mask_head(cfg, channels),
    )


def _build_res5_heads(cfg: Config, features: Features) -> Res5RoIHeads:
    settings, resnets = cfg.model.roi_heads, cfg.model.resnets
    channels, _ = features[settings.in_features[0]]
    res5 = make_stage(resnets, "res5", channels, _norm(cfg, resnets.norm))
    standardize_convs(res5, resnets.conv)
    channels = resnets.res2_out_channels * 8
    pooler = _build_pooler(cfg, cfg.model.roi_box_head, features)
    predictor = _build_predictor(cfg, channels)
    return Res5RoIHeads(settings, pooler, res5, predictor, _build_mask_head(cfg, channels))
