"""Detectors with deformable convolutions whose weights are formulas, as those of :mod:`.cascade_case`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from . import cascade_case

R50 = cascade_case.KEYS | {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True],
    "MODEL.FPN.NORM": "",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False,
}
X152 = R50 | {
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NUM_GROUPS": 4,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 8,
}
CASES = {
    "R-50": R50,
    "X-152's recipe": X152,
    "modulated": R50 | {"MODEL.RESNETS.DEFORM_MODULATED": True, "MODEL.RESNETS.DEFORM_NUM_GROUPS": 2},
}


def values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return tensors of the given shapes, by detectron2's names; offsets are some cells."""
    found = cascade_case.values(shapes)
    for name, value in found.items():
        if name.endswith("running_var"):
            value += 1
        elif name.endswith(("conv3.norm.weight", "bbox_pred.weight")):  # or they grow without bound
            value *= 0.3
    return found
