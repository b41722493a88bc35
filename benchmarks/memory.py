"""``python -m benchmarks.memory``: memory of a long training and a large evaluation, as curves and figures.

Each part runs in a process of its own, which is watched from outside together with its loader workers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pycocotools.mask as coco_mask
import torch
import yaml

from gn_detect import train
from gn_detect.config import load_config
from gn_detect.evaluation import evaluate_kinds
from gn_detect.evaluation.backends import choose_backend
from gn_detect.evaluation.results_file import ResultsWriter
from gn_detect.files import atomic_write, atomic_write_text
from tests.engine.tiny import TINY, make_dataset

MEGABYTE = 1 << 20
SETTLED = 0.2
"""Part of a training after which a slope is fitted."""

HEIGHT, WIDTH, CATEGORIES, SHAPES, OBJECTS = 480, 640, 80, 96, 7


@dataclass
class Curve:
    """One process: progress (iterations or seconds), resident and private megabytes."""

    progress: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    private: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, dict[str, list[float]]]:
        """Return the peak for ``benchmarks/results``."""
        return {"peak resident, MB": {"runs": [round(max(self.resident))]}}

    def slope(self, which: str) -> float:
        """Kilobytes for each iteration, once it has settled, and before the workers end."""
        x, y = np.array(self.progress), np.array(getattr(self, which))
        late = (x > SETTLED * x.max()) & (x < x.max())
        return float(np.polyfit(x[late], y[late], 1)[0] * 1024)


def main() -> None:
    """Run both parts, write the figures, draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["train", "evaluate"], help="run it here, unwatched")
    parser.add_argument("--folder", type=Path, help="of a part")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--records", type=int, default=20_000, help="images in the training set")
    parser.add_argument("--images", type=int, default=5000, help="in the evaluation")
    parser.add_argument("--masks", type=int, default=100, help="detections in each of them")
    parser.add_argument("--picture", type=Path, default=Path("benchmarks/memory.png"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.part == "train":
        train_long(args.folder, args.iterations, args.records)
    elif args.part == "evaluate":
        evaluate_many(args.folder, args.images, args.masks)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(args, Path(folder))


def train_long(folder: Path, iterations: int, records: int) -> None:
    """A tiny model on tiny pictures, but with the records of a large dataset, and two workers."""
    small = make_dataset(folder / "data", 40)
    content = json.loads(small.read_text())
    names = [image["file_name"] for image in content["images"]]
    objects = content["annotations"]
    content["images"] = [
        {"id": i, "file_name": names[i % len(names)], "height": 64, "width": 80} for i in range(records)
    ]
    content["annotations"] = [
        {**objects[2 * (i % len(names)) + j % 2], "id": 5 * i + j, "image_id": i}
        for i in range(records)
        for j in range(5)
    ]
    small.write_text(json.dumps(content))
    settings = yaml.safe_load(TINY)
    settings["DATASETS"] = {
        "TRAIN": ["many"],
        "TEST": [],
        "REGISTER": {"many": {"ANNOTATIONS": str(small), "IMAGES": str(folder / "data" / "images")}},
    }
    settings["DATALOADER"]["NUM_WORKERS"] = 2
    settings["SOLVER"] |= {"MAX_ITER": iterations, "BASE_LR": 0.001, "LOG_PERIOD": 20, "IMS_PER_BATCH": 1}
    settings["MODEL"]["RPN"] |= {"PRE_NMS_TOPK_TRAIN": 50, "POST_NMS_TOPK_TRAIN": 20}
    settings["MODEL"]["ROI_HEADS"]["BATCH_SIZE_PER_IMAGE"] = 8
    settings["INPUT"] = {"MIN_SIZE_TRAIN": [48, 64], "MAX_SIZE_TRAIN": 80}
    settings["OUTPUT_DIR"] = str(folder / "run")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    del content, objects
    train(load_config(path))


def evaluate_many(folder: Path, images: int, masks: int) -> None:
    """Detections in COCO's format written as an evaluation writes them, and evaluated from that file."""
    random = np.random.default_rng(0)
    shapes = np.stack([_blob(random) for _ in range(SHAPES)])
    encoded = coco_mask.encode(np.asfortranarray(shapes.transpose(1, 2, 0).astype(np.uint8)))
    corners = coco_mask.toBbox(encoded)
    truth: dict[str, list[Any]] = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "categories": [{"id": c + 1, "name": f"category {c}"} for c in range(CATEGORIES)],
        "annotations": [],
    }
    for image_id in range(images):
        for shape in random.integers(0, SHAPES, OBJECTS).tolist():
            rle = {"size": [HEIGHT, WIDTH], "counts": encoded[shape]["counts"].decode()}
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": shape % CATEGORIES + 1,
                    "bbox": corners[shape].tolist(),
                    "area": float(shapes[shape].sum()),
                    "iscrowd": 0,
                    "segmentation": rle,
                }
            )
    path = folder / "truth.json"
    path.write_text(json.dumps(truth))
    del truth
    results = folder / "coco_instances_results.json"
    with atomic_write(results) as file:
        writer = ResultsWriter(file)
        for image_id in range(images):
            writer.add(_detections(random, image_id, masks, encoded, corners))
        writer.end()
    metrics = evaluate_kinds(path, results)
    size = results.stat().st_size / MEGABYTE
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    scores = ", ".join(f"{kind} AP {values['AP']:.2f}" for kind, values in metrics.items())
    print(
        f"RESULT evaluation: {images * masks} detections with {choose_backend(None)}, file of {size:.0f} MB, "
        f"peak {peak:.0f} MB, {scores}",
        flush=True,
    )


def _detections(
    random: np.random.Generator, image_id: int, count: int, encoded: Any, corners: np.ndarray
) -> list[dict[str, Any]]:
    """Random shapes; a class goes with a shape, so that some are right."""
    return [
        {
            "image_id": image_id,
            "category_id": shape % CATEGORIES + 1,
            "bbox": corners[shape].tolist(),
            "score": float(random.random()),
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": encoded[shape]["counts"].decode()},
        }
        for shape in random.integers(0, SHAPES, count).tolist()
    ]


def _blob(random: np.random.Generator) -> np.ndarray:
    """A wavy ellipse, bool (HEIGHT, WIDTH)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    cx, cy = random.uniform(60, WIDTH - 60), random.uniform(60, HEIGHT - 60)
    a, b, phase = random.uniform(10, 140), random.uniform(10, 140), random.uniform(0, 6)
    angle = np.arctan2(y - cy, x - cx)
    return ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1 + 0.2 * np.sin(5 * angle + phase)


def watch(command: list[str], log: Path, progress: Callable[[], float], every: float) -> dict[str, Curve]:
    """Run a command and look at it and its children until it ends."""
    curves: dict[str, Curve] = {}
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for name, member in _family(watched):
                    memory = member.memory_full_info()
                    curve = curves.setdefault(name, Curve())
                    curve.progress.append(progress())
                    curve.resident.append(memory.rss / MEGABYTE)
                    curve.private.append(memory.uss / MEGABYTE)
            time.sleep(every)
    if process.returncode:
        raise SystemExit(log.read_text())
    return curves


def _family(process: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    yield "main process", process
    children = sorted(process.children(), key=lambda child: child.pid)
    workers = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    for number, child in enumerate(workers, start=1):
        yield f"worker {number}", child


def report(args: argparse.Namespace, folder: Path) -> None:
    """Watch both parts; write the figures and draw."""
    command = [sys.executable, "-m", "benchmarks.memory"]
    metrics = folder / "train" / "run" / "metrics.jsonl"

    def iteration() -> float:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return json.loads(lines[-1])["iteration"] if lines else 0

    for part in ("train", "evaluate"):
        (folder / part).mkdir()
    begin = time.perf_counter()
    training = [*command, "train", "--folder", str(folder / "train")]
    training += ["--iterations", str(args.iterations), "--records", str(args.records)]
    evaluation = [*command, "evaluate", "--folder", str(folder / "evaluate")]
    evaluation += ["--images", str(args.images), "--masks", str(args.masks)]
    with ThreadPoolExecutor() as pool:  # their memory is their own: they can run at the same time
        first = pool.submit(watch, training, folder / "t.log", iteration, 2.0)
        second = pool.submit(watch, evaluation, folder / "e.log", lambda: time.perf_counter() - begin, 0.5)
        trained, evaluated = first.result(), second.result()
    imported = watch(
        [sys.executable, "-c", "import time, torchvision; time.sleep(2)"], folder / "i.log", iteration, 0.5
    )
    found = {"import of PyTorch and torchvision alone": imported["main process"].figures()}
    for name, curve in trained.items():
        slopes = {
            f"{which}, kB per iteration": {"runs": [round(curve.slope(which), 2)]}
            for which in ("resident", "private")
        }
        found[f"training, {name}"] = curve.figures() | slopes
    detections = f"{args.images * args.masks:,}"
    found[f"evaluation, with COCO's AP of {detections} detections"] = evaluated["main process"].figures()
    content = {
        "statistic": "median",
        "digits": 2,
        "machine": platform.machine(),
        "versions": {"Python": platform.python_version(), "PyTorch": torch.__version__},
        "command": "python -m benchmarks.memory",
        "records": [{"what": what, "figures": figures} for what, figures in found.items()],
    }
    atomic_write_text(args.output, json.dumps(content, indent=1) + "\n")
    print((folder / "e.log").read_text().partition("RESULT ")[2].strip())
    draw(args.picture, trained, evaluated["main process"])


def draw(path: Path, trained: dict[str, Curve], evaluated: Curve) -> None:
    """Two panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, curve) in enumerate(trained.items()):
        left.plot(curve.progress, curve.resident, color=f"C{number}", label=f"{name}, resident")
        left.plot(curve.progress, curve.private, color=f"C{number}", linestyle=":", label=f"{name}, private")
    left.set(title="training", xlabel="iteration", ylabel="memory (MB)", ylim=(0, None))
    right.plot(evaluated.progress, evaluated.resident, label="resident")
    right.axhline(1500, color="0.5", linestyle="--", linewidth=1, label="1.5 GB")
    right.set(title="evaluation", xlabel="seconds", ylabel="memory (MB)", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
