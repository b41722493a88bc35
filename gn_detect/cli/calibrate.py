"""``gn-detect calibrate``: a converted checkpoint, closer to its original."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..config import load_config
from ..convert import ConversionReport, convert_norm
from ..errors import UserError
from ..modeling import make_model
from ..weights import (
    NORM_EPS,
    SUFFIXES,
    Checkpoint,
    InputConvention,
    load_weights,
    norm_settings,
    read_checkpoint,
    untold_keys_of,
)
from .calibration import add_calibration_arguments, calibrate_detector, calibrate_library_model
from .convert import (
    KEPT,
    add_group_arguments,
    check_outputs,
    group_rule,
    how_to_load,
    keys_to_tell,
    save_calibrated,
    show_report,
)
from .library_models import is_library_model, load_library_model
from .options import add_config_arguments, add_fix_argument, fix_config
from .output import Result

HELP = "Bring a converted checkpoint closer to its original, with images that need no labels."

EXAMPLES = """
gn-detect calibrate bn.pth gn.pth better.pth --config-file bn.yaml --images photos
gn-detect calibrate bn.pth gn.pth better.pth --config-file bn.yaml --images photos --checkpoint calibration.pt
gn-detect calibrate resnet50 resnet50_gn.pth better.pth --weights DEFAULT --images photos --steps 800
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "original", metavar="ORIGINAL", help="checkpoint with BatchNorm, or a model of torchvision or timm"
    )
    parser.add_argument("converted", metavar="CONVERTED", help="what gn-detect convert made of it")
    parser.add_argument("target", metavar="DST", help="checkpoint to write: .pth, .pkl or .safetensors")
    parser.add_argument(
        "--weights", metavar="W", help="of a model: a file, DEFAULT, or IMAGENET1K_V1 and so on"
    )
    add_group_arguments(parser)
    add_calibration_arguments(parser, required=True)
    parser.add_argument("--report", metavar="FILE", help="report.json; a picture is written beside it")
    add_fix_argument(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> Result:
    """Write DST and print how near each norm is.

    Raises:
        UserError: one of the files does not fit, or there is no config for a detector.
    """
    target = Path(args.target)
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target} must end in {', '.join(SUFFIXES)}")
    args.source = args.original
    check_outputs(args, target, args.original, args.converted)
    metadata: dict[str, Any] = {}
    names_model = not Path(args.original).exists() and is_library_model(args.original)
    if names_model:
        found = load_library_model(args.original, args.weights)
        model, report = _converted(args, found.model, read_checkpoint(args.converted))
        calibrate_library_model(args, found, model, report)
    elif not args.config_file:
        raise UserError("--images needs the detector's --config-file, the one that ORIGINAL was trained with")
    else:
        checkpoint = read_checkpoint(args.original)
        cfg = load_config(args.config_file, args.overrides)
        cfg = fix_config(cfg, checkpoint) if args.fix_config else cfg
        original = make_model(cfg)
        load_weights(original, checkpoint, config=cfg)
        original.eval()
        converted = read_checkpoint(args.converted)
        model, report = _converted(args, original, converted)
        calibrate_detector(args, cfg, original, model, report)
        metadata = {key: converted.metadata[key] for key in KEPT if key in converted.metadata}
        metadata["input"] = InputConvention.of_config(cfg).as_metadata()
        metadata |= keys_to_tell(untold_keys_of(cfg))
    metadata |= norm_settings(model)
    save_calibrated(args, target, dict(model.state_dict()), metadata)
    show_report(report, args.report)
    print(f"wrote {target}; {how_to_load(args, target, not names_model, names_model, NORM_EPS in metadata)}")
    return Result({"weights": str(target), **report.to_dict()})


def _converted(
    args: argparse.Namespace, original: nn.Module, checkpoint: Checkpoint
) -> tuple[nn.Module, ConversionReport]:
    """The original's GroupNorm twin with the converted weights."""
    model, report = convert_norm(original, **group_rule(args))
    load_weights(model, checkpoint)
    for layer in report.layers:  # the file's, which may have other names
        layer.eps = cast(nn.GroupNorm, model.get_submodule(layer.name)).eps
    return model, report
