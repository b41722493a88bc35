"""``gn-detect convert``: a BatchNorm checkpoint becomes a GroupNorm checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config, load_config
from ..convert import ConversionReport, calibrate, convert_norm, convert_state_dict
from ..convert.surgery import DEFAULT_GROUPS, DEFAULT_MIN_CHANNELS
from ..data import prepare_image, read_image
from ..engine.model import make_model
from ..errors import UserError
from ..modeling import paired_outputs
from ..weights import load_weights, read_checkpoint, save_weights
from .options import add_config_arguments
from .predict import find_images

if TYPE_CHECKING:
    from torch import Tensor

HELP = "Convert a checkpoint from BatchNorm to GroupNorm."


_KEPT = ("class_names", "category_ids")
"""Of the metadata; a schedule or an optimizer's state would not fit the converted model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("source", metavar="SRC", help="checkpoint with BatchNorm")
    parser.add_argument("target", metavar="DST", help="checkpoint to write: .pth or .safetensors")
    parser.add_argument("--num-groups", type=int, default=DEFAULT_GROUPS)
    parser.add_argument(
        "--min-channels-per-group",
        type=int,
        default=DEFAULT_MIN_CHANNELS,
        help="narrow layers get fewer groups",
    )
    parser.add_argument("--eps", type=float, default=1e-5, help="of the BatchNorms in SRC")
    parser.add_argument(
        "--images", metavar="FOLDER", help="to calibrate on, without labels; with --config-file"
    )
    parser.add_argument("--steps", type=int, default=200, help="of the calibration")
    parser.add_argument("--report", metavar="FILE", help="report.json; a picture is written beside it")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Write DST, print the report, and say which config keys it needs."""
    if Path(args.target).suffix not in (".pth", ".pt", ".safetensors"):
        raise UserError(f"{args.target} must end in .pth, .pt or .safetensors")
    if args.images and not args.config_file:
        raise UserError("--images needs the detector's --config-file, the one that SRC was trained with")
    checkpoint = read_checkpoint(args.source)
    if args.config_file:
        tensors, report = _convert_detector(args, load_config(args.config_file, args.overrides))
    else:
        tensors, report = convert_state_dict(
            checkpoint.tensors,
            eps=args.eps,
            num_groups=args.num_groups,
            min_channels_per_group=args.min_channels_per_group,
        )
    told = {key: checkpoint.metadata[key] for key in _KEPT if key in checkpoint.metadata}
    save_weights(args.target, tensors, told)
    print(report)
    if args.report:
        report.save(args.report)
        if report.similarity:
            report.draw(Path(args.report).with_suffix(".png"))
    smallest = f"MODEL.GN.MIN_CHANNELS_PER_GROUP {args.min_channels_per_group}"
    keys = f"MODEL.GN.NUM_GROUPS {args.num_groups} {smallest}"
    print(f"wrote {args.target}; set the NORM keys to GN and MODEL.WEIGHTS {args.target} {keys}")


def _convert_detector(args: argparse.Namespace, cfg: Config) -> tuple[dict[str, Tensor], ConversionReport]:
    original = make_model(cfg)
    load_weights(original, args.source)
    original.eval()
    model, report = convert_norm(
        original, num_groups=args.num_groups, min_channels_per_group=args.min_channels_per_group
    )
    if args.images:
        paths = find_images([args.images])
        images = [[prepare_image(read_image(path, "RGB"), cfg)] for path in paths]
        calibrate(original, model, images, args.steps, outputs=paired_outputs, report=report)
    return dict(model.state_dict()), report
