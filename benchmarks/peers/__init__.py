"""The nuclei recipe in gn_detect and in other libraries, side by side."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data" / "dsb2018"
TRAIN, VAL = (DATA / "annotations" / f"instances_{part}.json" for part in ("train", "val"))
IMAGES = DATA / "images"

CONFIG = REPOSITORY / "configs" / "quick" / "nuclei_r18_gn.yaml"
ITERATIONS, PERIOD = 300, 50  # of the recipe; a checkpoint is evaluated after each period
