"""Settings that are valid by themselves and do not fit together."""

from __future__ import annotations

from collections.abc import Iterator

from .schema import LIBRARY_BACKBONES, Root

_DEFORM = "MODEL.RESNETS.DEFORM_ON_PER_STAGE"


def has_fpn(root: Root) -> bool:
    """Return whether the backbone has a feature pyramid."""
    return root.model.backbone.name.endswith("_fpn_backbone")


def unread_groups(root: Root) -> Iterator[str]:
    """Yield keys, and groups of keys, that the chosen architecture does not read: they may hold anything."""
    model = root.model
    if not has_fpn(root):
        yield "MODEL.FPN"
    if model.backbone.name in LIBRARY_BACKBONES:
        yield from ("MODEL.RESNETS.NORM", "MODEL.RESNETS.CONV")
    if model.roi_heads.name != "CascadeROIHeads":
        yield "MODEL.ROI_BOX_CASCADE_HEAD"
    if model.roi_heads.name == "Res5ROIHeads":  # both branches share one pooler and res5
        yield from ("MODEL.ROI_BOX_HEAD.NAME", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.POOLER_TYPE")
        yield "MODEL.ROI_BOX_HEAD.CONV"
    if not model.mask_on:
        yield "MODEL.ROI_MASK_HEAD"


def conflicts(root: Root) -> Iterator[tuple[str, str]]:
    """Yield the key and a complaint for each conflict."""
    yield from _backbone_conflicts(root)
    yield from _feature_conflicts(root)
    model = root.model
    for section, key in ((model.rpn, "MODEL.RPN"), (model.roi_heads, "MODEL.ROI_HEADS")):
        if len(section.iou_labels) != len(section.iou_thresholds) + 1:
            yield f"{key}.IOU_THRESHOLDS", "must have one entry less than IOU_LABELS"
    if model.roi_heads.name == "CascadeROIHeads":
        yield from _cascade_conflicts(root)
    if root.solver.accumulate == 0 and root.solver.cuda_graphs is True:
        yield "SOLVER.ACCUMULATE", "cannot be auto with SOLVER.CUDA_GRAPHS True, whose memory is not measured"
    if root.solver.ims_per_batch % (root.solver.accumulate or 1):
        yield "SOLVER.ACCUMULATE", f"must divide SOLVER.IMS_PER_BATCH, which is {root.solver.ims_per_batch}"
    weights = model.roi_box_head.class_weights
    if weights and weights != "auto" and len(weights) != model.roi_heads.num_classes:
        count = model.roi_heads.num_classes
        yield "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", f"must be auto or {count} numbers, one for each class"
    if root.solver.early_stop.patience and not root.test.eval_period:
        yield "SOLVER.EARLY_STOP.PATIENCE", "needs a TEST.EVAL_PERIOD: there is no evaluation before the end"
    levels = len(model.rpn.in_features)
    for name in ("sizes", "aspect_ratios"):
        key, values = f"MODEL.ANCHOR_GENERATOR.{name.upper()}", getattr(model.anchor_generator, name)
        if len(values) not in (1, levels):
            wanted = f"one entry for all levels or one for each of {levels} in MODEL.RPN.IN_FEATURES"
            yield key, f"must have {wanted}"
        if len({len(value) for value in values}) > 1:
            yield key, "must have as many values for every level, which share one RPN head"
    given = root.input
    if given.min_size_train_sampling == "range" and len(given.min_size_train) != 2:
        yield "INPUT.MIN_SIZE_TRAIN", "must be (least, largest) with INPUT.MIN_SIZE_TRAIN_SAMPLING range"
    relative = given.crop.type.startswith("relative")
    if not all(0 < side <= 1 if relative else side >= 1 for side in given.crop.size):
        unit = "fractions up to 1" if relative else "pixels"
        yield "INPUT.CROP.SIZE", f"must be {unit} with {given.crop.type}"
    jitter = given.large_scale_jitter
    if jitter.min_scale > jitter.max_scale or len(jitter.size) != 2:
        yield "INPUT.LARGE_SCALE_JITTER", "needs MIN_SCALE up to MAX_SCALE, and SIZE as (height, width)"
    if given.affine.min_scale > given.affine.max_scale:
        yield "INPUT.AFFINE", "needs MIN_SCALE up to MAX_SCALE"
    if given.copy_paste and not model.mask_on:
        yield "INPUT.COPY_PASTE", "needs masks: set MODEL.MASK_ON to True, or COPY_PASTE to 0"


def _cascade_conflicts(root: Root) -> Iterator[tuple[str, str]]:
    heads, cascade = root.model.roi_heads, root.model.roi_box_cascade_head
    if not root.model.roi_box_head.cls_agnostic_bbox_reg:
        complaint = "must be True for CascadeROIHeads: a stage passes one box of each RoI on to the next"
        yield "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", complaint
    if len(cascade.ious) != len(cascade.bbox_reg_weights):
        stages = len(cascade.bbox_reg_weights)
        complaint = f"must have one entry for each of {stages} in MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"
        yield "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", complaint
    if heads.iou_thresholds != cascade.ious[:1] or heads.iou_labels != (0, 1):
        complaint = f"must be [{cascade.ious[0]}], the first of MODEL.ROI_BOX_CASCADE_HEAD.IOUS, with the"
        yield "MODEL.ROI_HEADS.IOU_THRESHOLDS", f"{complaint} IOU_LABELS [0, 1]"


def _backbone_conflicts(root: Root) -> Iterator[tuple[str, str]]:
    resnets = root.model.resnets
    if root.model.backbone.name in LIBRARY_BACKBONES:
        yield from _library_conflicts(root)
        return
    for name, default in (("model", ""), ("norm", "keep"), ("drop_path_rate", 0.0)):
        if getattr(root.model.backbone, name) != default:
            complaint = "is for a NAME with timm or torchvision, such as build_timm_fpn_backbone"
            yield f"MODEL.BACKBONE.{name.upper()}", complaint
    if root.model.backbone.activation_checkpointing and resnets.norm in ("BN", "SyncBN"):
        complaint = "needs a MODEL.RESNETS.NORM without running statistics, which would be updated twice"
        yield "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING", f"{complaint}; choose GN"
    if resnets.conv and any(resnets.deform_on_per_stage):
        complaint = "is not for deformable convolutions; set it to '', or DEFORM_ON_PER_STAGE to False"
        yield "MODEL.RESNETS.CONV", complaint
    if resnets.depth < 50:
        if (resnets.num_groups, resnets.res5_dilation) != (1, 1):
            yield "MODEL.RESNETS.DEPTH", "has neither NUM_GROUPS nor RES5_DILATION; set both to 1"
        if resnets.res2_out_channels > 64:
            yield "MODEL.RESNETS.DEPTH", "needs RES2_OUT_CHANNELS of 64, its own width, or less"
        if root.model.roi_heads.name == "Res5ROIHeads":
            yield "MODEL.RESNETS.DEPTH", "must be 50 or more for Res5ROIHeads, whose blocks are bottlenecks"
    yield from _deform_conflicts(root)
    if resnets.res5_dilation != 1:
        if has_fpn(root):
            yield "MODEL.RESNETS.RES5_DILATION", "must be 1 with an FPN, whose levels differ in stride"
        elif "res5" not in resnets.out_features:
            yield "MODEL.RESNETS.RES5_DILATION", "must be 1 where the backbone ends before res5"


def _deform_conflicts(root: Root) -> Iterator[tuple[str, str]]:
    resnets = root.model.resnets
    if not any(resnets.deform_on_per_stage):
        return
    if resnets.depth < 50:
        yield _DEFORM, "must be all False for DEPTH 18 and 34: deformable convolutions are in bottlenecks"
    if resnets.deform_on_per_stage[3] and root.model.roi_heads.name == "Res5ROIHeads":
        yield _DEFORM, "must end with False for Res5ROIHeads, which have no deformable convolutions"
    first = resnets.deform_on_per_stage.index(True)
    width = resnets.num_groups * resnets.width_per_group * 2**first
    if width % resnets.deform_num_groups:
        complaint = f"must divide {width}, the channels of the 3x3 convolutions of res{first + 2}"
        yield "MODEL.RESNETS.DEFORM_NUM_GROUPS", complaint


def _library_conflicts(root: Root) -> Iterator[tuple[str, str]]:
    backbone = root.model.backbone
    if not backbone.model:
        yield "MODEL.BACKBONE.MODEL", f"must name a network of {LIBRARY_BACKBONES[backbone.name]}"
    if any(root.model.resnets.deform_on_per_stage):
        yield _DEFORM, f"must be all False for {backbone.name}: its network stays as the library builds it"
    if root.model.roi_heads.name == "Res5ROIHeads":
        complaint = "needs the blocks of build_resnet_backbone; choose StandardROIHeads"
        yield "MODEL.ROI_HEADS.NAME", complaint
    if backbone.activation_checkpointing and LIBRARY_BACKBONES[backbone.name] == "torchvision":
        yield "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING", "is not in torchvision's networks; take timm's"


def _feature_conflicts(root: Root) -> Iterator[tuple[str, str]]:
    """Find features that do not exist, and orders that the pooling cannot use."""
    model = root.model
    existing = set(model.resnets.out_features)
    source = "MODEL.RESNETS.OUT_FEATURES"
    pyramid = has_fpn(root)
    if pyramid:
        if not model.fpn.in_features or not set(model.fpn.in_features) <= existing:
            yield "MODEL.FPN.IN_FEATURES", f"must name some of {source} ({', '.join(sorted(existing))})"
            return
        levels = _levels(model.fpn.in_features)
        if levels != list(range(levels[0], levels[-1] + 1)):
            yield "MODEL.FPN.IN_FEATURES", "must be neighbouring stages in order, such as res2 ... res5"
            return
        existing = {f"p{level}" for level in [*levels, levels[-1] + 1]}
        source = "the FPN"
    pools_one = not pyramid or model.roi_heads.name == "Res5ROIHeads"
    for names, key, one in (
        (model.rpn.in_features, "MODEL.RPN.IN_FEATURES", not pyramid),
        (model.roi_heads.in_features, "MODEL.ROI_HEADS.IN_FEATURES", pools_one),
    ):
        if not set(names) <= existing:
            yield key, f"must be among what {source} gives: {', '.join(sorted(existing))}"
        elif len(names) > 1 and one:
            yield key, "must be one feature without an FPN, and for Res5ROIHeads"
        elif _levels(names) != sorted(set(_levels(names))):
            yield key, "must be different levels, the finest first"
    levels = _levels(model.roi_heads.in_features)
    if levels != list(range(levels[0], levels[0] + len(levels))):
        complaint = "must be neighbouring levels: a box is pooled from the one that fits it"
        yield "MODEL.ROI_HEADS.IN_FEATURES", complaint


def _levels(names: tuple[str, ...]) -> list[int]:
    return [int(name.lstrip("pres") or -1) for name in names]  # 2 of p2 and res2
