"""The arms of the study: which norms a detector is fine-tuned with, and how it got them.

All sources have BatchNorm in backbone, FPN and heads. A frozen BatchNorm is a convolution's scale and bias,
so *frozen BN* in FPN and heads is a detector without norms there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

PARTS = {
    "backbone": ("MODEL.RESNETS.NORM", "backbone.bottom_up.*"),
    "FPN": ("MODEL.FPN.NORM", "backbone.fpn_*"),
    "box head": ("MODEL.ROI_BOX_HEAD.NORM", "roi_heads.box_head.*"),
    "mask head": ("MODEL.ROI_MASK_HEAD.NORM", "roi_heads.mask_head.*"),
}
"""Key of each part's norm, and the pattern of its norms' names."""

HEADS = ("FPN", "box head", "mask head")

Start = Literal["match", "balance", "calibrate", "distil", "reset"]


@dataclass(frozen=True)
class Conversion:
    """The conversion of a source to a detector with GN in some parts.

    Attributes:
        parts: with GN; the others keep their BatchNorm.
        start: ``match`` needs no images, ``balance`` adds the first part of a calibration, ``calibrate`` the
            whole, ``distil`` the whole without the first part; ``reset`` is GN as initialised.
        groups: at most, and the fewest channels in one: of ``convert_norm``.
        relative_eps: of ``convert_norm``.
    """

    parts: tuple[str, ...] = tuple(PARTS)
    start: Start = "match"
    groups: tuple[int, int] = (32, 16)
    relative_eps: float = 0.0

    @property
    def name(self) -> str:
        """Name of its file, apart from the ending."""
        parts = "all" if self.parts == tuple(PARTS) else "+".join(self.parts).replace(" ", "_")
        eps = f"-eps{self.relative_eps:g}" if self.relative_eps else ""
        return f"{self.start}-{parts}-{self.groups[0]}x{self.groups[1]}{eps}"


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        norm: of the parts that ``conversion`` leaves.
        conversion: None keeps BatchNorm everywhere.
        scaled_gradients: multiply each balanced channel's gradient by the square of its scale, so that its
            rate is as before balancing.
        annealed: part of the iterations over which GN's statistics replace BatchNorm's expected ones.
        distilled: part of the iterations over which the frozen original's FPN features are a second target,
            with a weight that falls to 0.
    """

    norm: Literal["FrozenBN", "BN"] = "FrozenBN"
    conversion: Conversion | None = None
    scaled_gradients: bool = False
    annealed: float = 0.0
    distilled: float = 0.0

    def config_keys(self) -> dict[str, Any]:
        """Return the config keys in which this arm differs from the others."""
        converted = () if self.conversion is None else self.conversion.parts
        found: dict[str, Any] = {key: self.norm for key, _ in PARTS.values()}
        found |= {PARTS[part][0]: "GN" for part in converted}
        if self.conversion is not None:
            most, fewest = self.conversion.groups
            found |= {"MODEL.GN.NUM_GROUPS": most, "MODEL.GN.MIN_CHANNELS_PER_GROUP": fewest}
        return found


MATCHED = Arm(conversion=Conversion())
CALIBRATED = Arm(conversion=Conversion(start="calibrate"))
DISTILLED = Arm(conversion=Conversion(start="distil"))

ARMS = {
    "frozen BN": Arm(),
    "GN, matched": MATCHED,
    "GN, distilled": DISTILLED,
    "GN, calibrated": CALIBRATED,
    "GN, fresh": Arm(conversion=Conversion(start="reset")),
    "live BN": Arm(norm="BN"),
    "GN in the backbone": Arm(conversion=Conversion(("backbone",), "distil")),
    "frozen BN, GN in FPN and heads": Arm(conversion=Conversion(HEADS, "distil")),
}
"""The arms of the final protocol. A converted GN against the last is the paper's comparison."""

CAUSES = {
    "GN, balanced": replace(MATCHED, conversion=Conversion(start="balance")),
    "GN, balanced, scaled gradients": replace(
        MATCHED, conversion=Conversion(start="balance"), scaled_gradients=True
    ),
    "GN, calibrated, scaled gradients": replace(CALIBRATED, scaled_gradients=True),
    "GN, matched, annealed": replace(MATCHED, annealed=0.5),
    "GN, calibrated, distilled": replace(CALIBRATED, distilled=0.3),
    "GN, calibrated, relative eps": replace(
        CALIBRATED, conversion=Conversion(start="calibrate", relative_eps=0.3)
    ),
    "GN, matched, relative eps": replace(MATCHED, conversion=Conversion(relative_eps=0.3)),
    "GN, matched, one group": replace(MATCHED, conversion=Conversion(groups=(1, 16))),
    "GN, matched, 32 groups": replace(MATCHED, conversion=Conversion(groups=(32, 1))),
    "GN in the backbone, matched": Arm(conversion=Conversion(("backbone",))),
    "GN in FPN and heads, matched": Arm(conversion=Conversion(HEADS)),
}
"""Arms that search, on development folds, for the cause of a slower start of a converted GN."""
