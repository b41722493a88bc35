"""``python -m benchmarks.tiles``: AP and memory of detection in tiles, on mosaics of nuclei images.

A mosaic has the val images with a shorter side of 256 pixels and mirror images of theirs, in a random order,
the dark ones first: about 2,000 x 2,000 pixels, in which the network sees each nucleus as large as in its own
image. All arms may find 3,000 objects in an image, and AP counts 3,000, more than a mosaic has: it is not
COCO's AP, which counts 100. Each arm runs in a process of its own, with one thread. The command goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gn_detect.config import load_config
from gn_detect.data import CocoDataset, DatasetSource
from gn_detect.data.coco.rle import RleMask
from gn_detect.data.tiles import tile_windows
from gn_detect.data.transforms import LabelledImage, flip_horizontal
from gn_detect.engine import Predictor
from gn_detect.evaluation import detections_to_coco
from gn_detect.evaluation.model import encode_part
from gn_detect.files import atomic_write_text
from gn_detect.visualize import draw_detections, save_picture

SHARED = Path(__file__).resolve().parents[2] / "shared"
SEEDS, PICTURES, ROW = (1, 2, 3), 60, 2112  # mosaics; images and the longest row of each, pixels
MOST = 3000  # objects that are found and counted in an image

# Keys of each arm; the whole image at its own size needs more proposals for its objects.
OWN_SIZE = {"INPUT.MIN_SIZE_TEST": 0, "INPUT.MAX_SIZE_TEST": 10**5}
SINGLE = "the images by themselves"
ARMS: dict[str, dict[str, Any]] = {
    SINGLE: {},
    "mosaics, resized to 256 pixels": {},
    "mosaics, at their own size": OWN_SIZE
    | {"MODEL.RPN.PRE_NMS_TOPK_TEST": 6000, "MODEL.RPN.POST_NMS_TOPK_TEST": 4000},
    "mosaics, tiles of 256 pixels, overlap 0": {"TEST.TILES.SIZE": 256, "TEST.TILES.OVERLAP": 0.0},
    "mosaics, tiles of 256 pixels, overlap 0.2": {"TEST.TILES.SIZE": 256, "TEST.TILES.OVERLAP": 0.2},
}

Image = tuple[np.ndarray, list[dict[str, Any]]]
"""(H, W, 3) uint8 RGB, and the compressed RLE of each object."""


def main() -> None:
    """Run what is not recorded yet: all arms on the first mosaic, then all on the next one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cell", nargs=2, type=int, help="run this arm on this mosaic here, print its figures"
    )
    parser.add_argument("--picture", type=Path, help="draw a part of the first mosaic with what tiles find")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tiles.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.picture:
        draw(args.picture)
    elif args.cell:
        print(json.dumps(measure([*ARMS][args.cell[0]], args.cell[1])))
    else:
        run_all(args.output)


def run_all(path: Path) -> None:
    """Run each arm on each mosaic in a process of its own, and add its figures to the file."""
    done = json.loads(path.read_text("utf-8"))["records"] if path.is_file() else []
    figures = {record["what"]: record["figures"] for record in done}
    for number, seed in enumerate(SEEDS):
        for arm, what in enumerate(ARMS):
            known = figures.setdefault(what, {})
            if len(known.get("box AP", {"runs": []})["runs"]) > number or (number and what == SINGLE):
                continue
            command = [sys.executable, "-m", "benchmarks.tiles", "--cell", str(arm), str(seed)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for name, value in json.loads(printed.splitlines()[-1]).items():
                known.setdefault(name, {"runs": []})["runs"].append(value)
            print(what, seed, known, flush=True)
            records = [{"what": what, "figures": found} for what, found in figures.items() if found]
            version = torch.__version__.partition("+")[0]
            content = {
                "statistic": "mean",
                "digits": 1,
                "machine": "CPU",
                "versions": {"PyTorch": version, "Python": platform.python_version()},
                "unit": f"AP in percent at maxDets {MOST}, not COCO's 100",
                "command": "python -m benchmarks.tiles",
                "records": records,
            }
            atomic_write_text(path, json.dumps(content, indent=1) + "\n")


def measure(arm: str, seed: int) -> dict[str, float]:
    """Return AP of boxes and masks, the number of objects, seconds of processor time and peak memory."""
    predictor = load(ARMS[arm])
    parts, mosaic = make_images(seed)
    images = parts if arm == SINGLE else [mosaic]
    before, begin = peak(), time.process_time()
    entries: list[dict[str, Any]] = []
    for image_id, (pixels, _) in enumerate(images, 1):
        entries += detections_to_coco(predictor.find(pixels), image_id, [1], pixels.shape[:2])
    seconds, memory = time.process_time() - begin, peak() - before
    return {
        "box AP": round(ap(images, entries, "bbox"), 2),
        "mask AP": round(ap(images, entries, "segm"), 2),
        "objects": sum(len(masks) for _, masks in images),
        "s": round(seconds, 1),
        "memory above the start, MB": round(memory),
    }


def peak() -> float:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def load(keys: dict[str, Any]) -> Predictor:
    """Return the detector of nuclei that detectron2 trained, which the oracles' numbers come from."""
    oracle = SHARED / "oracles" / "dsb_r18_gn"
    weights = {"MODEL.WEIGHTS": str(oracle / "model_final.pth"), "MODEL.DEVICE": "cpu"}
    limit = {"TEST.DETECTIONS_PER_IMAGE": MOST}
    return Predictor(load_config(oracle / "config.yaml").replace(weights | limit | keys))


def make_images(seed: int) -> tuple[list[Image], Image]:
    """Return the images of a mosaic in their order, each by itself, and the mosaic."""
    data = SHARED / "data" / "dsb2018"
    source = DatasetSource("val", data / "annotations" / "instances_val.json", data / "images")
    dataset = CocoDataset(source, quiet=True)
    chosen = [i for i, record in enumerate(dataset.images) if min(record.height, record.width) == 256]
    whole = [dataset.read(i) for i in chosen]
    both = [*whole, *map(flip_horizontal, whole)][:PICTURES]
    both = [both[i] for i in np.random.default_rng(seed).permutation(len(both))]
    both.sort(key=lambda each: each.image.mean() > 128)  # a slide is of one kind, fluorescent or stained
    return [compose([each], each.size[1]) for each in both], compose(both, ROW)


def compose(parts: list[LabelledImage], longest: int) -> Image:
    """Put images of 256 rows into rows of at most ``longest`` pixels; what is left at their ends is black."""
    places, top, left = [], 0, 0
    for part in parts:
        if left + part.size[1] > longest:
            top, left = top + 256, 0
        places.append((top, left))
        left += part.size[1]
    canvas = np.zeros((top + 256, longest, 3), dtype=np.uint8)
    objects = []
    for part, (top, left) in zip(parts, places, strict=True):
        canvas[top : top + 256, left : left + part.size[1]] = part.image
        for mask in part.masks or []:
            bitmap = mask.decode() if isinstance(mask, RleMask) else np.asarray(mask)
            objects.append(encode_part(bitmap, top, left, canvas.shape[:2]))
    return canvas, objects


def ap(images: list[Image], entries: list[dict[str, Any]], kind: str) -> float:
    """Return the AP in percent that counts :data:`MOST` detections of an image."""
    annotations: list[dict[str, Any]] = []
    for image_id, (_, masks) in enumerate(images, 1):
        for rle in masks:
            about = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            area, box = int(coco_mask.area(rle)), coco_mask.toBbox(rle).tolist()
            annotations.append({**about, "segmentation": rle, "area": area, "bbox": box})
    with redirect_stdout(StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [
                {"id": i, "height": pixels.shape[0], "width": pixels.shape[1]}
                for i, (pixels, _) in enumerate(images, 1)
            ],
            "categories": [{"id": 1, "name": "nucleus"}],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(entries), kind)
        evaluator.params.maxDets = [MOST]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    return float(evaluator.eval["precision"].mean()) * 100


def draw(path: Path) -> None:
    """Draw what tiles find in the part of the first mosaic with the most objects, and the tiles' borders."""
    _, (pixels, masks) = make_images(SEEDS[0])
    boxes, side = coco_mask.toBbox(masks), 448
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    corners = [(x, y) for x in range(0, ROW - side, 64) for y in range(0, len(pixels) - side + 1, 64)]
    left, top = max(corners, key=lambda at: int(((centres > at) & (centres < np.add(at, side))).all(1).sum()))
    part = np.ascontiguousarray(pixels[top : top + side, left : left + side])
    found = load({"TEST.TILES.SIZE": 256})(part)
    for x0, y0, x1, y1 in tile_windows(side, side, 256, 0.2).tolist():
        for line in (np.s_[y0:y1, [x0, x1 - 1]], np.s_[[y0, y1 - 1], x0:x1]):
            part[line] = (255, 255, 0)
    save_picture(path, draw_detections(part, found[found.scores > 0.5], ["nucleus"], 0.0))


if __name__ == "__main__":
    main()
