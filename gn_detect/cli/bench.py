"""``gn-detect bench``: time and memory of a training step or a detection, or of the norms one by one."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..config import load_config
from ..engine import benchmark_norm
from ..engine.benchmark import Workload, benchmark, describe_machine, write_report
from ..engine.benchmark_step import compare_steps
from ..engine.distributed import resolve_device
from ..errors import UserError
from ..files import atomic_write_json
from .options import add_config_arguments
from .output import Result

HELP = "Time a training step or a detection part by part, or every norm beside PyTorch's."
EXAMPLES = """
gn-detect bench train
gn-detect bench infer --config-file quick/demo.yaml --size 224 320 --iterations 3 --json figures.json
gn-detect bench norm --no-compile --steps 0 --layers stem --iterations 3
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
        "the norms of R-50-FPN at 800 x 1344, then whole training steps;\n"
        "KEY VALUE pairs stand before --layers, --dtypes and --orders, or after a flag behind these",
    )
    norm.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    norm.add_argument(
        "--layers", nargs="+", choices=benchmark_norm.LAYERS, metavar="LAYER", help="default: all"
    )
    norm.add_argument("--dtypes", nargs="+", choices=benchmark_norm.DTYPES, help="default: all")
    norm.add_argument(
        "--orders", nargs="+", choices=benchmark_norm.ORDERS, help="memory order; default: both"
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
    print(f"{name} {args.mode}, {args.images} x {height} x {width}, {describe_machine(resolve_device(cfg))}")
    print(report)
    if args.json:
        write_report(Path(args.json), report)
    return Result(vars(report))


def _run_norms(args: argparse.Namespace) -> Result:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    print(
        f"norms of R-50-FPN, {args.images} x 800 x 1344, {describe_machine(device)}; ratios: time over ours"
    )
    print(benchmark_norm.header())
    timings = []
    for timing in benchmark_norm.benchmark_norms(
        device,
        args.images,
        args.layers or benchmark_norm.LAYERS,
        args.dtypes or benchmark_norm.DTYPES,
        args.orders or benchmark_norm.ORDERS,
        compiled=not args.no_compile,
        rounds=args.iterations,
    ):
        timings.append(timing)
        print(benchmark_norm.row(timing), flush=True)
    print(benchmark_norm.summary(timings))
    steps = {}
    if args.steps:
        config = args.config_file or DEFAULT_CONFIG
        size = [str(length) for length in args.size]
        arguments = ["--size", *size, "--images", str(args.images), "--objects", str(args.objects)]
        steps = compare_steps(config, [*arguments, *args.overrides, "MODEL.DEVICE", device.type], args.steps)
        for name, step in steps.items():
            print(f"training step, {name:<10} {step}")
    figures = {
        "machine": describe_machine(device),
        "norms": benchmark_norm.as_json(timings),
        "steps": {k: vars(v) for k, v in steps.items()},
    }
    if args.json:
        atomic_write_json(Path(args.json), figures)
    return Result(figures)
