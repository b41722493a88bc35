"""A training run for data without a config: check the flags, choose the config, print the reasons."""

from __future__ import annotations

import argparse
import os
import sys

from ..config import Config, load_config, read_overrides
from ..distributed.launch import check_launch
from ..engine import autoconfig
from ..engine.run_data import prepare_data
from ..errors import UserError
from ..progress import fitted


def take_data(args: argparse.Namespace) -> None:
    """Turn ``--data PATH`` into the flags of its COCO files, which it writes into OUTPUT_DIR/data."""
    others = ("train_json", "train_images", "val_json", "val_images")
    if twice := [name for name in others if getattr(args, name)]:
        flag = "--" + twice[0].replace("_", "-")
        raise UserError("conflicting-flags", f"--data {args.data} and {flag} name the same thing; give one")
    if args.eval_only:
        raise UserError(
            "conflicting-flags",
            f"--data is for training; gn-detect import {args.data} DST.json makes a file for --val-json",
        )
    if args.config_file:
        cfg = load_config(args.config_file, args.overrides)
        folder, seed, outside = cfg.output_dir, cfg.seed, cfg.datasets.allow_outside
    else:
        given = read_overrides(args.overrides)
        folder, seed = str(given.get("OUTPUT_DIR", autoconfig.OUTPUT)), given.get("SEED", 0)
        outside = bool(given.get("DATASETS.ALLOW_OUTSIDE", False))
    data = prepare_data(args.data, folder, seed, outside, args.resume)
    if os.environ.get("RANK", "0") == "0":
        print(data, flush=True)
    args.train_json, args.train_images = data.train
    if data.val is not None:
        args.val_json, args.val_images = data.val


def choose_config(args: argparse.Namespace) -> Config:
    """Return the config for ``--train-json`` and the weights, without the datasets; print the choices."""
    given = read_overrides(args.overrides)
    if "RANK" not in os.environ:  # torchrun has started the processes
        device = str(given.get("MODEL.DEVICE", "auto"))
        check_launch(device, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    if not args.train_images:
        raise UserError("lone-flag", "--train-json and --train-images belong together; give both")
    cfg, recipe = autoconfig.choose_config(
        args.train_json,
        args.train_images,
        args.overrides,
        has_val=bool(args.val_json),
        num_gpus=args.num_gpus,
        num_machines=args.num_machines,
    )
    if os.environ.get("RANK", "0") == "0":
        print(f"chosen for {recipe.facts}:")
        print(fitted(str(recipe), sys.stdout))
        print("  KEY VALUE after the command wins over these; config.yaml in OUTPUT_DIR", cfg.output_dir)
        print("  holds them all, and --config-file reads it", flush=True)
    return cfg
