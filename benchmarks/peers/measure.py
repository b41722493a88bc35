"""One training and one evaluation, each for a process of its own."""

from __future__ import annotations

import platform
import resource
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import IMAGES, VAL


def measure(name: str, folder: Path, seed: int, iterations: int, model: str) -> dict[str, Any]:
    """Train; return the seconds of each step since the first, the peak of memory in MiB and the versions."""
    torch.set_num_threads(1)
    ends: list[float] = []
    register_optimizer_step_post_hook(lambda *_: ends.append(time.process_time()))
    import_module(f".with_{name}", __package__).train(folder, seed, iterations, model)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB on Linux
    versions = {package: version(package) for package in dict.fromkeys((name, "torch", "torchvision"))}
    return {
        "memory": round(peak),
        "versions": {"Python": platform.python_version(), **versions},
        "seconds": [round(end - ends[0], 2) for end in ends],
    }


def evaluate(name: str, checkpoint: Path, model: str) -> dict[str, float]:
    """Return box and mask AP of a checkpoint in percent."""
    torch.set_num_threads(1)
    truth = COCO(str(VAL))
    images = {key: IMAGES / truth.imgs[key]["file_name"] for key in truth.imgs}
    peer = import_module(f".with_{name}", __package__)
    entries = list(peer.predict(checkpoint, images, model))
    found = {}
    for kind in ("bbox", "segm"):
        if not entries:
            found[kind] = 0.0
            continue
        evaluation = COCOeval(truth, truth.loadRes(entries), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        found[kind] = round(100 * float(evaluation.stats[0]), 2)
    return found
