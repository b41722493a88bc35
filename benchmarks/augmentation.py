"""``python -m benchmarks.augmentation``: what augmentation adds, on nuclei and on photos of one person.

The nuclei recipe starts from random weights, 300 iterations of 2 images. The photos are few: their detector
has the backbone of an ImageNet classifier (MobileNetV2 with frozen BatchNorm), 600 iterations. Every training
is recorded as it ends, and a later call goes on from there; ``--only nuclei`` leaves the photos out.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from benchmarks.systems import CONFIG, REPOSITORY, run

SHARED = REPOSITORY.parent / "shared"
PHOTOS = SHARED / "data" / "coco_person1"
PERSONS: dict[str, Any] = {
    "DATASETS.REGISTER": {
        f"person_{part}": {
            "ANNOTATIONS": str(PHOTOS / "annotations" / f"instances_{part}.json"),
            "IMAGES": str(PHOTOS / "images"),
        }
        for part in ("train", "val")
    },
    "DATASETS.TRAIN": ["person_train"],
    "DATASETS.TEST": ["person_val"],
    "MODEL.WEIGHTS": str(SHARED / "weights/mobilenet_v2_imagenet/mobilenet_v2_features_torchvision_keys.pth"),
    "MODEL.BACKBONE.NAME": "build_torchvision_fpn_backbone",
    "MODEL.BACKBONE.MODEL": "mobilenet_v2",
    "MODEL.BACKBONE.NORM": "FrozenBN",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
    "INPUT.FORMAT": "RGB",
    "SOLVER.MAX_ITER": 600,
    "SOLVER.STEPS": [420, 540],
}
DATA: dict[str, dict[str, Any]] = {"nuclei": {}, "photos of a person": PERSONS}
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "flips alone": {},
    "copy-paste of half of the images": {"INPUT.COPY_PASTE": 0.5},
    "colours": {"INPUT.COLOR_JITTER.ENABLED": True},
    "affine maps": {"INPUT.AFFINE.ENABLED": True},
    "affine maps and turns by 90 degrees": {"INPUT.AFFINE.ENABLED": True, "INPUT.ROTATE_90": True},
}
ARMS = {
    f"{data}, {name}": {"MODEL.DEVICE": "cpu", **keys, **added}
    for (data, keys), (name, added) in product(DATA.items(), AUGMENTATIONS.items())
}


if __name__ == "__main__":
    run("augmentation", CONFIG, ARMS, str(__doc__))
