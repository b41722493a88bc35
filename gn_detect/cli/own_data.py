"""A training run for data without a config: measure them, choose, say why."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..config import Config, load_config, read_overrides
from ..data.datasets import DatasetSource
from ..distributed.launch import check_launch
from ..engine.autoconfig import make_recipe
from ..engine.machine import find_machine
from ..engine.survey import survey
from ..errors import UserError
from ..progress import fitted
from ..weights import implied_keys, read_architecture, read_checkpoint

OUTPUT = "output/finetune"
"""``OUTPUT_DIR`` of a run whose config was chosen."""


def choose_config(args: argparse.Namespace) -> Config:
    """The config for ``--train-json``, ``--train-images`` and the weights; what was chosen is printed.

    The dataset flags are not in it yet.

    Raises:
        UserError: the data, the weights or a given key are wrong.
    """
    given = read_overrides(args.overrides)
    device = str(given.get("MODEL.DEVICE", "auto"))
    if "RANK" not in os.environ:  # torchrun has started the processes
        check_launch(device, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    source = _source(args, bool(given.get("DATASETS.ALLOW_OUTSIDE", False)))
    data = survey(source, masks=given.get("MODEL.MASK_ON"))
    if not len(data.boxes):
        raise UserError(f"{source.annotations} has no objects to learn from; annotate some")
    weights = str(given.get("MODEL.WEIGHTS", ""))
    checkpoint = read_checkpoint(weights) if weights else None
    architecture = None if checkpoint is None else read_architecture(checkpoint)
    machine = find_machine(device, args.num_gpus, args.num_machines)
    recipe = make_recipe(data, machine, weights, architecture, bool(args.val_json), given)
    recipe.keys.setdefault("OUTPUT_DIR", OUTPUT)
    cfg = load_config(recipe.base, _as_overrides(recipe.keys, args.overrides))
    if checkpoint is not None:
        implied = {key: value for key, value in implied_keys(cfg, checkpoint).items() if key not in given}
        cfg = cfg.replace(implied)
        if implied:
            recipe.choose("input", "what the weights were trained with", implied)
    if os.environ.get("RANK", "0") == "0":
        print(f"chosen for {len(data.images)} images, {len(data.boxes)} objects and {machine}:")
        print(fitted(str(recipe), sys.stdout))
        print("  KEY VALUE after the command wins over these; config.yaml in OUTPUT_DIR", cfg.output_dir)
        print("  holds them all, and --config-file reads it", flush=True)
    return cfg


def _source(args: argparse.Namespace, outside: bool) -> DatasetSource:
    if not args.train_images:
        raise UserError("--train-json and --train-images belong together; give both")
    file = Path(args.train_json)
    source = DatasetSource(file.name, file, Path(args.train_images), outside)
    if not source.images.is_dir():
        raise UserError(f"images folder {source.images} is missing; correct --train-images")
    return source


def _as_overrides(keys: dict[str, Any], given: list[str]) -> list[str]:
    """``KEY VALUE`` pairs, the user's last and as they were typed, so that messages speak of them."""
    typed = set(given[::2])
    chosen = [(key, value if isinstance(value, str) else repr(value)) for key, value in keys.items()]
    return [text for key, value in chosen if key not in typed for text in (key, value)] + given
