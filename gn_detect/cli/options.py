"""Flags that several commands share, and the config that they make."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from ..config import Config

NO_CONFIG = (
    "no config: add --config-file FILE, such as the config.yaml of the training run, or a checkpoint that "
    "holds its config, as gn-detect's do"
)
NUM_CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", metavar="FILE", help="YAML with detectron2's keys")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # else argparse counts it among what it requires
        metavar="KEY VALUE",
        help="config keys, such as SOLVER.BASE_LR 0.01",
    )


def add_fix_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fix-config",
        action="store_true",
        help="set the input's keys (format, mean, deviation, stride) to what the weights were trained with",
    )


def add_other_classes_argument(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument(
        "--other-classes",
        action="store_true",
        help=f"{purpose} data whose classes have other names than the checkpoint's, as many of them, taken "
        "by position; without it they are matched by name, and other names are an error",
    )


def put_keys(args: argparse.Namespace, flag: str, keys: Mapping[str, str]) -> None:
    """Put the config keys that a flag means before the ``KEY VALUE`` pairs, which must not have them."""
    if twice := [key for key in keys if key in args.overrides[::2]]:
        raise UserError("conflicting-flags", f"{flag} and {twice[0]} name the same thing; give one")
    args.overrides = [*(word for pair in keys.items() for word in pair), *args.overrides]


def add_weights_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        metavar="W",
        help="MODEL.WEIGHTS: a file, zoo://NAME (gn-detect zoo list), hf://USER/REPO or a URL",
    )


def take_weights(args: argparse.Namespace) -> None:
    """Turn ``--weights W`` into ``MODEL.WEIGHTS W``."""
    if args.weights:
        put_keys(args, f"--weights {args.weights}", {"MODEL.WEIGHTS": args.weights})


def take_checkpoint(args: argparse.Namespace, words: list[str]) -> list[str]:
    """Make a checkpoint that stands first in ``words`` the ``--weights``; return the other words."""
    from .inputs import names_weights

    if args.weights or not words or not names_weights(words[0]):
        return words
    args.weights = words[0]
    return words[1:]


def check_threshold(value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError("bad-argument", f"--threshold {value:g}: it must be from 0 to 1, as scores are")


def read_config(args: argparse.Namespace) -> Config:
    """Return the config of ``--config-file``, ``KEY VALUE`` and the dataset flags."""
    take_weights(args)
    if args.backbone:
        from ..engine.autoconfig import backbone_keys

        put_keys(args, f"--backbone {args.backbone}", backbone_keys(args.backbone))
    if args.logger:
        put_keys(args, "--logger", {"LOGGERS": str(args.logger)})
    if args.data:
        from .own_data import take_data

        take_data(args)
    if args.config_file or args.eval_only:
        return _with_datasets(read_config_file(args), args)
    if not args.train_json:
        raise UserError(
            "no-config",
            "no config: add --config-file FILE, such as quick/demo.yaml, or --data PATH, or --train-json "
            "FILE and --train-images FOLDER, to have one made for your data",
        )
    from .own_data import choose_config

    return _with_datasets(choose_config(args), args)


def read_config_file(args: argparse.Namespace) -> Config:
    """Return the config of ``--config-file`` or of the weights, with ``KEY VALUE`` and ``--fix-config``."""
    from ..config import load_config

    weights = dict(zip(args.overrides[::2], args.overrides[1::2], strict=False)).get("MODEL.WEIGHTS")
    if args.config_file:
        cfg = load_config(args.config_file, args.overrides)
    elif weights:
        from ..engine.pretrained import read_pretrained

        cfg, _ = read_pretrained(weights, args.overrides)
    else:
        raise UserError("no-config", NO_CONFIG)
    if args.fix_config and cfg.model.weights:
        from ..weights import as_command_line, implied_keys

        keys = implied_keys(cfg, cfg.model.weights)
        print(f"--fix-config: {as_command_line(keys)}" if keys else "--fix-config: nothing to set")
        cfg = cfg.replace(keys)
    return cfg


def _with_datasets(cfg: Config, args: argparse.Namespace) -> Config:
    """Return the config with the datasets of ``--train-json`` and so on, named ``train`` and ``val``."""
    from ..engine.autoconfig import with_datasets

    train, val = _pair(args, "train"), _pair(args, "val")
    if train is None and val is None:
        return cfg
    cfg = with_datasets(cfg, train, val)
    if val is None:
        print("no --val-json: the model will not be evaluated")
    decides = val if args.eval_only else train  # a test set may list fewer classes
    if decides is not None and NUM_CLASSES not in args.overrides[::2]:
        found, origin = _count_categories(Path(decides[0])), f"categories in {decides[0]}"
        if args.eval_only and found != cfg.model.roi_heads.num_classes:
            from ..engine.checkpoint import read_last_checkpoint
            from ..weights import read_checkpoint

            checkpoint = None  # the evaluation itself reports that there is none
            if args.resume:
                checkpoint = read_last_checkpoint(cfg.output_dir)
            elif cfg.model.weights:
                checkpoint = read_checkpoint(cfg.model.weights)
            if checkpoint is not None and checkpoint.metadata.class_names:
                found, origin = len(checkpoint.metadata.class_names), f"classes of {checkpoint.path}"
        if found and found != cfg.model.roi_heads.num_classes:
            cfg = cfg.replace({NUM_CLASSES: found})
            print(f"{NUM_CLASSES} set to {found}, the number of {origin}")
    return cfg


def _pair(args: argparse.Namespace, part: str) -> tuple[str, str] | None:
    annotations, images = getattr(args, f"{part}_json"), getattr(args, f"{part}_images")
    if (annotations is None) != (images is None):
        raise UserError("lone-flag", f"--{part}-json and --{part}-images belong together; give both")
    return None if annotations is None else (annotations, images)


def _count_categories(path: Path) -> int:
    """Return the number of categories in a COCO JSON; 0 for a faulty one, which its reader reports later."""
    from ..data.coco.reader import load_coco

    try:
        return len(load_coco(path, ("categories",))["categories"])
    except UserError:
        return 0
