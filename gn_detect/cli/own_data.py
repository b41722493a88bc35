"""A training run for data without a config: check the flags, choose the config, print the reasons."""

from __future__ import annotations

import argparse
import os
import sys

from ..config import Config, read_overrides
from ..distributed.launch import check_launch
from ..engine import autoconfig
from ..errors import UserError
from ..progress import fitted


def choose_config(args: argparse.Namespace) -> Config:
    """Return the config for ``--train-json``, ``--train-images`` and the weights, and print the choices.

    The dataset flags are not in it yet.

    Raises:
        UserError: the data, the weights or a given key are wrong.
    """
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
