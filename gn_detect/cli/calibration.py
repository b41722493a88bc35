"""Flags of a calibration, and what they say done to a detector or a library's model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..config import Config
from ..convert import ConversionReport, calibrate
from ..data import prepare_image, read_image, read_image_list
from ..errors import UserError
from ..modeling import paired_outputs
from .inputs import find_images
from .library_models import LibraryModel


def add_calibration_arguments(calibration: argparse._ActionsContainer, required: bool = False) -> None:
    """Which images, and how long."""
    calibration.add_argument(
        "--images", metavar="FOLDER|JSON", required=required, help="without labels; a COCO JSON names them"
    )
    calibration.add_argument(
        "--image-folder", metavar="FOLDER", help="of the JSON's images; by default its own"
    )
    calibration.add_argument("--max-images", type=int, default=500, help="spread over all of them")
    calibration.add_argument("--steps", type=int, default=400, help="of the optimizer")
    calibration.add_argument("--batch-size", type=int, help="8; 2 for detectors")
    calibration.add_argument(
        "--learning-rate", type=float, default=1e-4, help="of all other weights, at its highest"
    )
    calibration.add_argument(
        "--norm-learning-rate", type=float, default=2e-3, help="of the norms' weights and biases"
    )
    calibration.add_argument(
        "--block-weight",
        type=float,
        default=30.0,
        help="of the blocks' differences, on average, beside the outputs'",
    )
    calibration.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="to go on from, if it is interrupted; deleted when DST is written",
    )


def calibrate_library_model(
    args: argparse.Namespace, found: LibraryModel, model: nn.Module, report: ConversionReport
) -> None:
    """Bring ``model`` closer to ``found.model`` with ``--images``."""
    if found.prepare is None:
        raise UserError(
            f"{args.source} does not take single pictures, so --images cannot calibrate it; leave them "
            "away, or call gn_detect.calibrate with what the model takes"
        )
    images = [found.prepare(Image.fromarray(read_image(path, "RGB"))) for path in _find_images(args)]
    shapes = sorted({tuple(image.shape[-2:]) for image in images})
    if len(shapes) > 1:  # a segmenter's are resized and not cropped
        raise UserError(
            f"{args.source} takes images of any size, and those of {args.images} become {len(shapes)} sizes, "
            f"such as {shapes[0]} and {shapes[-1]} (height, width); give images of one size"
        )
    _calibrate(args, found.model, model, torch.stack(images), report, batch_size=args.batch_size or 8)


def calibrate_detector(
    args: argparse.Namespace, cfg: Config, original: nn.Module, model: nn.Module, report: ConversionReport
) -> None:
    """Bring ``model`` closer to ``original``, a detector of ``cfg``, with ``--images``."""
    paths = _find_images(args, cfg.datasets.allow_outside)
    images = [prepare_image(read_image(path, "RGB"), cfg) for path in paths]
    _calibrate(args, original, model, _batches(images, args.batch_size or 2), report, outputs=paired_outputs)


def _batches(images: list[Tensor], size: int) -> list[list[Tensor]]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _calibrate(
    args: argparse.Namespace,
    original: nn.Module,
    model: nn.Module,
    images: Tensor | list[list[Tensor]],
    report: ConversionReport,
    **settings: Any,
) -> None:
    calibrate(
        original,
        model,
        images,
        args.steps,
        learning_rate=args.learning_rate,
        norm_learning_rate=args.norm_learning_rate,
        block_weight=args.block_weight,
        checkpoint=args.checkpoint,
        report=report,
        **settings,
    )


def _find_images(args: argparse.Namespace, outside: bool = False) -> list[Path]:
    """At most ``--max-images``, spread evenly over the folder or the COCO JSON."""
    given = Path(args.images)
    if args.max_images < 2:
        raise UserError(f"--max-images {args.max_images}: a calibration needs two images at least")
    if args.image_folder and given.suffix != ".json":
        raise UserError("--image-folder belongs to --images FILE.json")
    if given.suffix == ".json":
        paths = read_image_list(given, Path(args.image_folder or given.parent), outside)
    else:
        paths = find_images([args.images])
    count = min(args.max_images, len(paths))
    paths = [paths[i * len(paths) // count] for i in range(count)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{args.images}: {len(missing)} of {count} images are missing, such as {missing[0]}; name "
            "their folder with --image-folder"
        )
    return paths
