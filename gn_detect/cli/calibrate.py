"""``gn-detect calibrate``: bring a converted checkpoint closer to its original."""

from __future__ import annotations

import argparse

from .convert import add_shared_arguments, shared_arguments
from .output import Result

HELP = "Bring a converted checkpoint closer to its original, with images that need no labels."

EXAMPLES = """
gn-detect calibrate bn.pth gn.pth better.pth --config-file bn.yaml --images photos
gn-detect calibrate bn.pth gn.pth better.pth --config-file bn.yaml --images photos --checkpoint calibration.pt
gn-detect calibrate resnet50 resnet50_gn.pth better.pth --weights DEFAULT --images photos --steps 800
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "original", metavar="ORIGINAL", help="checkpoint with BatchNorm, or a model of torchvision or timm"
    )
    parser.add_argument("converted", metavar="CONVERTED", help="the file that gn-detect convert made of it")
    parser.add_argument("target", metavar="DST", help="checkpoint to write: .pth, .pkl or .safetensors")
    add_shared_arguments(parser, parser, needs_images=True)


def run(args: argparse.Namespace) -> Result:
    """Write DST and print each norm's distance from the original."""
    from ..conversion import convert_checkpoint

    files = args.original, args.target, args.images, args.config_file
    report = convert_checkpoint(*files, converted=args.converted, **shared_arguments(args))
    print(report)
    return Result(report.to_dict())
