"""``python -m benchmarks.evaluation``: the time of ``evaluate_kinds`` next to that of hotcoco alone.

Both read the same files: ground truth with polygons, and detections with compressed RLE as an evaluation
writes them. hotcoco's side is loading both files once, ``evaluate`` and ``accumulate`` for boxes and masks,
and one ``json.loads`` of each file, which any check of their entries needs. The sides take turns in one
process. The time is that of the processor, of all threads together: other work on the machine changes it
little.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import hotcoco
import numpy as np
import pycocotools.mask as coco_mask

from gn_detect.evaluation import evaluate_kinds
from gn_detect.evaluation.coco import IOU_TYPES
from gn_detect.evaluation.results_file import ResultsWriter
from gn_detect.files import atomic_write, atomic_write_text

HEIGHT, WIDTH, CATEGORIES, SHAPES, OBJECTS, POINTS = 480, 640, 80, 96, 7, 40


def main() -> None:
    """Time both sides in turn, write the runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--masks", type=int, default=100, help="detections in each of them")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="such as benchmarks/results/evaluation.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(Path(folder), args.images, args.masks)
        sides = {"hotcoco and json.loads": by_hotcoco, "gn_detect": by_gn_detect}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for run in range(args.runs + 1):  # the first one warms up
            for name, side in sides.items():
                spent = timed(side, *files)
                print(f"{name}: {spent:.2f} s", flush=True)
                if run:
                    seconds[name].append(round(spent, 3))
        size = sum(path.stat().st_size for path in files) / 1e6
    what = f"{args.images:,} images, {args.images * args.masks:,} detections, {size:.0f} MB; boxes and masks"
    theirs, ours = map(median, seconds.values())
    print(f"ratio of the medians: {ours / theirs:.2f}")
    if args.output is None:
        return
    content = {
        "statistic": "median",
        "digits": 2,
        "machine": platform.machine(),
        "versions": {"Python": platform.python_version(), "hotcoco": hotcoco.__version__},
        "command": "python -m benchmarks.evaluation --output benchmarks/results/evaluation.json",
        "records": [
            {
                "what": what,
                "figures": {f"{name}, s": {"runs": runs} for name, runs in seconds.items()},
                "ratio": round(ours / theirs, 2),
            }
        ],
    }
    atomic_write_text(args.output, json.dumps(content, indent=1) + "\n")


def timed(side: Callable[[Path, Path], None], truth: Path, results: Path) -> float:
    """Return the seconds of processor time of a side."""
    begin = time.process_time()
    side(truth, results)
    return time.process_time() - begin


def by_hotcoco(truth: Path, results: Path) -> None:
    """Load, evaluate and accumulate without any check; parse both files once more."""
    with contextlib.redirect_stdout(io.StringIO()):
        known = hotcoco.COCO(str(truth))
        found = known.load_res(str(results))
        for kind in IOU_TYPES:
            evaluator = hotcoco.COCOeval(known, found, kind)
            evaluator.evaluate()
            evaluator.accumulate()
            assert evaluator.eval is not None
    for path in (truth, results):
        json.loads(path.read_bytes())


def by_gn_detect(truth: Path, results: Path) -> None:
    """Evaluate as ``gn-detect eval`` does."""
    assert evaluate_kinds(truth, results, backend="hotcoco").keys() == set(IOU_TYPES)


def write_data(folder: Path, images: int, masks: int) -> tuple[Path, Path]:
    """Write ground truth and detections; return their paths.

    Each image has :data:`OBJECTS` objects, a few of them crowds, and ``masks`` detections.
    """
    random = np.random.default_rng(0)
    outlines = [_outline(random) for _ in range(SHAPES)]
    encoded = [
        coco_mask.merge(coco_mask.frPyObjects([outline.reshape(-1).tolist()], HEIGHT, WIDTH))
        for outline in outlines
    ]
    corners, areas = coco_mask.toBbox(encoded).tolist(), coco_mask.area(encoded).tolist()
    rles = [{"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()} for rle in encoded]
    polygons = [[[round(number, 2) for number in outline.reshape(-1).tolist()]] for outline in outlines]
    truth: dict[str, list[Any]] = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(images)],
        "categories": [{"id": c + 1, "name": f"category {c}"} for c in range(CATEGORIES)],
        "annotations": [],
    }
    results = folder / "coco_instances_results.json"
    with atomic_write(results) as file:
        writer = ResultsWriter(file)
        for image_id in range(images):
            for shape in random.integers(0, SHAPES, OBJECTS).tolist():
                crowd = int(random.random() < 0.02)
                truth["annotations"].append(
                    {
                        "id": len(truth["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": shape % CATEGORIES + 1,
                        "bbox": corners[shape],
                        "area": float(areas[shape]),
                        "iscrowd": crowd,
                        "segmentation": rles[shape] if crowd else polygons[shape],
                    }
                )
            writer.add(
                {
                    "image_id": image_id,
                    "category_id": shape % CATEGORIES + 1,
                    "bbox": corners[shape],
                    "score": float(random.random()),
                    "segmentation": rles[shape],
                }
                for shape in random.integers(0, SHAPES, masks).tolist()
            )
        writer.end()
    path = folder / "truth.json"
    atomic_write_text(path, json.dumps(truth))
    return path, results


def _outline(random: np.random.Generator) -> np.ndarray:
    """Return (POINTS, 2) x and y of a wavy ellipse inside the image."""
    centre = random.uniform([60, 60], [WIDTH - 60, HEIGHT - 60])
    axes = random.uniform(10, 140, 2)
    angle = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    radius = 1 + 0.1 * np.sin(5 * angle + random.uniform(0, 6))
    points = centre + radius[:, None] * axes * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points.clip([0, 0], [WIDTH - 1, HEIGHT - 1])


if __name__ == "__main__":
    main()
