"""The nuclei detector, ResNet-18-FPN with one norm everywhere, from random weights.

As in the paper, the number of images that are seen is the same for all, and the learning rate is proportional
to the images of an update, here those of one worker.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from gn_detect import load_config
from gn_detect.engine import train
from gn_detect.errors import Diverged

from .cells import Cell

CONFIG = Path(__file__).parents[2] / "configs" / "quick" / "nuclei_r18_gn.yaml"

NORMS = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")

LEARNING_RATE = 0.005
"""For each image of an update; the config's 0.01 is for 2."""

IMAGES, QUICK_IMAGES = 1200, 32

EVERY_CHANNEL = 1 << 16
"""More groups than any layer has channels, so that the size of the groups decides."""


def average_precisions(cell: Cell, shared: Path, quick: bool) -> dict[str, float]:
    """Train and measure: AP, AP50, AP75 and AP by size, as ``box AP``, ``mask AP50``, in percent.

    Of a training that diverges AP, AP50 and AP75 are 0, and ``diverged`` is 1.
    """
    updates = (QUICK_IMAGES if quick else IMAGES) // cell.batch
    data = shared / "data" / "dsb2018"
    keys: list[object] = [key for norm in NORMS for key in (norm, cell.norm)]
    if cell.groups:
        keys += ["MODEL.GN.NUM_GROUPS", cell.groups]
    if cell.group_size:
        keys += ["MODEL.GN.NUM_GROUPS", EVERY_CHANNEL, "MODEL.GN.MIN_CHANNELS_PER_GROUP", cell.group_size]
    keys += ["SOLVER.IMS_PER_BATCH", cell.batch]
    keys += ["SOLVER.BASE_LR", LEARNING_RATE * cell.batch, "SOLVER.MAX_ITER", updates, "SEED", cell.seed]
    keys += ["SOLVER.WARMUP_ITERS", updates // 6]
    keys += ["SOLVER.STEPS", sorted({updates * 7 // 10, updates * 9 // 10})]
    keys += ["SOLVER.NON_FINITE", "skip", "MODEL.DEVICE", "cpu"]
    registered = {
        f"nuclei_{part}": {
            "ANNOTATIONS": str(data / "annotations" / f"instances_{part}.json"),
            "IMAGES": str(data / "images"),
        }
        for part in ("train", "val")
    }
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(CONFIG, [str(key) for key in keys])
        try:
            results = train(cfg.replace({"DATASETS.REGISTER": registered, "OUTPUT_DIR": folder}))
        except Diverged:
            nothing = {f"{kind} {key}": 0.0 for kind in ("box", "mask") for key in ("AP", "AP50", "AP75")}
            return {**nothing, "diverged": 1.0}
    kinds = {"bbox": "box", "segm": "mask"}
    return {f"{name} {key}": value for kind, name in kinds.items() for key, value in results[kind].items()}
