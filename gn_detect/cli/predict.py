"""``gn-detect predict``: objects in images, as pictures and as COCO results."""

from __future__ import annotations

import argparse
import glob
import re
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config import load_config
from ..data import read_image
from ..engine import ExportedPredictor, Predictor
from ..errors import UserError
from ..evaluation import detections_to_coco
from ..files import atomic_write_json
from ..visualize import draw_detections, save_picture
from .options import add_fix_argument, fix_config
from .output import Result

HELP = "Find objects in images with a trained checkpoint, MODEL.WEIGHTS."

EXAMPLES = """
gn-detect predict --config-file runs/one/config.yaml photo.jpg MODEL.WEIGHTS runs/one/model_final.pth
gn-detect predict --config-file runs/one/config.yaml --output found --threshold 0.7 photos 'more/*.png' \\
    MODEL.WEIGHTS runs/one/model_final.pth
"""

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--config-file", metavar="FILE", help="the run's config.yaml")
    parser.add_argument(
        "--model", metavar="FILE", help="what gn-detect export wrote, in place of a config and weights"
    )
    parser.add_argument(
        "--trust", action="store_true", help="run a --model of PyTorch (.pt2), which is a program"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", default="predictions", help="for pictures and predictions.json"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="least score of what is drawn and written"
    )
    add_fix_argument(parser)
    parser.add_argument(
        "inputs", nargs="+", metavar="IMAGE", help="files, folders or patterns, then KEY VALUE ..."
    )


def run(args: argparse.Namespace) -> Result:
    """Write one picture for each image and ``predictions.json`` for all."""
    inputs, overrides = split_overrides(args.inputs)
    images = find_images(inputs)
    predictor = make_predictor(args, overrides)
    print(predictor.report)
    output = Path(args.output)
    results: list[dict[str, Any]] = []
    for image_id, (path, name) in enumerate(tqdm(name_pictures(images), unit="image", disable=None), start=1):
        pixels = read_image(path, "RGB")
        found = predictor(pixels)
        found = found[found.scores >= args.threshold]
        for result in detections_to_coco(found, image_id, predictor.category_ids):
            results.append({"file_name": str(path), **result})
        picture = draw_detections(pixels, found, predictor.class_names, args.threshold)
        save_picture(output / name, picture)
    atomic_write_json(output / "predictions.json", results)
    print(f"{len(results)} objects in {len(images)} images: see {output}")
    return Result({"images": len(images), "objects": len(results), "output": str(output)})


def make_predictor(args: argparse.Namespace, overrides: list[str]) -> Predictor | ExportedPredictor:
    """Of ``--model``, or of ``--config-file`` and ``MODEL.WEIGHTS``.

    Raises:
        UserError: neither or both are given, or something in them is wrong.
    """
    if args.model:
        if args.config_file or overrides:
            given = "--config-file" if args.config_file else overrides[0]
            raise UserError(f"--model holds its own config, so {given} has no effect; leave it out")
        return ExportedPredictor(args.model, trust=args.trust)
    if not args.config_file:
        raise UserError("no config: add --config-file FILE, such as the config.yaml of the training run")
    cfg = load_config(args.config_file, overrides)
    if args.fix_config and cfg.model.weights:
        cfg = fix_config(cfg, cfg.model.weights)
    return Predictor(cfg)


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Images, and ``KEY VALUE`` pairs from the first argument that looks like a key and is not a file."""
    for i, argument in enumerate(arguments):
        if _KEY.fullmatch(argument) and "." in argument and not Path(argument).exists():
            return arguments[:i], arguments[i:]
    return arguments, []


def find_images(inputs: list[str]) -> list[Path]:
    """Files as given, the images in folders, and what patterns match, each once.

    Raises:
        UserError: an input does not exist, or a folder or pattern holds no image.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        else:
            matches = sorted(p for p in map(Path, glob.glob(text, recursive=True)) if p.is_file())
        if not matches:
            raise UserError(f"no image at {text}; give image files, a folder of them or a pattern")
        found.update(dict.fromkeys(matches))
    if not found:
        raise UserError("no images: name files, a folder or a pattern before the config keys")
    return list(found)


def name_pictures(images: list[Path]) -> list[tuple[Path, str]]:
    """A file name for the picture of each image; equal stems get a number."""
    used: set[str] = set()
    named = []
    for path in images:
        name, count = f"{path.stem}.png", 1
        while name in used:
            count += 1
            name = f"{path.stem}_{count}.png"
        used.add(name)
        named.append((path, name))
    return named
