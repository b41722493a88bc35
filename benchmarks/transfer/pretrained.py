"""The paper's setting: a backbone that ImageNet trained, with new FPN and heads, fine-tuned on nuclei.

The backbone is MobileNetV2 with BatchNorm. It has not seen a nucleus, so both halves of the images share it,
and a cell's seed draws the new layers and the order of the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms.functional import five_crop, resize

from gn_detect import calibrate, convert_norm
from gn_detect.data import read_image
from gn_detect.weights import norm_settings, save_weights

MODEL = "mobilenet_v2"
WEIGHTS = Path("weights/mobilenet_v2_imagenet/mobilenet_v2_features_torchvision_keys.pth")

GROUPS, FEWEST_CHANNELS = 32, 16

CALIBRATION_STEPS = 150  # of 8 crops

KEYS: dict[str, Any] = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.NAME": "build_torchvision_fpn_backbone",
    "MODEL.BACKBONE.MODEL": MODEL,
    "MODEL.GN.NUM_GROUPS": GROUPS,
    "MODEL.GN.MIN_CHANNELS_PER_GROUP": FEWEST_CHANNELS,
}

NEW_LAYERS = ("MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")


@dataclass(frozen=True)
class Pretrained:
    """One way to fine-tune the backbone.

    Attributes:
        norm: of the backbone; ``keep`` is BatchNorm that is trained.
        heads: norm of FPN, box head and mask head; none with frozen BN, as in detectron2.
        start: of a backbone with GN. ``match`` needs no images, ``calibrate`` sees the training images
            without labels, and so does ``distil``, which leaves the channels' scales alone; ``reset`` is GN
            as initialised.
    """

    norm: Literal["FrozenBN", "keep", "GN"]
    heads: Literal["", "BN", "GN"]
    start: Literal["match", "calibrate", "distil", "reset"] = "match"

    def config_keys(self) -> dict[str, Any]:
        """Return the config keys in which this arm differs from the others."""
        return {"MODEL.BACKBONE.NORM": self.norm, **dict.fromkeys(NEW_LAYERS, self.heads)}


PRETRAINED = {
    "frozen BN": Pretrained("FrozenBN", ""),
    "frozen BN, GN in FPN and heads": Pretrained("FrozenBN", "GN"),
    "GN, matched": Pretrained("GN", "GN"),
    "GN, calibrated": Pretrained("GN", "GN", "calibrate"),
    "GN, distilled": Pretrained("GN", "GN", "distil"),
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
    images = "" if arm.start == "reset" else f"-{names[0].partition('.')[0]}-{len(names)}"
    target = work / "converted" / f"{MODEL}-{arm.start}{images}.pth"
    if not target.exists():
        network = torchvision.models.mobilenet_v2()
        network.classifier = nn.Identity()
        network.load_state_dict(torch.load(source, weights_only=True))
        init: Literal["reset", "match"] = "reset" if arm.start == "reset" else "match"
        converted, report = convert_norm(
            network, init=init, num_groups=GROUPS, min_channels_per_group=FEWEST_CHANNELS
        )
        if arm.start != "reset":
            crops = torch.cat([read_crops(data / "images" / name) for name in names])
            calibrate(
                network,
                converted,
                crops,
                CALIBRATION_STEPS,
                rescale=arm.start == "calibrate",
                report=report,
                progress=False,
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        save_weights(target, converted.state_dict(), norm_settings(converted))
    return target


def read_crops(path: Path) -> Tensor:
    """Return the corners and the centre of an image whose short side has 256 pixels: (5, 3, 224, 224)."""
    image = torch.from_numpy(read_image(path, "RGB").copy()).permute(2, 0, 1)
    resized = resize(image, [256], antialias=True).float()
    mean, std = (torch.tensor(KEYS[f"MODEL.PIXEL_{name}"]).view(3, 1, 1) for name in ("MEAN", "STD"))
    return torch.stack(five_crop((resized - mean) / std, [224, 224]))
