"""``gn-detect bench``: time and memory of a training step or a detection."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import load_config
from ..engine.benchmark import Workload, benchmark, describe_machine, write_report
from ..engine.distributed import resolve_device
from .options import add_config_arguments

HELP = "Time a training step or a detection, part by part."
DEFAULT_CONFIG = "GN/mask_rcnn_R_50_FPN_3x_gn.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    workload = Workload()
    parser.add_argument("mode", choices=["train", "infer"])
    size = [workload.height, workload.width]
    parser.add_argument("--size", nargs=2, type=int, default=size, metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--images", type=int, default=workload.images, help="in a batch")
    parser.add_argument("--objects", type=int, default=workload.objects, help="in an image")
    parser.add_argument("--iterations", type=int, default=10, help="timed steps")
    parser.add_argument("--workload", metavar="FOLDER", help="leave images, annotations and proposals there")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
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
