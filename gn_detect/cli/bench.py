"""``gn-detect bench``: time and memory of a training step or a detection, or of the norms one by one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..bench import norms as benchmark_norm
from ..bench.compare import Step, compare_steps
from ..bench.step import Workload, benchmark, describe_machine, write_report
from ..config import load_config
from ..distributed.group import resolve_device
from ..errors import UserError
from ..files import atomic_write_json
from .options import add_config_arguments
from .output import Result

HELP = "Time a training step or a detection part by part, or every norm beside PyTorch's."
EXAMPLES = """
gn-detect bench train
gn-detect bench infer --config-file quick/demo.yaml --size 224 320 --iterations 3 --json figures.json
gn-detect bench norm --no-compile --steps 0 --layer stem --iterations 3
gn-detect --json bench train                                  # the figures on standard output
"""

DEFAULT_CONFIG = "GN/mask_rcnn_R_50_FPN_3x_gn.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    workload = Workload()
    parser.add_argument("mode", choices=["train", "infer", "norm"])
    size = [workload.height, workload.width]
    parser.add_argument("--size", nargs=2, type=int, default=size, metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--images", type=int, default=workload.images, help="in a batch")
    parser.add_argument("--objects", type=int, default=workload.objects, help="in an image")
    parser.add_argument(
        "--iterations",
        type=int,
        default=10,
        help="timed steps; with norm, rounds of each norm (on a GPU as many as fit)",
    )
    parser.add_argument("--workload", metavar="FOLDER", help="leave images, annotations and proposals there")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    norm = parser.add_argument_group(
        "norm",
        "the norms of R-50-FPN at 800 x 1344, then whole training steps",
    )
    norm.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    for flag, choices, text in (
        ("--layer", benchmark_norm.LAYERS, "of the model"),
        ("--dtype", benchmark_norm.DTYPES, "of the activations"),
        ("--order", benchmark_norm.ORDERS, "of the memory"),
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
        "--no-compile", action="store_true", help="leave torch.compile out, which takes minutes"
    )
    norm.add_argument(
        "--steps", type=int, default=2, metavar="N", help="rounds of the training steps; 0: none"
    )
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    """Measure and print."""
    if args.mode == "norm":
        return _run_norms(args)
    name = args.config_file or DEFAULT_CONFIG
    cfg = load_config(name, args.overrides)
    height, width = args.size
    workload = Workload(height, width, args.images, args.objects)
    folder = Path(args.workload) if args.workload else None
    report = benchmark(cfg, args.mode, workload, args.iterations, folder)
    machine = describe_machine(resolve_device(cfg.model.device))
    print(f"{name} {args.mode}, {args.images} x {height} x {width}, {machine}")
    print(report)
    if args.json:
        write_report(Path(args.json), report)
    return Result(vars(report))


def _run_norms(args: argparse.Namespace) -> Result:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    config = args.config_file or DEFAULT_CONFIG
    load_config(config, args.overrides)  # a wrong key is told now, not behind all the norms
    print(
        f"norms of R-50-FPN, {args.images} x 800 x 1344, {describe_machine(device)}; ratios: time over ours"
    )
    print(benchmark_norm.header())
    timings: list[benchmark_norm.Timing] = []
    steps: dict[str, Step] = {}
    for timing in benchmark_norm.benchmark_norms(
        device,
        args.images,
        args.layer or benchmark_norm.LAYERS,
        args.dtype or benchmark_norm.DTYPES,
        args.order or benchmark_norm.ORDERS,
        compiled=not args.no_compile,
        rounds=args.iterations,
    ):
        timings.append(timing)
        print(benchmark_norm.row(timing), flush=True)
        _keep_norm_figures(args, device, timings, steps)
    print(benchmark_norm.summary(timings), flush=True)
    if args.steps:
        size = [str(length) for length in args.size]
        arguments = ["--size", *size, "--images", str(args.images), "--objects", str(args.objects)]
        arguments += [*args.overrides, "MODEL.DEVICE", device.type]
        for steps in compare_steps(config, arguments, args.steps):
            _keep_norm_figures(args, device, timings, steps)
        for name, step in steps.items():
            print(f"training step, {name:<10} {step}")
    return Result(_keep_norm_figures(args, device, timings, steps))


def _keep_norm_figures(
    args: argparse.Namespace,
    device: torch.device,
    timings: list[benchmark_norm.Timing],
    steps: dict[str, Step],
) -> dict[str, Any]:
    """Write what has been measured to ``--json``, and return it: a run that is cut off loses nothing."""
    figures = {
        "machine": describe_machine(device),
        "norms": benchmark_norm.as_json(timings),
        "steps": {name: vars(step) for name, step in steps.items()},
    }
    if args.json:
        atomic_write_json(Path(args.json), figures)
    return figures
