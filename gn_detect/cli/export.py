"""``gn-detect export``: a trained detector as one ONNX, ``.pt2`` or safetensors file, or on the Hub."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .options import (
    add_config_arguments,
    add_fix_argument,
    add_weights_argument,
    read_config_file,
    take_checkpoint,
    take_weights,
)
from .output import Result

if TYPE_CHECKING:
    from ..engine import Predictor
    from ..weights import CheckpointMetadata

EXAMPLES = """
gn-detect export runs/one/model_best.pth --output model.onnx
gn-detect export model.pth --output model.pt2 --check images
gn-detect export --config-file runs/one/config.yaml --weights weights.pkl --output model.onnx
gn-detect predict model.onnx images
gn-detect export runs/one/model_best.pth --push hf://me/shapes --license apache-2.0
"""

OUTPUT = "model.onnx"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--output",
        metavar="FILE",
        help=f"{OUTPUT} (by default), model.pt2 for torch.export, or model.safetensors for gn-detect itself; "
        "its model card is FILE.md",
    )
    add(
        "--push",
        metavar="hf://USER/REPO",
        help="upload safetensors, config and model card to the Hugging Face Hub in place of --output; a new "
        "repository is private",
    )
    add("--license", metavar="ID", default="", help="licence of the weights in the card")
    add(
        "--check",
        nargs="+",
        metavar="IMAGE",
        help="compare the file's detections with the model's on these images, folders or patterns",
    )
    add_weights_argument(parser)
    add_fix_argument(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    """Write the file and its card, or push them; 1 if the detections differ."""
    from ..config.shared import shared_values
    from ..data.images import find_images
    from ..engine import Predictor
    from ..export import ExportedPredictor
    from ..export.card import check_card, check_licence, model_card, write_card
    from ..export.parity import compare
    from ..export.write import SAFE, check_target, export_detector, export_weights
    from ..weights import known_config, read_checkpoint
    from .inputs import split_overrides

    if args.push and (args.output or args.check):
        raise UserError("conflicting-flags", "--push writes to the Hub alone; leave out --output and --check")
    path = check_target(args.output or OUTPUT) if not args.push else _check_push(args.push)
    if args.license:
        check_licence(args.license)
    if not args.push:
        check_card(path)
    checked, keys = split_overrides(args.check or [])  # argparse takes KEY VALUE after --check as its images
    if checked and path.suffix == SAFE:
        raise UserError("conflicting-flags", f"--check is for programs; {path} holds the weights as they are")
    images = find_images(checked) if checked else []
    args.overrides = keys + take_checkpoint(args, args.overrides)
    take_weights(args)
    cfg = read_config_file(args).replace({"MODEL.DEVICE": "cpu"})
    checkpoint = read_checkpoint(cfg.model.weights) if cfg.model.weights else None
    predictor = Predictor(cfg, checkpoint)
    assert checkpoint is not None  # Predictor has refused it
    print(predictor.report)
    metadata, inside = checkpoint.metadata, known_config(checkpoint)
    if inside is not None and shared_values(inside) != shared_values(cfg):
        metadata = replace(metadata, results={})  # they are of other settings
    card: dict[str, Any] = {"source": cfg.model.weights, "licence": args.license}
    if args.push:
        return _push(args.push, predictor, metadata, card)
    text = model_card(predictor, metadata, name=path.name, **card)
    if path.suffix == SAFE:
        export_weights(predictor, path, metadata.results)
    else:
        print(f"exporting to {path} (a minute or two for a large model)", flush=True)
        export_detector(predictor, path)
    size = path.stat().st_size
    written = write_card(path, text)
    print(f"wrote {path}: {size / 1e6:.0f} MB, and its model card {written}")
    found: dict[str, Any] = {"output": str(path), "bytes": size, "card": str(written)}
    if not images:
        return Result(found)
    parity = compare(predictor, ExportedPredictor(path, trust=True), images)
    print(parity)
    return Result({**found, "parity": parity.to_dict()}, 0 if parity.within_tolerances else 1)


def _check_push(name: str) -> Path:
    from ..weights.hub import WEIGHTS, read_name

    read_name(name)
    return Path(WEIGHTS)


def _push(name: str, predictor: Predictor, metadata: CheckpointMetadata, card: dict[str, Any]) -> Result:
    """Write the files of a repository into a temporary folder and upload them."""
    import tempfile

    from ..config.shared import shared_values
    from ..export.card import describe, model_card
    from ..export.write import export_weights
    from ..files import atomic_write_text
    from ..weights.hub import CARD, CONFIG, WEIGHTS, config_json, push

    text = model_card(predictor, metadata, name=name.partition("@")[0], **card)
    with tempfile.TemporaryDirectory(prefix="gn_detect-") as place:
        files = {file: Path(place) / file for file in (WEIGHTS, CONFIG, CARD)}
        record = export_weights(predictor, files[WEIGHTS], metadata.results)
        config = config_json(describe(predictor.cfg), record, shared_values(predictor.cfg))
        atomic_write_text(files[CONFIG], config)
        atomic_write_text(files[CARD], text)
        pushed, url = push(name, files)
    print(f"pushed {', '.join(files)} as {pushed}: {url}")
    return Result({"pushed": str(pushed), "url": url, "files": list(files)})
