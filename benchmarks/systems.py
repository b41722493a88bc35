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
    args = parser("systems", str(__doc__)).parse_args()
    run("systems", {arm: {**NARROW, **keys} for arm, keys in ARMS.items()}, args)


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command that runs trainings."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--hours", type=float, default=2.0, help="after which no training is begun")
    found.add_argument("--only", default="", help="part of an arm's name")
    found.add_argument("--iterations", type=int, help="of a trial; its results are printed, not recorded")
    return found


def run(topic: str, arms: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Train each arm with each seed, and record the result in ``results/TOPIC.json`` as it ends."""
    path, end = REPOSITORY / "benchmarks" / "results" / f"{topic}.json", time.monotonic() + args.hours * 3600
    for seed, arm in product(range(1, args.seeds + 1), arms):
        key, keys = f"{arm}, seed {seed}", {**arms[arm], "SEED": seed}
        done = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if key in done or args.only not in arm:
            continue
        if time.monotonic() > end:
            print("the time is over; the same command continues")
            return
        if args.iterations:
            keys |= {"SOLVER.MAX_ITER": args.iterations, "SOLVER.STEPS": []}
        # A process for each: its peak of memory is its own.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(measure, keys).result()
        if not args.iterations:
            atomic_write_json(path, done | {key: found}, indent=1)
        print(f"{key}: {found}", flush=True)


def measure(keys: dict[str, Any]) -> dict[str, Any]:
    """Train the recipe with further keys; return AP in percent, seconds of an iteration, and MiB.

    With evaluations in between, ``curve`` has the iterations and the mask AP of each.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(CONFIG).replace({**keys, "OUTPUT_DIR": folder})
        between = cfg.test.eval_period > 0
        begin = time.process_time()
        train(cfg if between else cfg.replace({"DATASETS.TEST": []}))
        found: dict[str, Any] = {"seconds": round((time.process_time() - begin) / cfg.solver.max_iter, 3)}
        lines = [
            json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()
        ]
        found["memory"] = max(round(line["memory_mb"]) for line in lines if "memory_mb" in line)
        if between:
            ap = "segm/AP"
            found["curve"] = [[line["iteration"] + 1, round(line[ap], 2)] for line in lines if ap in line]
        results = evaluate(cfg.replace({"MODEL.WEIGHTS": str(Path(folder) / "model_final.pth")}))
        for kind, row in results.items():
            if "AP" in row:
                found[kind] = round(row["AP"], 2)
                found |= {f"{kind}, {name[3:]}": round(v, 2) for name, v in row.items() if name[:3] == "AP-"}
    return found


if __name__ == "__main__":
    main()
