"""``gn-detect train``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..text import printable
from .options import (
    add_config_arguments,
    add_fix_argument,
    add_other_classes_argument,
    add_weights_argument,
    read_config,
)
from .output import Result

if TYPE_CHECKING:
    from ..config import Config

EXAMPLES = """
gn-detect train --data FOLDER OUTPUT_DIR runs/one
gn-detect train --train-json train.json --train-images images --val-json val.json --val-images images
gn-detect train --train-json train.json --train-images images --weights zoo://R-50-GN OUTPUT_DIR runs/one
gn-detect train --train-json train.json --train-images images --backbone mobilenet_v2 --weights FILE.pth
gn-detect train --config-file quick/demo.yaml SOLVER.MAX_ITER 100
gn-detect train --train-json train.json --train-images images --time 2h
gn-detect train --config-file runs/one/config.yaml --resume
gn-detect train --config-file GN/mask_rcnn_R_50_FPN_2x_gn.yaml --num-gpus 8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--resume",
        action="store_true",
        help="continue the run in OUTPUT_DIR from its last checkpoint; only its length, periods, device, "
        "workers and paths may differ from its beginning",
    )
    add(
        "--allow-changes",
        action="store_true",
        help="with --resume: go on even where settings or data differ from the run's beginning",
    )
    add("--epochs", type=float, metavar="N", help="train for N passes over the images: sets SOLVER.MAX_ITER")
    add(
        "--time",
        metavar="2h",
        help="train and evaluate for so long, such as 45m or 1h30m: measures some iterations, and sets "
        "SOLVER.MAX_ITER",
    )
    add(
        "--logger",
        action="append",
        metavar="NAME",
        help="send config and metrics to wandb, mlflow or trackio, too; may be repeated: sets LOGGERS",
    )
    add_other_classes_argument(parser, "evaluate, or with --resume go on, on")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS instead")
    add("--num-gpus", type=int, default=1, help="processes on this machine, one for each GPU")
    add("--num-machines", type=int, default=1)
    add("--machine-rank", type=int, default=0, help="this machine, from 0")
    add("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0; found by itself for one")
    add(
        "--data",
        metavar="PATH",
        help="data to train on in any format that gn-detect import reads: it becomes COCO files in "
        "OUTPUT_DIR/data, split by images where it has no val part",
    )
    for part, purpose in (("train", "train"), ("val", "evaluate")):
        add(f"--{part}-json", metavar="FILE", help=f"COCO annotations to {purpose} on")
        add(f"--{part}-images", metavar="FOLDER", help=f"images of --{part}-json")
    add_weights_argument(parser)
    add(
        "--backbone",
        metavar="NAME",
        help="network of torchvision or timm with an FPN, such as mobilenet_v2, torchvision/resnet50 or "
        "timm/resnet26d; --weights then is a file of its classifier",
    )
    add_fix_argument(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    _check_flags(args)
    cfg = _with_epochs(read_config(args), args)
    folder = Path(cfg.output_dir)
    is_first = not args.machine_rank and os.environ.get("RANK", "0") == "0"  # it has the results
    if args.eval_only:
        with tempfile.TemporaryDirectory(prefix="gn_detect-") as place:  # the run may keep its own results
            file = Path(place) / "results.json"
            _launch(partial(_evaluate, file), cfg, args)
            found = {"results": _read(file)} if is_first else {}
        return Result({"output_dir": str(folder), **found})
    _launch(_train, cfg, args)
    if not is_first:
        return Result({"output_dir": str(folder)})

    from ..engine.checkpoint import BEST, FINAL
    from ..progress import fitted
    from ..report.run_folder import read_run

    results = _read(folder / "results.json")
    files = {"config": folder / "config.yaml", "weights": folder / FINAL, "best": folder / BEST}
    written = {name: str(path) if path.is_file() else None for name, path in files.items()}
    best = read_run(folder).best
    if best and not best.is_last:
        print(fitted(printable(best), sys.stdout))
    print_end(cfg, results)
    return Result({"output_dir": str(folder), **written, "results": results})


def _check_flags(args: argparse.Namespace) -> None:
    if args.allow_changes and (args.eval_only or not args.resume):
        raise UserError(
            "lone-flag", "--allow-changes has an effect only where a training is resumed; add --resume to it"
        )
    if args.other_classes and not (args.eval_only or args.resume):
        raise UserError(
            "conflicting-flags",
            "--other-classes is for evaluation and --resume; from --weights of other classes, the layers for "
            "them start afresh without it",
        )

    flags = {"--epochs": args.epochs, "--time": args.time}
    lengths = [flag for flag, value in flags.items() if value is not None]
    if "SOLVER.MAX_ITER" in args.overrides[::2]:
        lengths.append("SOLVER.MAX_ITER")
    if len(lengths) > 1:
        raise UserError("conflicting-flags", f"{' and '.join(lengths)} both set the length; give one")
    if args.eval_only and (args.epochs is not None or args.time is not None):
        raise UserError("conflicting-flags", f"{lengths[0]} is for training; leave it out")
    if args.resume and args.time is not None:
        raise UserError("conflicting-flags", "--resume keeps the length of the run; leave --time out")


def _with_epochs(cfg: Config, args: argparse.Namespace) -> Config:
    """Return ``cfg`` with the length of ``--epochs``; ``--time`` is measured by the processes that train."""
    from ..engine.length import of_epochs, read_time

    if args.time is not None:
        args.time = read_time(args.time)
    if args.epochs is None:
        return cfg
    cfg = of_epochs(cfg, args.epochs, args.overrides[::2])
    if os.environ.get("RANK", "0") == "0":
        print(f"--epochs {args.epochs:g}: SOLVER.MAX_ITER {cfg.solver.max_iter}; periods and warm-up follow")
    return cfg


def print_end(cfg: Config, results: dict[str, Any]) -> None:
    """Print AP, the folder of the pictures, and the next commands."""
    from ..engine.checkpoint import BEST, FINAL

    folder = Path(cfg.output_dir)
    if isinstance(results.get("bbox"), dict):
        kinds = {"bbox": "box", "segm": "mask"}
        for ending, how in (("", ""), ("_TTA", ", with test-time augmentation")):
            values = {name: results.get(kind + ending, {}).get("AP") for kind, name in kinds.items()}
            known = [f"{name} AP {value:.1f}" for name, value in values.items() if value is not None]
            if known:
                print(", ".join(known) + how)
    if (folder / "pictures").is_dir():
        print(f"pictures of predictions, and the curves: {folder / 'pictures'}")
    best = next((folder / name for name in (BEST, FINAL) if (folder / name).is_file()), folder / FINAL)
    print("next: " + command("predict", str(best), _image_of(cfg)))
    print("      " + command("report", str(folder)))
    if "demo_train" in cfg.datasets.train:
        own = "--train-json train.json --train-images images --val-json val.json --val-images images"
        print("      " + command("train", *own.split()) + "   # your own data: docs/your-data.md")


def command(*words: str) -> str:
    """Return a command for a terminal, wrapped if it is long, with the program's path if it needs one."""
    from ..progress import WIDTH

    program = "gn-detect"
    if shutil.which(program) is None:  # its environment is not activated
        path = Path(sys.executable).with_name(program)
        program = os.path.relpath(path) if path.is_file() else f"{sys.executable} -m gn_detect"
    line = f"{program} {shlex.join(words)}"
    if any(shlex.quote(word) != word for word in words):
        return line
    parts = textwrap.wrap(line, WIDTH - len("next:  \\"), break_long_words=False, break_on_hyphens=False)
    return " \\\n          ".join(parts)


def _image_of(cfg: Config) -> str:
    """Return the path of an image of the first test set, or ``IMAGES`` without any."""
    from ..data.coco.reader import read_image_list
    from ..data.datasets import resolve_dataset
    from ..data.images import find_images

    try:
        source = resolve_dataset(cfg, cfg.datasets.test[0])
    except (IndexError, UserError):
        return "IMAGES"
    try:
        return str(find_images([str(source.images)])[0])
    except UserError:  # they lie in folders below
        return str(read_image_list(source.annotations, source.images, source.allow_outside)[0])


def _launch(function: Callable[..., None], cfg: Config, args: argparse.Namespace) -> None:
    """Call ``function(cfg, args)`` in the processes that the flags ask for."""
    from ..distributed import launch

    names = ("num_gpus", "num_machines", "machine_rank", "dist_url")
    flags = {name: getattr(args, name) for name in names}
    launch(function, (cfg, args), device=cfg.model.device, **flags)


def _train(cfg: Config, args: argparse.Namespace) -> None:
    from ..engine import train
    from ..engine.length import within

    if args.time is not None:
        cfg = within(cfg, args.time, args.overrides[::2])
    train(cfg, resume=args.resume, allow_changes=args.allow_changes, other_classes=args.other_classes)


def _evaluate(file: Path, cfg: Config, args: argparse.Namespace) -> None:
    from ..distributed.group import is_main
    from ..engine import evaluate
    from ..engine.evaluator import write_results

    results = evaluate(cfg, resume=args.resume, other_classes=args.other_classes)
    if is_main():
        write_results(file, results)


def _read(results: Path) -> Any:
    return json.loads(results.read_text(encoding="utf-8"))
