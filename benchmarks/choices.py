"""``python -m benchmarks.choices TOPIC``: what the choices for own data change, also where they do not help.

All run the nuclei recipe from random weights, 300 iterations of 2 images, where nothing else is said:

- ``augmentation``: also on photos of persons, which are few (the backbone is ImageNet's MobileNetV2 with
  frozen BatchNorm, 600 iterations);
- ``imbalance``: fluorescent and stained nuclei are two classes, the second with a quarter of the objects;
- ``freezing``: parts of ImageNet's MobileNetV2, converted to GN, are frozen or get a lower rate, 450
  iterations of 1 image;
- ``stopping``: five times the recipe's iterations, tested every 100.

Every training is recorded as it ends, and a later call goes on from there.
"""

from __future__ import annotations

import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.systems import REPOSITORY, parser, run
from benchmarks.transfer import pretrained
from benchmarks.transfer.data import STAINED
from benchmarks.transfer.training import schedule_keys

SHARED = REPOSITORY.parent / "shared"
NUCLEI, PHOTOS = SHARED / "data" / "dsb2018", SHARED / "data" / "coco_person1"
IMAGENET: dict[str, Any] = {**pretrained.KEYS, "MODEL.WEIGHTS": str(SHARED / pretrained.WEIGHTS)}
GN = {"MODEL.BACKBONE.NORM": "GN", **dict.fromkeys(pretrained.NEW_LAYERS, "GN")}


def datasets(annotations: Path, images: Path) -> dict[str, Any]:
    """Return the keys of the datasets ``instances_train.json`` and ``instances_val.json``."""
    registered = {
        f"chosen_{part}": {"ANNOTATIONS": str(annotations / f"instances_{part}.json"), "IMAGES": str(images)}
        for part in ("train", "val")
    }
    names = {"DATASETS.TRAIN": ["chosen_train"], "DATASETS.TEST": ["chosen_val"]}
    return {"DATASETS.REGISTER": registered, **names}


def augmentation() -> dict[str, dict[str, Any]]:
    """Return the arms: each kind of augmentation on nuclei, then on photos of persons."""
    photos = {
        **datasets(PHOTOS / "annotations", PHOTOS / "images"),
        **IMAGENET,
        "MODEL.BACKBONE.NORM": "FrozenBN",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
        "SOLVER.MAX_ITER": 600,
        "SOLVER.STEPS": [420, 540],
    }
    kinds: dict[str, dict[str, Any]] = {
        "flips alone": {},
        "copy-paste of half of the images": {"INPUT.COPY_PASTE": 0.5},
        "colours": {"INPUT.COLOR_JITTER.ENABLED": True},
        "affine maps": {"INPUT.AFFINE.ENABLED": True},
        "affine maps and turns by 90 degrees": {"INPUT.AFFINE.ENABLED": True, "INPUT.ROTATE_90": True},
    }
    data: dict[str, dict[str, Any]] = {"nuclei": {}, "photos of persons": photos}
    return {f"{d}, {k}": {**data[d], **kinds[k]} for d, k in product(data, kinds)}


def imbalance(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the arms; write the annotations of both classes into ``folder``."""
    for part in ("train", "val"):
        content = json.loads((NUCLEI / "annotations" / f"instances_{part}.json").read_text("utf-8"))
        stained = {image["id"] for image in content["images"] if image["modality"] == STAINED}
        for annotation in content["annotations"]:
            annotation["category_id"] = 1 + (annotation["image_id"] in stained)
        content["categories"] = [{"id": 1, "name": "fluorescent"}, {"id": 2, "name": "stained"}]
        (folder / f"instances_{part}.json").write_text(json.dumps(content), "utf-8")
    base = {**datasets(folder, NUCLEI / "images"), "MODEL.ROI_HEADS.NUM_CLASSES": 2}
    weights = {"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS": "auto"}
    repeated = {
        "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD": 0.5,
    }
    arms: dict[str, dict[str, Any]] = {"nothing": {}, "class weights": weights, "repeated images": repeated}
    return {arm: {**base, **keys} for arm, keys in arms.items()}


def freezing() -> dict[str, dict[str, Any]]:
    """Return the arms, from nothing frozen to the whole backbone."""
    backbone = "backbone.bottom_up"
    arms: dict[str, dict[str, Any]] = {
        "all trained": {},
        "backbone at 0.3 of the rate": {"SOLVER.LR_MULTIPLIERS": {backbone: 0.3}},
        "backbone at 0.1 of the rate": {"SOLVER.LR_MULTIPLIERS": {backbone: 0.1}},
        "first two stages frozen": {"MODEL.BACKBONE.FREEZE_AT": 2},
        "backbone frozen": {"MODEL.FREEZE": [backbone]},
    }
    base = {**IMAGENET, **GN, **schedule_keys(1, 0.0075, 450, 1)}
    return {arm: {**base, **keys} for arm, keys in arms.items()}


def stopping() -> dict[str, dict[str, Any]]:
    """Return the one arm: where a patience would end it follows from its curve."""
    return {"long": {"SOLVER.MAX_ITER": 1500, "SOLVER.STEPS": [1050, 1350], "TEST.EVAL_PERIOD": 100}}


def main() -> None:
    """Run the trainings of a topic that have no result yet."""
    found = parser("choices", str(__doc__))
    found.add_argument("topic", choices=("augmentation", "imbalance", "freezing", "stopping"))
    args = found.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arms = {
            "augmentation": augmentation,
            "imbalance": lambda: imbalance(Path(folder)),
            "freezing": freezing,
            "stopping": stopping,
        }[args.topic]()
        run(args.topic, {arm: {"MODEL.DEVICE": "cpu", **keys} for arm, keys in arms.items()}, args)


if __name__ == "__main__":
    main()
