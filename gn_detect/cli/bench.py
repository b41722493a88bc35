"""``gn-detect bench``: time and memory of a training step, of a detection, or of each norm."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.cases import LAYERS, Workload
from ..config import load_config
from ..errors import UserError
from ..files import atomic_write_json
from .options import add_config_arguments
from .output import Result

if TYPE_CHECKING:
    import torch

    from ..bench.norms import Step, Timing

EXAMPLES = """
gn-detect bench train
gn-detect bench infer --config-file quick/demo.yaml --size 224 320 --iterations 3 --output figures.json
gn-detect bench norm --no-compile --steps 0 --layer stem --iterations 3
gn-detect bench train --json                                  # the figures on standard output
"""

DEFAULT_CONFIG = "GN/mask_rcnn_R_50_FPN_3x_gn.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    workload = Workload()
    add("mode", choices=["train", "infer", "norm"])
    size = [workload.height, workload.width]
    add("--size", nargs=2, type=int, default=size, metavar=("HEIGHT", "WIDTH"), help="pixels")
    add("--images", type=int, default=workload.images, help="in a batch")
    add("--objects", type=int, default=workload.objects, help="in an image")
    add(
        "--iterations",
        type=int,
        default=10,
        help="timed steps; with norm, rounds of each norm (on a GPU as many as fit)",
    )
    add("--workload", metavar="FOLDER", help="keep images, annotations and proposals there")
    add("--output", metavar="FILE", help="write the figures as JSON there, too")
    norm = parser.add_argument_group("norm", "the norms of R-50-FPN at 800 x 1344, then whole training steps")
    norm.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    for flag, choices, text in (
        ("--layer", LAYERS, "of the model"),
        ("--dtype", ("float32", "bfloat16"), "of the activations"),
        ("--order", ("channels_first", "channels_last"), "of the memory"),
    ):
        names = ", ".join(f"'{name}'" if " " in name else name for name in choices)
        norm.add_argument(
            flag,
            action="append",
            choices=list(choices),
            metavar=flag[2:].upper(),
            help=f"{text}, alone; again for more; default: all of {names}",
        )
    norm.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes minutes"
    )
    norm.add_argument(
        "--steps", type=int, default=2, metavar="N", help="rounds of the training steps; 0: none"
    )
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    config = args.config_file or DEFAULT_CONFIG
    cfg = load_config(config, args.overrides)  # for norms, too: a wrong key is reported before they are timed
    if args.mode == "norm":
        return _run_norms(args, config)
    from ..bench.step import benchmark, describe_machine
    from ..distributed.group import resolve_device

    height, width = args.size
    workload = Workload(height, width, args.images, args.objects)
    folder = Path(args.workload) if args.workload else None
    report = benchmark(cfg, args.mode, workload, args.iterations, folder)
    machine = describe_machine(resolve_device(cfg.model.device))
    print(f"{config} {args.mode}, {args.images} x {height} x {width}, {machine}")
    print(report)
    if args.output:
        atomic_write_json(Path(args.output), vars(report))
    return Result(vars(report))


def _run_norms(args: argparse.Namespace, config: str) -> Result:
    import torch

    from ..bench import norms
    from ..bench.step import describe_machine

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no-gpu", "--device cuda: PyTorch finds no GPU here; use --device cpu")
    print(
        f"norms of R-50-FPN, {args.images} x 800 x 1344, {describe_machine(device)}; ratios: time over ours"
    )
    print(norms.header())
    timings: list[Timing] = []
    steps: dict[str, Step] = {}
    for timing in norms.benchmark_norms(
        device,
        args.images,
        args.layer or LAYERS,
        args.dtype or norms.DTYPES,
        args.order or norms.ORDERS,
        compiled=not args.no_compile,
        rounds=args.iterations,
    ):
        timings.append(timing)
        print(norms.row(timing), flush=True)
        _keep_norm_figures(args, device, timings, steps)
    print(norms.summary(timings), flush=True)
    if args.steps:
        size = [str(length) for length in args.size]
        arguments = ["--size", *size, "--images", str(args.images), "--objects", str(args.objects)]
        arguments += [*args.overrides, "MODEL.DEVICE", device.type]
        for steps in norms.compare_steps(config, arguments, args.steps):
            _keep_norm_figures(args, device, timings, steps)
        for name, step in steps.items():
            print(f"training step, {name:<10} {step}")
    return Result(_keep_norm_figures(args, device, timings, steps))


def _keep_norm_figures(
    args: argparse.Namespace, device: torch.device, timings: list[Timing], steps: dict[str, Step]
) -> dict[str, Any]:
    """Return the figures so far, and write them to ``--output``: an interrupted run loses nothing."""
    from ..bench.norms import as_json
    from ..bench.step import describe_machine

    figures = {
        "machine": describe_machine(device),
        "norms": as_json(timings),
        "steps": {name: vars(step) for name, step in steps.items()},
    }
    if args.output:
        atomic_write_json(Path(args.output), figures)
    return figures
