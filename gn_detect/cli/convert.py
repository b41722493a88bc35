"""``gn-detect convert``: convert a checkpoint from BatchNorm to GroupNorm."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError
from .options import add_config_arguments, add_fix_argument
from .output import Result

HELP = "Convert a checkpoint from BatchNorm to GroupNorm."

EXAMPLES = """
gn-detect convert model_bn.pth model_gn.pth                       # any library's state dict, without data
gn-detect convert bn.pth gn.pth --config-file bn.yaml --images photos --report report.json
gn-detect convert resnet50 resnet50_gn.pth --weights DEFAULT --images photos --checkpoint calibration.pt
gn-detect convert --keep-norm zoo://R-50-GN R-50-GN.safetensors   # other names or another format alone
"""

FORMATS = ("pth", "pt", "pkl", "safetensors")

# Arguments of gn_detect.convert_checkpoint that convert and calibrate have, by the names of their flags.
SHARED = (
    "overrides", "fix_config", "weights", "num_groups", "min_channels_per_group", "report_file",
    "image_folder", "max_images", "steps", "batch_size", "learning_rate", "norm_learning_rate",
    "block_weight", "rescale", "checkpoint",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "source",
        metavar="SRC",
        help="checkpoint with BatchNorm, or a model of torchvision (resnet50) or timm (timm/resnet50)",
    )
    add("target", metavar="DST", help="checkpoint to write: .pth, .pkl or .safetensors")
    add("--format", choices=FORMATS, help="for a DST without ending")
    add("--keep-norm", action="store_true", help="only change names to detectron2's, and the format")
    add(
        "--eps",
        type=float,
        help="of the BatchNorms in a checkpoint; by default that of the library with its names, else 1e-5",
    )
    add(
        "--relative-eps",
        type=float,
        metavar="PART",
        help="of each layer's expected variance, added to its eps, as 0.3: keeps more of the function and "
        "normalises less; needs a model, or a detector's --config-file; by default 0, or chosen on a model's "
        "--images",
    )
    add_shared_arguments(
        parser, parser.add_argument_group("calibration", "needs a model, or a detector's --config-file")
    )


def add_shared_arguments(
    parser: argparse.ArgumentParser, calibration: argparse._ActionsContainer, needs_images: bool = False
) -> None:
    """Add the arguments that ``convert`` and ``calibrate`` have; see :func:`shared_arguments`."""
    add = parser.add_argument
    add("--weights", metavar="W", help="of a model: a file, DEFAULT, or IMAGENET1K_V1 and so on")
    add("--num-groups", type=int, help="of each norm at most; by default 32, or chosen on a model's --images")
    narrow = "narrow layers get fewer groups; by default 16, or chosen on a model's --images"
    add("--min-channels-per-group", type=int, help=narrow)
    add("--report", dest="report_file", metavar="FILE", help="report.json; a picture is written next to it")
    add = calibration.add_argument
    images = "without labels; a COCO JSON names them"
    add("--images", metavar="FOLDER|JSON", required=needs_images, help=images)
    add("--image-folder", metavar="FOLDER", help="of the JSON's images; by default its own")
    add("--max-images", type=int, default=500, help="spread over all of them")
    add(
        "--steps",
        type=int,
        help="of the optimizer; by default 400 for a detector, and for a model by its norms and images",
    )
    add("--batch-size", type=int, help="8; 2 for detectors")
    add("--learning-rate", type=float, default=1e-4, help="of all other weights, at its highest")
    add("--norm-learning-rate", type=float, default=2e-3, help="of the norms' weights and biases")
    weight = "of the blocks' differences, on average, relative to the outputs'"
    add("--block-weight", type=float, default=30.0, help=weight)
    add(
        "--keep-scales",
        dest="rescale",
        action="store_false",
        help="do not rescale channels; for weights to be fine-tuned, which learn faster so",
    )
    checkpoint = "to go on from, if it is interrupted; deleted when DST is written"
    add("--checkpoint", metavar="FILE", help=checkpoint)
    add_fix_argument(parser)
    add_config_arguments(parser)


def shared_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of :data:`SHARED`."""
    return {name: getattr(args, name) for name in SHARED}


def run(args: argparse.Namespace) -> Result:
    """Write DST and print the report."""
    from ..conversion import convert_checkpoint, rewrite_checkpoint

    target = _with_ending(Path(args.target), args.format)
    if args.keep_norm:
        if args.relative_eps:
            raise UserError(
                "conflicting-flags",
                "--relative-eps converts norms, and --keep-norm keeps them; leave one out",
            )
        rewritten = rewrite_checkpoint(args.source, target)
        print(rewritten)
        return Result(rewritten.to_dict())
    own = {"eps": args.eps, "relative_eps": args.relative_eps} | shared_arguments(args)
    report = convert_checkpoint(args.source, target, args.images, args.config_file, **own)
    print(report)
    return Result(report.to_dict())


def _with_ending(target: Path, ending: str | None) -> Path:
    if target.suffix[1:] not in FORMATS:
        if ending is None:
            raise UserError(
                "wrong-ending", f"{target} must end in {', '.join(f'.{e}' for e in FORMATS)}, or add --format"
            )
        return target.with_name(f"{target.name}.{ending}")
    if ending and target.suffix != f".{ending}":
        raise UserError("conflicting-flags", f"--format {ending}, but {target} ends in {target.suffix}")
    return target
