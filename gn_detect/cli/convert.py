"""``gn-detect convert``: a BatchNorm checkpoint becomes a GroupNorm checkpoint."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import Config, dump_config, load_config, without_paths
from ..config.load import parse_config
from ..config.types import to_plain
from ..convert import ConversionReport, convert_norm, convert_state_dict
from ..convert.surgery import DEFAULT_GROUPS, DEFAULT_MIN_CHANNELS
from ..errors import UserError
from ..files import check_writable
from ..modeling import make_model
from ..text import printable
from ..weights import (
    CONFIG_KEYS,
    NORM_EPS,
    SUFFIXES,
    Checkpoint,
    InputConvention,
    as_metadata,
    computes_with_eps_0,
    group_keys,
    load_weights,
    norm_eps_of,
    norm_groups_of,
    norm_settings,
    read_checkpoint,
    save_weights,
    standardised_convs,
    translate,
    untold_group_norms,
    untold_keys,
    untold_keys_of,
)
from .calibration import add_calibration_arguments, calibrate_detector, calibrate_library_model
from .library_models import DEFAULT, is_library_model, load_library_model
from .options import add_config_arguments, add_fix_argument, fix_config
from .output import Result

HELP = "Convert a checkpoint from BatchNorm to GroupNorm."

EXAMPLES = """
gn-detect convert model_bn.pth model_gn.pth                       # any library's state dict, without data
gn-detect convert bn.pth gn.pth --config-file bn.yaml --images photos --report report.json
gn-detect convert resnet50 resnet50_gn.pth --weights DEFAULT --images photos --checkpoint calibration.pt
gn-detect convert --keep-norm zoo://R-50-GN R-50-GN.safetensors   # other names or another format alone
"""

KEPT = ("class_names", "category_ids")
"""Of the metadata; a schedule or an optimizer's state would not fit the converted model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="checkpoint with BatchNorm, or a model of torchvision (resnet50) or timm (timm/resnet50)",
    )
    parser.add_argument("target", metavar="DST", help="checkpoint to write: .pth, .pkl or .safetensors")
    parser.add_argument(
        "--format", choices=[suffix[1:] for suffix in SUFFIXES], help="for a DST without ending"
    )
    parser.add_argument(
        "--keep-norm", action="store_true", help="only change names to detectron2's, and the format"
    )
    parser.add_argument(
        "--weights", metavar="W", help=f"of a model: a file, {DEFAULT}, or IMAGENET1K_V1 and so on"
    )
    add_group_arguments(parser)
    parser.add_argument(
        "--eps",
        type=float,
        help="of the BatchNorms in a checkpoint; by default that of the library with its names, else 1e-5",
    )
    parser.add_argument(
        "--relative-eps",
        type=float,
        default=0.0,
        metavar="PART",
        help="of each layer's expected variance, added to its eps, as 0.3: keeps more of the function and "
        "normalises less; needs a model, or a detector's --config-file",
    )
    add_calibration_arguments(
        parser.add_argument_group("calibration", "needs a model, or a detector's --config-file")
    )
    parser.add_argument("--report", metavar="FILE", help="report.json; a picture is written beside it")
    add_fix_argument(parser)
    add_config_arguments(parser)


def add_group_arguments(parser: argparse.ArgumentParser) -> None:
    """How channels are split into groups."""
    parser.add_argument("--num-groups", type=int, default=DEFAULT_GROUPS, help="of each norm at most")
    parser.add_argument(
        "--min-channels-per-group",
        type=int,
        default=DEFAULT_MIN_CHANNELS,
        help="narrow layers get fewer groups",
    )


def run(args: argparse.Namespace) -> Result:
    """Write DST, print the report, and say which config keys it needs."""
    target = _target(args)
    check_outputs(args, target, args.source)
    if args.keep_norm and args.relative_eps:
        raise UserError("--relative-eps converts norms, and --keep-norm keeps them; leave one away")
    if args.keep_norm:
        return _rewrite(args, target)
    names_model = not Path(args.source).exists() and is_library_model(args.source)
    if args.weights and not names_model:
        raise UserError(f"--weights is for the name of a model, and {args.source} is none")
    if args.images and not args.config_file and not names_model:
        raise UserError("--images needs the detector's --config-file, the one that SRC was trained with")
    metadata: dict[str, Any] = {}
    for_config, for_module = not names_model, names_model
    if names_model:
        tensors, metadata, report = _convert_library_model(args)
    else:
        checkpoint = read_checkpoint(args.source)
        metadata = {key: checkpoint.metadata[key] for key in KEPT if key in checkpoint.metadata}
        if args.config_file:
            cfg = load_config(args.config_file, args.overrides)
            cfg = fix_config(cfg, checkpoint) if args.fix_config else cfg
            tensors, told, report = _convert_detector(args, cfg, checkpoint)
            metadata |= told
            metadata["input"] = InputConvention.of_config(cfg).as_metadata()
            metadata |= keys_to_tell(untold_keys_of(cfg))
        else:
            if args.relative_eps:
                raise UserError("--relative-eps needs the detector's --config-file, or the name of a model")
            if standardised_convs(checkpoint):  # what tells of them, its config, does not stay in DST
                raise UserError(
                    f"{args.source} standardises weights (ConvWS); fold that first with gn-detect convert "
                    "--keep-norm, and convert what it writes"
                )
            metadata |= _input_of(checkpoint) | keys_to_tell(untold_keys(checkpoint))
            translation = translate(checkpoint)
            for_module = not translation.is_detector  # its names stay, so that its own model takes the file
            for_config = translation.is_detector or translation.is_backbone
            named = checkpoint.stored if for_module else checkpoint.tensors
            eps = 0.0 if args.eps is None and computes_with_eps_0(checkpoint) else args.eps
            tensors, report = convert_state_dict(named, eps=eps, **group_rule(args))
            _refuse_untold_groups(args, checkpoint)
            metadata |= as_metadata(
                norm_eps_of(checkpoint, named) | {layer.name: layer.eps for layer in report.layers},
                norm_groups_of(checkpoint, named) | {layer.name: layer.groups for layer in report.layers},
            )
    save_calibrated(args, target, tensors, metadata)
    show_report(report, args.report)
    print(f"wrote {target}; {how_to_load(args, target, for_config, for_module, NORM_EPS in metadata)}")
    return Result({"weights": str(target), **report.to_dict()})


def check_outputs(args: argparse.Namespace, target: Path, *inputs: str) -> None:
    """Before anything is computed: that each file can be written, and takes the place of no other.

    Raises:
        UserError: it names the file, or a checkpoint is for no calibration.
    """
    if args.checkpoint and not (args.images and args.steps):
        raise UserError("--checkpoint belongs to a calibration; give --images and --steps, or leave it out")
    picture = Path(args.report).with_suffix(".png") if args.report and args.images else None
    written = [("DST", target), ("--report", args.report), ("--report's picture", picture)]
    written.append(("--checkpoint", args.checkpoint))
    read = [*inputs, args.weights, args.images, args.config_file]
    places = {os.path.realpath(path): path for path in read if path}
    for name, path in written:
        if path is None:
            continue
        place = os.path.realpath(path)
        if place in places:
            raise UserError(f"{name} {path} would replace {places[place]}; choose another name")
        places[place] = path
        check_writable(path)


def save_calibrated(
    args: argparse.Namespace, target: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> None:
    """Write DST; only then the calibration's checkpoint has served its purpose."""
    save_weights(target, tensors, metadata)
    if args.checkpoint:  # with --images and --steps, as check_outputs sees to
        Path(args.checkpoint).unlink(missing_ok=True)


def show_report(report: ConversionReport, path: str | None) -> None:
    """Print it, and write it and its picture where ``--report`` says."""
    print(report)
    if path:
        report.save(path)
        if report.similarity:
            report.draw(Path(path).with_suffix(".png"))


def _target(args: argparse.Namespace) -> Path:
    """DST; ``--format`` gives it an ending if it has none."""
    target = Path(args.target)
    if args.format and target.suffix not in SUFFIXES:
        return target.with_name(f"{target.name}.{args.format}")
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target} must end in {', '.join(SUFFIXES)}, or add --format")
    if args.format and target.suffix != f".{args.format}":
        raise UserError(f"--format {args.format}, but {target} ends in {target.suffix}")
    return target


def _rewrite(args: argparse.Namespace, target: Path) -> Result:
    """The same weights with detectron2's names in another format."""
    checkpoint = read_checkpoint(args.source)
    translation = translate(checkpoint)
    kept = {key: checkpoint.metadata[key] for key in (*KEPT, "config") if key in checkpoint.metadata}
    known = translation.is_detector or translation.is_backbone
    tensors = translation.tensors if known else checkpoint.stored  # its own model takes the file
    if isinstance(kept.get("config"), str):
        with suppress(UserError):  # the config of another program
            kept["config"] = dump_config(without_paths(parse_config(kept["config"])))
    kept |= as_metadata(norm_eps_of(checkpoint, tensors), norm_groups_of(checkpoint, tensors))
    if "config" not in kept and (keys := untold_keys(checkpoint)):
        kept[CONFIG_KEYS] = to_plain(keys)
    save_weights(target, tensors, kept | _input_of(checkpoint))
    names = f"names of {translation.scheme}" if known else "names as they were"
    print(f"wrote {len(tensors)} tensors to {target}; {names}")
    for change in translation.changes:
        print(f"  {printable(change)}")
    if translation.left_out:
        names = printable(", ".join(translation.left_out))
        print(f"  left out, as detectron2 has no name for them: {names}")
    told = {
        "tensors": len(tensors),
        "names": translation.scheme,
        "left_out": translation.left_out,
    }
    return Result({"weights": str(target), **told})


def keys_to_tell(keys: dict[str, Any]) -> dict[str, Any]:
    """What to add to a converted file's metadata. It tells the groups and the eps of each norm elsewhere."""
    kept = {key: value for key, value in keys.items() if not key.startswith("MODEL.GN.")}
    return {CONFIG_KEYS: to_plain(kept)} if kept else {}


def _input_of(checkpoint: Checkpoint) -> dict[str, Any]:
    convention = translate(checkpoint).convention
    return {} if convention is None else {"input": convention.as_metadata()}


def how_to_load(
    args: argparse.Namespace, target: Path, for_config: bool, for_module: bool, tells_eps: bool
) -> str:
    """Return what to do with DST, in words.

    Args:
        for_config: it is a detector or the backbone of one, which a config of ours can build.
        for_module: it has the names of another library's model.
        tells_eps: it holds the eps of each norm.
    """
    ways = []
    if for_module:
        rule = ", ".join(f"{key}={value}" for key, value in group_rule(args).items())
        rule += f", eps=its '{NORM_EPS}'" if tells_eps else ""
        ways.append(f"load its 'model' into gn_detect.convert_norm(model, init='reset', {rule})[0]")
    if for_config:
        smallest = f"MODEL.GN.MIN_CHANNELS_PER_GROUP {args.min_channels_per_group}"
        keys = f"MODEL.GN.NUM_GROUPS {args.num_groups} {smallest}"
        ways.append(
            f"set the NORM keys that were BN, SyncBN or FrozenBN to GN, and MODEL.WEIGHTS {target} {keys}; "
            f"gn-detect train --train-json FILE --train-images FOLDER --weights {target} finds them by itself"
        )
    return "; or, as a detector's backbone, ".join(ways)


def _refuse_mixed_groups(model: nn.Module) -> None:
    """Norms that were GroupNorms before keep their groups, and a config has one rule for all.

    Raises:
        UserError: no rule gives these groups.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    if norms and group_keys({(norm.num_channels, norm.num_groups) for norm in norms}) is None:
        raise UserError(
            "the detector's own GroupNorms keep their groups, and no MODEL.GN gives these and those of the "
            "converted norms; add --num-groups and --min-channels-per-group as in its config, mostly "
            "--min-channels-per-group 1"
        )


def _refuse_untold_groups(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """As :func:`_refuse_mixed_groups`, of a file without a config, whose GroupNorms may have any groups.

    Raises:
        UserError: it has such, and the converted ones would have other groups than detectron2's.
    """
    untold = untold_group_norms(checkpoint)
    if untold and args.min_channels_per_group > 1:
        raise UserError(
            f"{len(untold)} norms of {args.source} are GroupNorms already, such as '{untold[0]}', and keep "
            "their groups, which the file does not tell; give its --config-file, or "
            "--min-channels-per-group 1 if they are detectron2's 32 groups"
        )


def group_rule(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of :func:`gn_detect.convert_norm`.

    Raises:
        UserError: a number is below 1.
    """
    if min(args.num_groups, args.min_channels_per_group) < 1:
        raise UserError("--num-groups and --min-channels-per-group are at least 1")
    return {"num_groups": args.num_groups, "min_channels_per_group": args.min_channels_per_group}


def _convert_library_model(
    args: argparse.Namespace,
) -> tuple[dict[str, Tensor], dict[str, Any], ConversionReport]:
    """State dict, metadata, report."""
    found = load_library_model(args.source, args.weights)
    model, report = convert_norm(found.model, relative_eps=args.relative_eps, **group_rule(args))
    if args.images:
        calibrate_library_model(args, found, model, report)
    return dict(model.state_dict()), norm_settings(model), report


def _convert_detector(
    args: argparse.Namespace, cfg: Config, checkpoint: Checkpoint
) -> tuple[dict[str, Tensor], dict[str, Any], ConversionReport]:
    """State dict, metadata, report."""
    original = make_model(cfg)
    load_weights(original, checkpoint, config=cfg)
    original.eval()
    model, report = convert_norm(original, relative_eps=args.relative_eps, **group_rule(args))
    _refuse_mixed_groups(model)
    if args.images:
        calibrate_detector(args, cfg, original, model, report)
    return dict(model.state_dict()), norm_settings(model), report
