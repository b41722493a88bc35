"""The config keys of a checkpoint's model, from its tensors, their names and its metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import Config, dump_config, load_config, without_paths
from ..config.conflicts import has_fpn
from ..config.load import parse_config
from ..config.schema import LIBRARY_BACKBONES, is_below
from ..config.types import value_at
from ..errors import UserError
from .checkpoint import Checkpoint
from .names.library import trunk_of
from .norm_settings import group_keys, norms_of
from .standardization import conv_keys
from .translate import BACKBONE, translate
from .zoo import entry_of

# ``RESNETS.DEPTH`` by (blocks are bottlenecks, number of blocks in each stage).
BLOCKS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}

# Keys that no tensor implies: from the config in the file, or from the model zoo's.
UNSPECIFIED = (
    "MODEL.GN.NUM_GROUPS",
    "MODEL.GN.MIN_CHANNELS_PER_GROUP",
    "MODEL.GN.EPS",
    "MODEL.ANCHOR_GENERATOR.SIZES",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
    "MODEL.ANCHOR_GENERATOR.OFFSET",
    "MODEL.RPN.BBOX_REG_WEIGHTS",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS",
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO",
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE",
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO",
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION",
    "MODEL.FPN.FUSE_TYPE",
)

# Keys of a detector whose backbone is a library's, from the config in its file.
LIBRARY_KEYS = (
    "MODEL.CONV_STYLE",
    *("MODEL.BACKBONE.NAME", "MODEL.BACKBONE.MODEL", "MODEL.BACKBONE.NORM", "MODEL.RESNETS.OUT_FEATURES"),
    *("MODEL.RPN.IN_FEATURES", "MODEL.RPN.CONV_DIMS", "MODEL.ROI_HEADS.NAME", "MODEL.ROI_HEADS.IN_FEATURES"),
    *(f"MODEL.ROI_BOX_HEAD.{key}" for key in ("NAME", "NORM", "NUM_CONV", "CONV_DIM", "NUM_FC", "FC_DIM")),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"),
    *(f"MODEL.ROI_MASK_HEAD.{key}" for key in ("NORM", "NUM_CONV", "CONV_DIM", "CLS_AGNOSTIC_MASK")),
    *("MODEL.ROI_BOX_HEAD.CONV", "MODEL.ROI_MASK_HEAD.CONV"),
)
FPN_KEYS = ("MODEL.FPN.IN_FEATURES", "MODEL.FPN.OUT_CHANNELS", "MODEL.FPN.NORM", "MODEL.FPN.CONV")

_RPN = "proposal_generator."

_REMEDY = (
    "give --config-file, the config that it was trained with, or --backbone NAME for a classifier of "
    "torchvision or timm"
)


@dataclass(frozen=True)
class Architecture:
    """The architecture of a checkpoint's model.

    Attributes:
        keys: config keys, such as ``MODEL.RESNETS.DEPTH``.
        is_detector: it has heads; otherwise it is a backbone.
        has_masks: it has a mask head.
        norm: of the backbone: ``"GN"``, ``"FrozenBN"`` or ``""``.
        class_names: by label; empty where the file has none.
    """

    keys: dict[str, Any]
    is_detector: bool
    has_masks: bool
    norm: str
    class_names: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        name = self.keys.get("MODEL.BACKBONE.MODEL") or f"R-{self.keys['MODEL.RESNETS.DEPTH']}"
        norm = {"": "no norm", "keep": "its own norms"}.get(self.norm, self.norm)
        if not self.is_detector:
            return f"backbone {name} with {norm}"
        neck = "FPN" if "MODEL.FPN.OUT_CHANNELS" in self.keys else "C4"
        cascade = "Cascade " if self.keys.get("MODEL.ROI_HEADS.NAME") == "CascadeROIHeads" else ""
        return f"{cascade}{'Mask' if self.has_masks else 'Faster'} R-CNN {name}-{neck} with {norm}"


Shapes = Mapping[str, tuple[int, ...]]

_MATRICES = re.compile(
    r"(backbone\.fpn_lateral\d|backbone\.bottom_up\.((stem|res2\.0)\.conv\d|res\d\.0\.conv2_offset)"
    r"|roi_heads\.box_head\.(\d+\.)?(conv|fc)\d+|roi_heads\.box_predictor\.(\d+\.)?(cls_score|bbox_pred)"
    r"|roi_heads\.mask_head\.(predictor|deconv))\.weight"
)


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """Deduce the architecture of a checkpoint of any library whose names are known.

    A detector whose backbone is a network of torchvision or timm must hold its config. BatchNorm with its
    statistics becomes ``FrozenBN``: one or two images are too few to train it.

    Raises:
        UserError: this package builds no such detector or backbone.
    """
    tensors = translate(checkpoint).tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    is_detector = any(name.startswith(_RPN) for name in shapes)
    has_masks = any(".mask_head.predictor." in name for name in shapes)
    if (cfg := library_config(checkpoint)) is not None:
        names = (*LIBRARY_KEYS, *(FPN_KEYS if has_fpn(cfg) else ()))
        keys = {key: value_at(cfg, key) for key in names} | unspecified_keys(checkpoint)
        norm = cfg.model.backbone.norm
        return Architecture(keys, is_detector, has_masks, norm, checkpoint.metadata.class_names)
    has_pyramid = any(name.startswith("backbone.fpn_lateral") for name in shapes)
    if is_detector and not has_pyramid:
        shapes = _with_stages_together(shapes)
    for name, shape in shapes.items():  # the keys are read from matrices and kernels, which are not empty
        if _MATRICES.fullmatch(name) and (len(shape) < 2 or 0 in shape):
            raise UserError(
                "unknown-network",
                f"{checkpoint.path}: {name} has the shape {list(shape)}, as in no detector; {_REMEDY}, "
                "or other weights",
            )
    keys = _backbone_keys(checkpoint, shapes)
    if is_detector and has_pyramid:
        keys |= _pyramid_keys(checkpoint, shapes)
    if is_detector:
        keys |= _head_keys(shapes)
    convs = norms_of(checkpoint, tensors).weight_standardization
    keys |= {key: kind for key, kind in conv_keys(convs, tensors).items() if kind}
    keys |= unspecified_keys(checkpoint)
    _check_stages(checkpoint, shapes, keys)
    return Architecture(
        keys,
        is_detector,
        has_masks,
        keys["MODEL.RESNETS.NORM"],
        checkpoint.metadata.class_names,
    )


def _with_stages_together(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    # The last stage of a C4 detector is in the heads, and the others have no ``bottom_up``.
    moved = {}
    for name, shape in shapes.items():
        name = re.sub(r"^roi_heads\.res5\.", f"{BACKBONE}res5.", name)
        moved[re.sub(r"^backbone\.(?=stem|res\d)", BACKBONE, name)] = shape
    return moved


def _backbone_keys(checkpoint: Checkpoint, shapes: Shapes) -> dict[str, Any]:
    def is_there(name: str) -> bool:
        return f"{BACKBONE}{name}.weight" in shapes

    def shape(name: str) -> tuple[int, ...]:
        return shapes.get(f"{BACKBONE}{name}.weight", ())

    stages = [
        len({name.split(".")[3] for name in shapes if name.startswith(f"{BACKBONE}res{stage}.")})
        for stage in range(2, 6)
    ]
    bottleneck = is_there("res2.0.conv3")
    depth = BLOCKS.get((bottleneck, tuple(stages)))
    last, middle = shape("res2.0.conv3" if bottleneck else "res2.0.conv2"), shape("res2.0.conv2")
    if depth is None or len(shape("stem.conv1")) != 4 or len(middle) != 4 or len(last) != 4:
        first = next(iter(checkpoint.tensors), "nothing")
        raise UserError(
            "unknown-network",
            f"{checkpoint.path}: no ResNet of 18 to 152 layers can be recognised in it (blocks in a stage: "
            f"{', '.join(map(str, stages))}; its first tensor is {first}); {_REMEDY}, or other weights",
        )
    groups = max(1, middle[0] // max(1, middle[1])) if bottleneck else 1
    return {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NORM": _norm(shapes, f"{BACKBONE}res2.0.conv1"),
        "MODEL.RESNETS.STEM_OUT_CHANNELS": shape("stem.conv1")[0],
        "MODEL.RESNETS.RES2_OUT_CHANNELS": last[0],
        "MODEL.RESNETS.NUM_GROUPS": groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": middle[0] // groups if bottleneck else 64,
        **_deform_keys(shapes),
    }


def _deform_keys(shapes: Shapes) -> dict[str, Any]:
    offsets = [shapes.get(f"{BACKBONE}res{stage}.0.conv2_offset.weight", ()) for stage in range(2, 6)]
    if not any(offsets):
        return {}
    channels, width = next(shape for shape in offsets if shape)[:2]
    # Each of a group's 9 samples has two offsets, and a factor if they are modulated. 54 channels are those
    # of 3 groups, or of 2 with factors; 3 do not divide the width of published networks.
    groups, rest = divmod(channels, 18)
    modulated = rest > 0 or width % groups > 0
    return {
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": list(map(bool, offsets)),
        "MODEL.RESNETS.DEFORM_MODULATED": modulated,
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": max(1, channels // 27) if modulated else groups,
    }


def _check_stages(checkpoint: Checkpoint, shapes: Shapes, keys: dict[str, Any]) -> None:
    # The box weights of a stage are in no tensor; the defaults fit published cascades, which have three.
    stages = _count(shapes, r"roi_heads\.box_predictor\.\d+\.cls_score")
    key = "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"
    wanted = len(keys.get(key, value_at(Config(), key)))
    if stages and stages != wanted:
        raise UserError(
            "unknown-network",
            f"{checkpoint.path}: a cascade of {stages} stages, and {key} of {wanted}; {_REMEDY}",
        )


def _norm(shapes: Shapes, layer: str) -> str:
    if f"{layer}.norm.running_mean" in shapes:
        return "FrozenBN"
    return "GN" if f"{layer}.norm.weight" in shapes else ""


def _pyramid_keys(checkpoint: Checkpoint, shapes: Shapes) -> dict[str, Any]:
    levels = [level for level in range(2, 6) if f"backbone.fpn_lateral{level}.weight" in shapes]
    if levels != [2, 3, 4, 5]:
        raise UserError(
            "unknown-network", f"{checkpoint.path}: an FPN of the levels {levels} is not deduced; {_REMEDY}"
        )
    keys: dict[str, Any] = {
        "MODEL.FPN.OUT_CHANNELS": shapes["backbone.fpn_lateral2.weight"][0],
        "MODEL.FPN.NORM": _norm(shapes, "backbone.fpn_lateral2"),
    }
    if keys["MODEL.FPN.NORM"] and "backbone.fpn_lateral2.bias" in shapes:
        keys["MODEL.CONV_STYLE"] = "tensorpack"
    head = "roi_heads.box_head"
    if any(name.startswith(f"{head}.0.") for name in shapes):
        head += ".0"  # all stages of a cascade are alike
    convs = _count(shapes, rf"{head}\.conv\d+")
    fully = _count(shapes, rf"{head}\.fc\d+")
    keys |= {"MODEL.ROI_BOX_HEAD.NUM_CONV": convs, "MODEL.ROI_BOX_HEAD.NUM_FC": fully}
    keys["MODEL.ROI_BOX_HEAD.NORM"] = _norm(shapes, f"{head}.conv1")
    width = keys["MODEL.FPN.OUT_CHANNELS"]
    if convs:
        keys["MODEL.ROI_BOX_HEAD.CONV_DIM"] = width = shapes[f"{head}.conv1.weight"][0]
    if fully:
        keys["MODEL.ROI_BOX_HEAD.FC_DIM"], inputs = shapes[f"{head}.fc1.weight"][:2]
        keys["MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION"] = round((inputs / width) ** 0.5)
    return keys


def _head_keys(shapes: Shapes) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    rpn = _count(shapes, r"proposal_generator\.rpn_head\.conv(\.conv\d+)?")
    if rpn > 1:
        keys["MODEL.RPN.CONV_DIMS"] = [-1] * rpn
    outputs, head = "roi_heads.box_predictor", "roi_heads.mask_head"
    stages = _count(shapes, rf"{outputs}\.\d+\.cls_score")
    if stages:
        keys["MODEL.ROI_HEADS.NAME"] = "CascadeROIHeads"
        outputs += ".0"
    classes = shapes.get(f"{outputs}.cls_score.weight", (0,))[0] - 1
    if f"{outputs}.bbox_pred.weight" in shapes:
        deltas = shapes[f"{outputs}.bbox_pred.weight"][0]
        keys["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"] = deltas == 4 and (classes > 1 or stages > 0)
    if f"{head}.predictor.weight" in shapes:
        masks = shapes[f"{head}.predictor.weight"][0]
        keys["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK"] = masks == 1 and classes > 1
    if f"{head}.deconv.weight" in shapes:
        keys["MODEL.ROI_MASK_HEAD.NUM_CONV"] = _count(shapes, rf"{head}\.mask_fcn\d+")
        keys["MODEL.ROI_MASK_HEAD.CONV_DIM"] = shapes[f"{head}.deconv.weight"][1]
        keys["MODEL.ROI_MASK_HEAD.NORM"] = _norm(shapes, f"{head}.mask_fcn1")
    return keys


def _count(shapes: Shapes, layer: str) -> int:
    return sum(re.fullmatch(rf"{layer}\.weight", name) is not None for name in shapes)


def unspecified_keys_of(cfg: Config) -> dict[str, Any]:
    """Return the values of :data:`UNSPECIFIED` keys in a config, those of cascades only for a cascade."""
    is_cascade = cfg.model.roi_heads.name == "CascadeROIHeads"
    keys = [key for key in UNSPECIFIED if is_cascade or not is_below(key, ["MODEL.ROI_BOX_CASCADE_HEAD"])]
    return {key: value_at(cfg, key) for key in keys}


def unspecified_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the values of :data:`UNSPECIFIED` keys, as far as anything but the tensors implies them.

    The sources are the config of the file or of its entry in the zoo; otherwise the file's ``config_keys``,
    the settings of its norms, and the names of torchvision and tensorpack, whose RoIAlign is their own.
    """
    cfg = known_config(checkpoint)
    if cfg is not None:
        return unspecified_keys_of(cfg)
    keys: dict[str, Any] = {}
    translation = translate(checkpoint)
    pooler = {"torchvision": "ROIAlign", "tensorpack": "ROIAlignV2"}.get(translation.scheme)
    if pooler is not None and any(name.startswith(_RPN) for name in translation.tensors):
        for head in ("BOX", "MASK"):
            keys[f"MODEL.ROI_{head}_HEAD.POOLER_TYPE"] = pooler
            keys[f"MODEL.ROI_{head}_HEAD.POOLER_SAMPLING_RATIO"] = 2
    known = checkpoint.metadata.config_keys
    return keys | {key: known[key] for key in UNSPECIFIED if key in known} | _group_keys(checkpoint)


def norms_of_unspecified_groups(checkpoint: Checkpoint) -> list[str]:
    """Return the GroupNorms of a detector whose groups the file does not specify, by their names here."""
    tensors = translate(checkpoint).tensors
    if not any(name.startswith(_RPN) for name in tensors):
        return []
    known = norms_of(checkpoint, tensors).group_norm_groups
    norms = [name.removesuffix(".weight") for name in tensors if name.endswith(".norm.weight")]
    return [norm for norm in norms if norm not in known and f"{norm}.running_mean" not in tensors]


def _group_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    layers = {
        (checkpoint.tensors[f"{name}.weight"].numel(), groups)
        for name, groups in norms_of(checkpoint, checkpoint.tensors).group_norm_groups.items()
        if f"{name}.weight" in checkpoint.tensors
    }
    keys = group_keys(layers) if layers else None
    # Other norms have detectron2's groups, equal numbers, unless a config says otherwise.
    if keys is None or (keys[1] > 1 and norms_of_unspecified_groups(checkpoint)):
        return {}
    return {"MODEL.GN.NUM_GROUPS": keys[0], "MODEL.GN.MIN_CHANNELS_PER_GROUP": keys[1]}


def known_config(checkpoint: Checkpoint) -> Config | None:
    """Return the config of the checkpoint's entry in the zoo, or the one in the file; None without any."""
    entry = entry_of(checkpoint.path)
    if entry is not None:
        return load_config(entry.config, entry.overrides)
    try:
        return parse_config(checkpoint.metadata.config or "")
    except UserError:  # another program's
        return None


def library_config(checkpoint: Checkpoint) -> Config | None:
    """Return the config in a checkpoint if its backbone is a network of torchvision or timm."""
    if trunk_of(checkpoint.tensors) is None:
        return None
    cfg = known_config(checkpoint)
    return cfg if cfg is not None and cfg.model.backbone.name in LIBRARY_BACKBONES else None


def config_of_converted(cfg: Config, converted: Checkpoint, original: Checkpoint) -> str | None:
    """Return the config of a converted detector as YAML without local paths, for its metadata.

    Args:
        cfg: the config of the original.
        converted: weights, and metadata with the groups of the norms.
        original: weights of before. A library's network without BatchNorms among them has norms of its own,
            which are no part of a conversion.

    Returns:
        None where no config gives all norms their groups.
    """
    changes = _group_keys(converted)
    differs = any(value_at(cfg, key) != value for key, value in changes.items())
    if not changes or (differs and norms_of_unspecified_groups(converted)):
        return None
    for section in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        key = f"MODEL.{section}.NORM"
        if value_at(cfg, key) in ("BN", "SyncBN", "FrozenBN"):
            changes[key] = "GN"
    if any(name.endswith(".running_var") and trunk_of([name]) for name in original.tensors):
        changes["MODEL.BACKBONE.NORM"] = "GN"
    return dump_config(without_paths(cfg.replace(changes)))
