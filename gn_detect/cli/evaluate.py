"""``gn-detect eval``: the same as ``gn-detect train --eval-only``."""

from __future__ import annotations

import argparse

from . import train
from .options import take_checkpoint
from .output import Result

EXAMPLES = """
gn-detect eval runs/one/model_best.pth
gn-detect eval model_best.pth --val-json other.json --val-images images OUTPUT_DIR runs/other
gn-detect eval --json --config-file GN/mask_rcnn_R_50_FPN_3x_gn.yaml --weights zoo://mask-R-50-FPN-GN-3x
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    train.add_arguments(parser)
    parser.set_defaults(eval_only=True)


def run(args: argparse.Namespace) -> Result:
    args.overrides = take_checkpoint(args, args.overrides)
    return train.run(args)
