"""The paper's setting: a backbone that ImageNet trained, with new FPN and heads, fine-tuned on nuclei.

The backbone is MobileNetV2 with BatchNorm. It has not seen a nucleus, so both halves of the images share it,
and a cell's seed draws the new layers and the order of the images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision

from gn_detect import convert_checkpoint, convert_norm
from gn_detect.weights import norm_settings, save_weights

MODEL = "mobilenet_v2"
WEIGHTS = Path("weights/mobilenet_v2_imagenet/mobilenet_v2_features_torchvision_keys.pth")

GROUPS = {"num_groups": 32, "min_channels_per_group": 16}

KEYS: dict[str, Any] = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.NAME": "build_torchvision_fpn_backbone",
    "MODEL.BACKBONE.MODEL": MODEL,
    "MODEL.GN.NUM_GROUPS": GROUPS["num_groups"],
    "MODEL.GN.MIN_CHANNELS_PER_GROUP": GROUPS["min_channels_per_group"],
}

NEW_LAYERS = ("MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")


@dataclass(frozen=True)
class Pretrained:
    """One way to fine-tune the backbone.

    Attributes:
        norm: of the backbone; ``keep`` is BatchNorm that is trained.
        heads: norm of FPN, box head and mask head; none beside detectron2's frozen BN.
        start: of a backbone with GN. ``match`` needs no images, ``calibrate`` sees the training images
            without labels, ``reset`` is GN as initialised.
    """

    norm: Literal["FrozenBN", "keep", "GN"]
    heads: Literal["", "BN", "GN"]
    start: Literal["match", "calibrate", "reset"] = "match"

    def config_keys(self) -> dict[str, Any]:
        """Return the config keys in which this arm differs from the others."""
        return {"MODEL.BACKBONE.NORM": self.norm, **dict.fromkeys(NEW_LAYERS, self.heads)}


PRETRAINED = {
    "frozen BN": Pretrained("FrozenBN", ""),
    "frozen BN, GN in FPN and heads": Pretrained("FrozenBN", "GN"),
    "GN, matched": Pretrained("GN", "GN"),
    "GN, calibrated": Pretrained("GN", "GN", "calibrate"),
    "GN, fresh": Pretrained("GN", "GN", "reset"),
    "live BN": Pretrained("keep", "BN"),
    "GN in the backbone": Pretrained("GN", "", "calibrate"),
}
"""``GN, calibrated`` against the first is the paper's comparison, against the second one of backbones."""


def start_weights(data: Path, work: Path, names: Sequence[str], arm: Pretrained) -> Path:
    """Return the file that an arm is fine-tuned from, made if it is not there.

    Args:
        data: folder of dsb2018.
        work: folder of checkpoints.
        names: of the training images.
    """
    source = data.parents[1] / WEIGHTS
    if arm.norm != "GN" or arm.start == "match":
        return source
    if arm.start == "reset":
        target = work / "converted" / f"{MODEL}-reset.pth"
        if not target.exists():
            network = torchvision.models.mobilenet_v2()
            network.load_state_dict(torch.load(source, weights_only=True), strict=False)
            network, _ = convert_norm(network, init="reset", **GROUPS)
            target.parent.mkdir(parents=True, exist_ok=True)
            save_weights(target, network.state_dict(), norm_settings(network))
        return target
    target = work / "converted" / f"{MODEL}-{names[0].partition('.')[0]}-{len(names)}.pth"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                (Path(folder) / name).symlink_to((data / "images" / name).resolve())
            convert_checkpoint(MODEL, target, folder, weights=source, relative_eps=0.0, **GROUPS)
    return target
