"""``gn-detect train``."""

from __future__ import annotations

import argparse

from ..config import Config
from ..engine import evaluate, train
from .options import (
    add_config_arguments,
    add_data_arguments,
    add_fix_argument,
    add_launch_arguments,
    launch_from,
    read_config,
)

HELP = "Train a model and evaluate it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command, those of detectron2's ``train_net.py`` among them."""
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS instead")
    add_launch_arguments(parser)
    add_data_arguments(parser)
    add_fix_argument(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Train, or evaluate with ``--eval-only``."""
    launch_from(args, read_config(args), _evaluate if args.eval_only else _train)


def _train(cfg: Config, resume: bool) -> None:
    train(cfg, resume=resume)


def _evaluate(cfg: Config, resume: bool) -> None:
    evaluate(cfg, resume=resume)
