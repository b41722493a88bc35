"""Training steps of R-50-FPN on a GPU: graphs or none, GN and frozen BN, and torchvision's Mask R-CNN.

    python -m benchmarks.gpu_step                    # everything, some minutes; writes results/gpu-step.json
    python -m benchmarks.gpu_step --only step --images 2 --steps 20
    python -m benchmarks.gpu_step --size 64 96 --images 1 --steps 1 --device cpu       # does it run

Each case has a process of its own. A step goes from samples on the host to updated weights. The time is that
between the ends of two steps on the device, and the host may run ahead, as in training. Images, objects (32
corners each) and weights are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.step_trace import make_batch
from gn_detect.bench.step import describe_machine
from gn_detect.config import load_config
from gn_detect.engine.graphs import MOST_GRAPHS, StepGraphs
from gn_detect.engine.step import make_state, seed_iteration, train_step
from gn_detect.files import atomic_write_json
from gn_detect.modeling import build_model

RESULTS = Path(__file__).parent / "results" / "gpu-step.json"
MULTI_SCALE = (640, 672, 704, 736, 768, 800)
ASPECTS = ((4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (1, 1))  # width to height, of COCO's images
HEADS = {"MODEL.ROI_BOX_HEAD.NORM": "GN", "MODEL.ROI_MASK_HEAD.NORM": "GN", "MODEL.FPN.NORM": "GN"}
KINDS = {
    "GN": {"MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.STRIDE_IN_1X1": False, **HEADS},
    "frozen BN": {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.RESNETS.STRIDE_IN_1X1": False, **HEADS},
}


def our_steps(case: dict[str, Any]) -> tuple[Callable[[int], None], StepGraphs | None]:
    """Return a function that does step i, and the graphs."""
    cfg = load_config("Base-RCNN-FPN.yaml").replace(
        {
            "MODEL.MASK_ON": True,
            "MODEL.WEIGHTS": "",
            "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
            "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
            "MODEL.DEVICE": case["device"],
            "SOLVER.AMP.ENABLED": case["dtype"] == "bf16",
            "SOLVER.AMP.DTYPE": "bfloat16",
            "SOLVER.CUDA_GRAPHS": case["graphs"],
            "SOLVER.BASE_LR": 1e-4,
            "MODEL.CHANNELS_LAST": case.get("channels_last", False),
            **KINDS[case["norm"]],
        }
    )
    torch.manual_seed(0)
    model = build_model(cfg).to(case["device"]).train()
    state = make_state(cfg, model)
    batches = [make_batch([7] * case["images"], case["size"], 80, seed=seed) for seed in range(4)]

    def step(number: int) -> None:
        seed_iteration(0, number, 0)
        train_step(cfg, model, batches[number % 4], state)

    return step, state.graphs


def torchvision_steps(case: dict[str, Any]) -> Callable[[int], None]:
    """Return the same for torchvision's best Mask R-CNN R-50-FPN, whose norms are BatchNorm and GN-free."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    from gn_detect.ops import rasterize_polygons

    height, width = case["size"]
    model = maskrcnn_resnet50_fpn_v2(
        weights=None,
        weights_backbone=None,
        num_classes=81,
        min_size=min(height, width),
        max_size=max(height, width),
    )
    model = model.to(case["device"]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    batches = []
    for seed in range(4):
        samples = make_batch([7] * case["images"], (height, width), 80, seed=seed)
        targets = []
        for sample in samples:
            target: Any = sample.target
            drawn = np.stack([rasterize_polygons(mask, height, width) for mask in target.masks])
            masks = torch.from_numpy(drawn).byte()
            targets.append({"boxes": target.boxes, "labels": target.labels + 1, "masks": masks})
        batches.append(([sample.image.float() / 255 for sample in samples], targets))

    def step(number: int) -> None:
        images, targets = batches[number % 4]
        images = [image.to(case["device"], non_blocking=True) for image in images]
        moved = [
            {k: v.to(case["device"], non_blocking=True) for k, v in target.items()} for target in targets
        ]
        device = torch.device(case["device"]).type
        with torch.autocast(device, torch.bfloat16, enabled=case["dtype"] == "bf16"):
            losses = model(images, moved)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return step


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case with its times in milliseconds, and peak memory in bytes."""
    device = torch.device(case["device"])
    graphs = None
    if case["norm"] == "torchvision":
        step = torchvision_steps(case)
    else:
        step, graphs = our_steps(case)
    for number in range(case["warmup"]):
        step(number)
    ends: list[Any] = []
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for number in range(case["steps"] + 1):
        step(number)
        if device.type == "cuda":
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        else:
            ends.append(time.perf_counter())
    launched = (time.perf_counter() - begin) / (case["steps"] + 1)
    if device.type == "cuda":
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in pairwise(ends)]
        peak = torch.cuda.max_memory_reserved()  # a graph's pool counts, too
    else:
        times, peak = [1e3 * (b - a) for a, b in pairwise(ends)], 0
    ordered = sorted(times)
    found = {
        "ms": round(statistics.median(times), 2),
        "host_ms": round(1e3 * launched, 2),
        "peak_bytes": peak,
    }
    found["quartiles_ms"] = [round(ordered[len(ordered) // 4], 2), round(ordered[3 * len(ordered) // 4], 2)]
    found["images_per_second"] = round(1e3 * case["images"] / found["ms"], 1)
    if graphs is not None:
        found["graphs"] = {"replays": graphs.replays, "runs": graphs.runs, "failure": graphs.failure}
    return case | found


def hit_rate(iterations: int = 2000, images: int = 2, limit: int = MOST_GRAPHS) -> dict[str, Any]:
    """Return the share of a multi-scale schedule's steps that find a graph, by the rule of StepGraphs."""
    random = np.random.default_rng(0)
    kept: list[tuple[int, int]] = []
    seen, hits = set(), 0
    for _ in range(iterations):
        sizes = []
        wide = random.random() < 0.7  # batches hold images of one orientation
        for _ in range(images):
            choice = [a for a in ASPECTS if (a[0] >= a[1]) == wide]
            w, h = choice[random.integers(len(choice))]
            short = MULTI_SCALE[random.integers(len(MULTI_SCALE))]
            scale = min(short / min(w, h), 1333 / max(w, h))
            sizes.append((h * scale, w * scale))
        height, width = (32 * int(np.ceil(max(size[i] for size in sizes) / 32)) for i in (0, 1))
        shape = height, width
        if shape in kept:
            hits += 1
            kept.remove(shape)
        elif shape not in seen:
            seen.add(shape)
            continue
        kept = [*kept, shape][-limit:]
    return {"iterations": iterations, "shapes": len(seen), "graphs": limit, "hits": hits / iterations}


def cases(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what to measure."""
    base = {"device": arguments.device, "size": arguments.size, "steps": arguments.steps}
    for dtype in arguments.dtypes:
        for images in arguments.images:
            common = {**base, "images": images, "dtype": dtype}
            for norm in KINDS:
                for graphs in (False, True) if arguments.device == "cuda" else (False,):
                    yield {**common, "norm": norm, "graphs": graphs, "warmup": 8 if graphs else 4}
            if arguments.device == "cuda":
                yield {**common, "norm": "GN", "graphs": True, "warmup": 8, "channels_last": True}
            yield {**common, "norm": "torchvision", "graphs": False, "warmup": 4}


def norms(arguments: argparse.Namespace) -> None:
    """Measure each norm, with ``torch.compile``'s as a further rival."""
    output = RESULTS.with_name("norms-gpu.json")
    command = [sys.executable, "-m", "gn_detect", "bench", "norm", "--steps", "0", "--images", "2"]
    subprocess.run([*command, "--output", str(output)], check=True)


def main() -> None:
    """Measure all cases, and write them after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("step", "norms"), help="a part of it")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("H", "W"))
    parser.add_argument("--images", type=int, nargs="+", default=[2, 1, 4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(json.loads(arguments.case))))
        return
    if arguments.only != "norms":
        found: list[dict[str, Any]] = []
        for case in cases(arguments):
            command = [sys.executable, "-m", "benchmarks.gpu_step", "--case", json.dumps(case)]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = done.stdout.splitlines() if done.returncode == 0 else []
            found.append(json.loads(lines[-1]) if lines else {**case, "failed": done.stderr.strip()[-300:]})
            print(json.dumps(found[-1]), flush=True)
            machine = describe_machine(torch.device(arguments.device))
            atomic_write_json(arguments.output, {"machine": machine, "hit_rate": hit_rate(), "steps": found})
    if arguments.only != "step":
        norms(arguments)


if __name__ == "__main__":
    main()
