"""``gn-detect train``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from ..config import Config
from ..engine import evaluate, train
from ..engine.checkpoint import BEST, FINAL
from ..report.run_folder import read_run
from ..text import printable
from .options import (
    add_config_arguments,
    add_data_arguments,
    add_fix_argument,
    add_launch_arguments,
    add_weights_argument,
    launch_from,
    read_config,
)
from .output import Result

HELP = "Train a model and evaluate it. Without --config-file, one is made for the data."

EXAMPLES = """
gn-detect train --train-json train.json --train-images images --val-json val.json --val-images images
gn-detect train --train-json train.json --train-images images --weights zoo://R-50-GN OUTPUT_DIR runs/one
gn-detect train --config-file quick/demo.yaml SOLVER.MAX_ITER 100
gn-detect train --config-file runs/one/config.yaml --resume
gn-detect train --config-file GN/mask_rcnn_R_50_FPN_2x_gn.yaml --num-gpus 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command, those of detectron2's ``train_net.py`` among them."""
    parser.add_argument(
        "--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS instead")
    add_launch_arguments(parser)
    add_data_arguments(parser)
    add_weights_argument(parser)
    add_fix_argument(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    """Train, or evaluate with ``--eval-only``."""
    cfg = read_config(args)
    launch_from(args, cfg, _evaluate if args.eval_only else _train)
    folder = Path(cfg.output_dir)
    if args.machine_rank or os.environ.get("RANK", "0") != "0":  # the first process of all has the results
        return Result({"output_dir": str(folder)})
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if args.eval_only:
        return Result({"output_dir": str(folder), "results": results})
    files = {"config": folder / "config.yaml", "weights": folder / FINAL, "best": folder / BEST}
    found = {name: str(path) if path.is_file() else None for name, path in files.items()}
    best = read_run(folder).best
    if best and not best.is_last:
        print(printable(best))
    if not args.config_file:
        weights = found["best"] or found["weights"]
        print(f"next: gn-detect predict --config-file {found['config']} --weights {weights} IMAGES")
    return Result({"output_dir": str(folder), **found, "results": results})


def _train(cfg: Config, resume: bool) -> None:
    train(cfg, resume=resume)


def _evaluate(cfg: Config, resume: bool) -> None:
    evaluate(cfg, resume=resume)
