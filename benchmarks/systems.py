"""``python -m benchmarks.systems``: what the parts of strong GN detectors add to a small one on the nuclei.

Each arm is the nuclei recipe with a narrow ResNet-50 (deformable convolution needs bottlenecks), from random
weights: 300 iterations of 2 images. Seconds are those of the processor, of one thread: other work on the
machine changes them little. Every training is recorded as it ends, and a later call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

from gn_detect import evaluate, load_config, train
from gn_detect.files import atomic_write_json

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "systems.json"
CONFIG = REPOSITORY / "configs" / "quick" / "nuclei_r18_gn.yaml"

NARROW = {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.WIDTH_PER_GROUP": 32, "MODEL.DEVICE": "cpu"}
CONVS = ("MODEL.RESNETS.CONV", "MODEL.FPN.CONV", "MODEL.ROI_BOX_HEAD.CONV", "MODEL.ROI_MASK_HEAD.CONV")
AUGMENTED = "GN, test-time augmentation"
ARMS: dict[str, dict[str, Any]] = {
    "GN": {
        "TEST.AUG.ENABLED": True,
        "TEST.AUG.MIN_SIZES": [192, 256, 320],
        "TEST.AUG.MAX_SIZE": 480,
    },
    "GN and Weight Standardization": dict.fromkeys(CONVS, "WS"),
    "GN, cascade": {
        "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    },
    "GN, deformable res3 to res5": {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True]},
}


def main() -> None:
    """Run the trainings that have no result yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.systems", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hours", type=float, default=2.0, help="after which no training is begun")
    parser.add_argument("--only", default="", help="part of an arm's name")
    args = parser.parse_args()
    end = time.monotonic() + args.hours * 3600
    for seed, arm in product(range(1, args.seeds + 1), ARMS):
        key = f"{arm}, seed {seed}"
        if key in read() or args.only not in arm:
            continue
        if time.monotonic() > end:
            print("the time is over; the same command continues")
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            1, mp_context=context
        ) as pool:  # a process each: its peak of memory is its own
            found = pool.submit(measure, arm, seed).result()
        atomic_write_json(RESULTS, read() | {key: found}, indent=1)
        print(f"{key}: {found}", flush=True)


def measure(arm: str, seed: int) -> dict[str, Any]:
    """Train an arm, and return AP in percent, seconds of an iteration and of an image, and MiB."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        keys = {**NARROW, **ARMS[arm], "SEED": seed, "OUTPUT_DIR": folder, "DATASETS.TEST": []}
        cfg = load_config(CONFIG).replace(keys)
        begin = time.process_time()
        train(cfg)
        found: dict[str, Any] = {"seconds": round((time.process_time() - begin) / cfg.solver.max_iter, 3)}
        lines = (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()
        found["memory"] = round(json.loads(lines[-1])["memory_mb"])
        weights = str(Path(folder) / "model_final.pth")
        tested = cfg.replace({"MODEL.WEIGHTS": weights, "DATASETS.TEST": ["nuclei_val"]})
        results = evaluate(tested)
    return found | {kind: round(row["AP"], 2) for kind, row in results.items() if "AP" in row}


def read() -> dict[str, Any]:
    """Return the records so far."""
    found: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return found


if __name__ == "__main__":
    main()
