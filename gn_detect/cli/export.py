"""``gn-detect export``: a trained detector as one ONNX or ``.pt2`` file."""

from __future__ import annotations

import argparse

from .options import (
    add_config_arguments,
    add_fix_argument,
    add_weights_argument,
    read_config_file,
    take_checkpoint,
    take_weights,
)
from .output import Result

EXAMPLES = """
gn-detect export runs/one/model_best.pth --output model.onnx
gn-detect export model.pth --output model.pt2 --check images
gn-detect export --config-file runs/one/config.yaml --weights weights.pkl --output model.onnx
gn-detect predict model.onnx images
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "--output", metavar="FILE", default="model.onnx", help="model.onnx, or model.pt2 for torch.export"
    )
    parser.add_argument(
        "--check",
        nargs="+",
        metavar="IMAGE",
        help="compare the file's detections with the model's on these images, folders or patterns",
    )
    add_weights_argument(parser)
    add_fix_argument(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    """Write the file; 1 if its detections differ."""
    from ..data.image_paths import find_images
    from ..engine import Predictor
    from ..export import ExportedPredictor
    from ..export.parity import compare
    from ..export.write import check_target, export_detector
    from .inputs import split_overrides

    path = check_target(args.output)
    checked, keys = split_overrides(args.check or [])  # argparse takes KEY VALUE after --check as its images
    images = find_images(checked) if checked else []
    args.overrides = keys + take_checkpoint(args, args.overrides)
    take_weights(args)
    cfg = read_config_file(args).replace({"MODEL.DEVICE": "cpu"})
    predictor = Predictor(cfg)
    print(predictor.report)
    print(f"exporting to {path} (a minute or two for a large model)", flush=True)
    export_detector(predictor, path)
    size = path.stat().st_size
    print(f"wrote {path}: {size / 1e6:.0f} MB")
    written = {"output": str(path), "bytes": size}
    if not images:
        return Result(written)
    parity = compare(predictor, ExportedPredictor(path, trust=True), images)
    print(parity)
    return Result({**written, "parity": parity.to_dict()}, 0 if parity.within_tolerances else 1)
