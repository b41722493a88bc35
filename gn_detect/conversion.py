"""Convert checkpoints from BatchNorm to GroupNorm: the work of ``gn-detect convert`` and ``calibrate``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .config import Config, dump_config, load_config, without_paths
from .config.types import to_plain
from .convert import ConversionReport, calibrate, choose_settings, convert_norm, convert_state_dict
from .convert.images import random_window
from .convert.surgery import DEFAULT_GROUPS, DEFAULT_MIN_CHANNELS
from .data import prepare_image, read_image, read_image_list
from .data.images import find_images
from .errors import UserError
from .files import check_writable
from .interop.library_models import LibraryModel, is_library_model, load_library_model
from .modeling import make_model, paired_outputs
from .text import printable
from .weights import (
    CONV_KEYS,
    SUFFIXES,
    Checkpoint,
    CheckpointMetadata,
    InputConvention,
    Translation,
    as_command_line,
    computes_with_eps_0,
    config_of_converted,
    folded,
    group_keys,
    implied_keys,
    known_config,
    library_config,
    load_weights,
    norm_metadata,
    norm_settings,
    norms_of,
    norms_of_unspecified_groups,
    read_checkpoint,
    save_weights,
    translate,
    trunk_of,
    unspecified_keys,
    unspecified_keys_of,
)

GROUPS = {"num_groups": DEFAULT_GROUPS, "min_channels_per_group": DEFAULT_MIN_CHANNELS}
DETECTOR_STEPS = 400  # by default: a step of a detector takes seconds
WINDOWS, WINDOWS_BYTES = 16, 2**30  # cut from a photo at most, and of all; 1,783 of 224 x 224 pixels


@dataclass
class CheckpointReport(ConversionReport):
    """The report of :func:`convert_checkpoint`; ``str`` adds the way to load the file.

    Attributes:
        weights: path of the checkpoint that was written.
        usage: instructions for loading it.
        fixed_keys: config keys that ``fix_config`` set; None without it.
        choice: groups and relative eps that were chosen on the images, with the reason; else empty.
    """

    weights: str = ""
    usage: str = ""
    fixed_keys: dict[str, Any] | None = None
    choice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the content as JSON values, without the text for people."""
        content = super().to_dict()
        return {key: value for key, value in content.items() if key not in ("usage", "fixed_keys", "choice")}

    def __str__(self) -> str:
        chosen = [self.choice] if self.choice else []
        lines = [super().__str__(), *chosen, f"wrote {self.weights}; {self.usage}"]
        if self.fixed_keys is not None:
            keys = as_command_line(self.fixed_keys) if self.fixed_keys else "nothing to set"
            lines.insert(0, f"--fix-config: {keys}")
        return "\n".join(lines)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    images: str | Path | None = None,
    config: str | Path | Config | None = None,
    *,
    overrides: Sequence[str] = (),
    fix_config: bool = False,
    converted: str | Path | None = None,
    weights: str | Path | None = None,
    num_groups: int | None = None,
    min_channels_per_group: int | None = None,
    eps: float | None = None,
    relative_eps: float | None = None,
    image_folder: str | Path | None = None,
    max_images: int = 500,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float = 1e-4,
    norm_learning_rate: float = 2e-3,
    block_weight: float = 30.0,
    rescale: bool = True,
    checkpoint: str | Path | None = None,
    report_file: str | Path | None = None,
) -> CheckpointReport:
    """Convert a BatchNorm checkpoint to GroupNorm, and write it with its groups and eps.

    Without ``images`` the weights follow from the running statistics (:func:`gn_detect.convert_norm`). With
    images, which need no labels, they are calibrated on the original (:func:`gn_detect.calibrate`). That
    needs the model: a detector's config, or the name of a model of torchvision or timm.

    Args:
        source: a checkpoint of any library, or a model: ``resnet50`` of torchvision, ``timm/resnet50``.
        target: file to write: ``.pth``, ``.pt``, ``.pkl`` or ``.safetensors``.
        images: a folder, an image, a pattern such as ``photos/*.jpg``, or a COCO JSON that names images.
        config: the config that ``source``, a detector, was trained with.
        overrides: config keys and values in turn, on top of a config file.
        fix_config: set the input's keys (format, mean, deviation, stride) to those of the source.
        converted: an earlier conversion of ``source``, with its own eps, to calibrate further.
        weights: of a model: a file, ``DEFAULT``, or the name of published weights (``IMAGENET1K_V1``).
        num_groups, min_channels_per_group: see :func:`gn_detect.layers.choose_groups`; by default 32 and 16,
            and for a model with ``images`` chosen on these.
        eps: of the BatchNorms in a checkpoint without config; by default that of the library whose names
            the tensors have, else 1e-5.
        relative_eps: see :func:`gn_detect.convert_norm`; by default 0, and for a model with ``images``
            chosen on these (:func:`gn_detect.convert.choose_settings`).
        image_folder: folder of a COCO JSON's images; by default the JSON's own.
        max_images: calibrate on at most so many images, spread over all.
        steps, learning_rate, norm_learning_rate, block_weight: see :func:`gn_detect.calibrate`; a
            detector has 400 steps by default.
        rescale: let the calibration rescale channels; not for weights that are to be fine-tuned, which then
            learn more slowly.
        batch_size: images in each step; by default 2 for detectors and 8 for other models.
        checkpoint: file to continue an interrupted calibration from; deleted when ``target`` is written.
        report_file: JSON to write the report to; with ``images`` a picture (``.png``) is written next to it.

    Returns:
        A report with each norm, the warnings and the way to load the file; ``str`` gives a table.

    Raises:
        UserError: an output cannot be written or would replace another file; an input cannot be read or
            does not fit the others; or a norm cannot be converted. No checkpoint is written then. Messages
            name the arguments by the command's flags.
    """
    source, target = str(source), Path(target)
    flags = {"num_groups": num_groups, "min_channels_per_group": min_channels_per_group}
    given = {name: value for name, value in flags.items() if value is not None}
    if min(given.values(), default=1) < 1:
        raise UserError("bad-argument", "--num-groups and --min-channels-per-group are at least 1")
    groups: dict[str, Any] = dict(GROUPS, **given)
    if checkpoint and not (images and steps != 0):
        raise UserError(
            "lone-flag", "--checkpoint belongs to a calibration; give --images and --steps, or leave it out"
        )
    picture = Path(report_file).with_suffix(".png") if report_file and images else None
    config_file = None if isinstance(config, Config) else config
    _check_files(
        {"DST": target, "--report": report_file, "--report's picture": picture, "--checkpoint": checkpoint},
        [source, converted, weights, images, config_file],
    )
    is_model = not Path(source).exists() and is_library_model(source)
    if not is_model and not config:  # its own: only the library can build the model
        config = library_config(read_checkpoint(source))
    if weights and not is_model:
        raise UserError("conflicting-flags", f"--weights is for the name of a model, and {source} is none")
    if images and not config and not is_model:
        raise UserError(
            "no-config",
            f"--images needs the detector's --config-file, the one that {source} was trained with",
        )
    if relative_eps and not config and not is_model:
        raise UserError(
            "no-config", "--relative-eps needs the detector's --config-file, or the name of a model"
        )
    if converted and (eps is not None or relative_eps):
        raise UserError(
            "conflicting-flags", f"{converted} has its own eps; leave --eps and --relative-eps out"
        )
    rates = {"learning_rate": learning_rate, "norm_learning_rate": norm_learning_rate}
    settings: dict[str, Any] = {
        **rates,
        "block_weight": block_weight,
        "rescale": rescale,
        "checkpoint": checkpoint,
    }

    fixed_keys, for_config, for_module, choice = None, not is_model, is_model, ""
    earlier = read_checkpoint(converted) if converted else None
    if earlier and not given:
        groups = _groups_of(earlier)
    if is_model:
        found = load_library_model(source, None if weights is None else str(weights))
        part = relative_eps or 0.0
        if images:
            inputs = _prepare_images(found, source, images, _find_images(images, image_folder, max_images))
            decided = given if relative_eps is None else given | {"relative_eps": relative_eps}
            if not earlier and len(decided) < 3:
                groups, part, choice = _choose(found.model, inputs, decided)
        model, report = _convert_model(found.model, earlier, part, groups)
        if images:
            size = batch_size or 8
            calibrate(found.model, model, inputs, steps, batch_size=size, report=report, **settings)
        tensors, metadata = dict(model.state_dict()), norm_settings(model)
    elif config:
        original = read_checkpoint(source)
        cfg = config if isinstance(config, Config) else load_config(config, overrides)
        if fix_config:
            fixed_keys = implied_keys(cfg, original)
            cfg = cfg.replace(fixed_keys)
        detector = make_model(cfg)
        load_weights(detector, original, config=cfg)
        detector.eval()
        model, report = _convert_model(detector, earlier, relative_eps or 0.0, groups)
        if not earlier:
            _refuse_mixed_groups(model)
        if images:
            paths = _find_images(images, image_folder, max_images, cfg.datasets.allow_outside)
            pictures = [prepare_image(read_image(path, "RGB"), cfg) for path in paths]
            size = batch_size or 2
            batches = [pictures[start : start + size] for start in range(0, len(pictures), size)]
            steps = DETECTOR_STEPS if steps is None else steps
            calibrate(detector, model, batches, steps, outputs=paired_outputs, report=report, **settings)
        tensors = dict(model.state_dict())
        metadata = _metadata(earlier or original, norm_settings(model), tensors, original, cfg)
    else:
        original = read_checkpoint(source)
        translation = translate(original)
        for_config = translation.is_detector or translation.is_backbone
        for_module = not translation.is_detector
        tensors, metadata, report = _convert_tensors(original, translation, eps, groups)

    save_weights(target, tensors, metadata)
    if checkpoint:  # only now it has served its purpose
        Path(checkpoint).unlink(missing_ok=True)
    if report_file:
        report.save(report_file)
        if picture:
            report.draw(picture)
    usage = _usage(target, groups, for_config, for_module, has_eps=bool(metadata.group_norm_eps))
    if is_model:
        usage += f"; or, as a detector's backbone, gn-detect train --backbone {source} --weights {target}"
    return CheckpointReport(
        **vars(report), weights=str(target), usage=usage, fixed_keys=fixed_keys, choice=choice
    )


def _check_files(
    written: Mapping[str, str | Path | None], read: Sequence[str | Path | Config | None]
) -> None:
    """Check, before anything is computed, that each output can be written and replaces no other file."""
    target = Path(written["DST"] or "")
    if target.suffix not in SUFFIXES:
        raise UserError("wrong-ending", f"{target} must end in {', '.join(SUFFIXES)}")
    places = {os.path.realpath(str(path)): path for path in read if path}
    for name, path in written.items():
        if path is None:
            continue
        place = os.path.realpath(path)
        if place in places:
            raise UserError(
                "replaced-file", f"{name} {path} would replace {places[place]}; choose another name"
            )
        places[place] = path
        check_writable(path)


def _convert_model(
    original: nn.Module, earlier: Checkpoint | None, relative_eps: float, groups: dict[str, Any]
) -> tuple[nn.Module, ConversionReport]:
    """Return the GroupNorm model, with the weights and eps of an earlier conversion if there is one."""
    model, report = convert_norm(original, relative_eps=relative_eps, **groups)
    if earlier:
        load_weights(model, earlier)
        for layer in report.layers:
            layer.eps = cast(nn.GroupNorm, model.get_submodule(layer.name)).eps
    return model, report


def _convert_tensors(
    checkpoint: Checkpoint, translation: Translation, eps: float | None, groups: dict[str, Any]
) -> tuple[dict[str, Tensor], CheckpointMetadata, ConversionReport]:
    """Convert a state dict. A detector's gets detectron2's names; another keeps those of its own model."""
    named = checkpoint.tensors if translation.is_detector else checkpoint.stored
    if eps is None and computes_with_eps_0(checkpoint):
        eps = 0.0
    tensors, report = convert_state_dict(named, eps=eps, **groups)
    unknown = norms_of_unspecified_groups(checkpoint)
    if unknown and groups["min_channels_per_group"] > 1:
        raise UserError(
            "unknown-groups",
            f"{len(unknown)} norms of {checkpoint.path} are GroupNorms already, such as '{unknown[0]}', and "
            "keep their groups, which the file does not give; give its --config-file, or "
            "--min-channels-per-group 1 if they are detectron2's 32 groups",
        )
    known = norms_of(checkpoint, named)
    norms = norm_metadata(
        known.group_norm_eps | {layer.name: layer.eps for layer in report.layers},
        known.group_norm_groups | {layer.name: layer.groups for layer in report.layers},
    )
    norms = replace(norms, weight_standardization=known.weight_standardization)
    return tensors, _metadata(checkpoint, norms, tensors, checkpoint), report


def _refuse_mixed_groups(model: nn.Module) -> None:
    """Refuse groups that no config gives: GroupNorms of before keep theirs, and a config has one rule."""
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    if norms and group_keys({(norm.num_channels, norm.num_groups) for norm in norms}) is None:
        raise UserError(
            "unknown-groups",
            "the detector's own GroupNorms keep their groups, and no MODEL.GN gives these and those of the "
            "converted norms; add --num-groups and --min-channels-per-group as in its config, mostly "
            "--min-channels-per-group 1",
        )


def _metadata(
    described: Checkpoint,
    norms: CheckpointMetadata,
    tensors: dict[str, Tensor],
    original: Checkpoint,
    cfg: Config | None = None,
) -> CheckpointMetadata:
    """Return the metadata of a converted checkpoint.

    Args:
        described: the original, or an earlier conversion of it, whose classes and input stay. Its schedule
            and optimizer state would not fit the converted model, and are left out.
        norms: eps and groups of the norms.
        tensors: converted weights.
        original: weights of before.
        cfg: the original's config, if it was given.
    """
    if cfg is None:
        translation = translate(described)
        keys, convention = unspecified_keys(described), translation.convention
        cfg = known_config(described) if translation.is_detector else None
    else:
        keys, convention = unspecified_keys_of(cfg), InputConvention.of_config(cfg)
    return replace(
        norms,
        class_names=described.metadata.class_names,
        category_ids=described.metadata.category_ids,
        input=convention,
        config=None if cfg is None else config_of_converted(cfg, Checkpoint(tensors, norms), original),
        # The file has the groups and the eps of each norm elsewhere.
        config_keys=to_plain({key: value for key, value in keys.items() if not key.startswith("MODEL.GN.")}),
    )


def _usage(target: Path, groups: dict[str, Any], for_config: bool, for_module: bool, has_eps: bool) -> str:
    """Return instructions for loading the file.

    Args:
        for_config: it is a detector or the backbone of one, which a config of ours can build.
        for_module: it has the names of another library's model.
        has_eps: it holds the eps of each norm.
    """
    ways = []
    if for_module:
        rule = ", ".join(f"{key}={value}" for key, value in groups.items())
        rule += ", eps=its 'group_norm_eps'" if has_eps else ""
        ways.append(f"load its 'model' into gn_detect.convert_norm(model, init='reset', {rule})[0]")
    if for_config:
        keys = " ".join(f"MODEL.GN.{key.upper()} {value}" for key, value in groups.items())
        ways.append(
            f"set the NORM keys that were BN, SyncBN or FrozenBN to GN, and MODEL.WEIGHTS {target} {keys}; "
            f"gn-detect train --train-json FILE --train-images FOLDER --weights {target} finds them by itself"
        )
    return "; or, as a detector's backbone, ".join(ways)


def _groups_of(converted: Checkpoint) -> dict[str, Any]:
    """Return the groups of an earlier conversion, and the default if one rule does not give them."""
    layers = {
        (len(converted.tensors[f"{name}.weight"]), groups)
        for name, groups in converted.metadata.group_norm_groups.items()
        if f"{name}.weight" in converted.tensors
    }
    found = group_keys(layers) if layers else None
    return dict(GROUPS) if found is None else dict(zip(GROUPS, found, strict=True))


def _choose(
    original: nn.Module, images: Tensor, decided: dict[str, Any]
) -> tuple[dict[str, Any], float, str]:
    """Return the groups, the relative eps, and the reason if they were not decided before."""
    chosen = choose_settings(original, images, decided)
    part: float = chosen.settings["relative_eps"]
    groups = {name: value for name, value in chosen.settings.items() if name in GROUPS}
    return groups, part, str(chosen)


def _prepare_images(found: LibraryModel, name: str, images: str | Path, paths: list[Path]) -> Tensor:
    if found.prepare is None:
        raise UserError(
            "calibration-images",
            f"{name} does not take single pictures, so --images cannot calibrate it; leave them out, or "
            "call gn_detect.calibrate with the model's own inputs",
        )
    pictures = [Image.fromarray(read_image(path, "RGB")) for path in paths]
    whole = [found.prepare(picture) for picture in pictures]
    shapes = sorted({tuple(image.shape[-2:]) for image in whole})
    if len(shapes) > 1:  # a segmenter's are resized and not cropped
        raise UserError(
            "calibration-images",
            f"{name} takes images of any size, and those of {images} become {len(shapes)} sizes, "
            f"such as {shapes[0]} and {shapes[-1]} (height, width); give images of one size",
        )
    # Of each photo the whole and some windows: few photos limit what a calibration learns.
    each = max(1, min(WINDOWS, WINDOWS_BYTES // (whole[0].nbytes * len(whole))))
    random = np.random.default_rng(0)
    inputs = torch.empty(len(whole) * each, *whole[0].shape)
    for i, picture in enumerate(pictures):  # a photo's windows together: those held out are of other photos
        inputs[i * each] = whole[i]
        for j in range(1, each):
            inputs[i * each + j] = found.prepare(random_window(picture, random))
    return inputs


def _find_images(
    images: str | Path, folder: str | Path | None, most: int, outside: bool = False
) -> list[Path]:
    """Return at most ``most`` files, spread evenly over the folder or the COCO JSON."""
    if most < 2:
        raise UserError("bad-argument", f"--max-images {most}: a calibration needs two images at least")
    if Path(images).suffix == ".json":
        paths = read_image_list(Path(images), Path(folder or Path(images).parent), outside)
    elif folder:
        raise UserError("lone-flag", "--image-folder belongs to --images FILE.json")
    else:
        paths = find_images([str(images)])
    count = min(most, len(paths))
    paths = [paths[i * len(paths) // count] for i in range(count)]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(
            "missing-image",
            f"{images}: {len(missing)} of {count} images are missing, such as {missing[0]}; name "
            "their folder with --image-folder",
        )
    return paths


@dataclass(frozen=True)
class RewriteReport:
    """The report of :func:`rewrite_checkpoint`; ``names`` is the library whose names the source has."""

    weights: str
    tensors: int
    names: str
    left_out: list[str]
    changes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the content as JSON values, without the text for people."""
        return {key: value for key, value in vars(self).items() if key != "changes"}

    def __str__(self) -> str:
        first, *others = map(printable, self.changes)
        lines = [f"wrote {self.tensors} tensors to {self.weights}; {first}"]
        return "\n".join(lines + [f"  {change}" for change in others])


def rewrite_checkpoint(source: str | Path, target: str | Path) -> RewriteReport:
    """Write a checkpoint's weights with detectron2's names, in the format of ``target``'s ending.

    Standardised weights are folded, but for those of a library's network: detectron2's convolutions are
    plain.

    Tensors that belong to no detector keep their names, so that their own model takes the file.

    Raises:
        UserError: the source cannot be read, or the target cannot be written or is the source.
    """
    _check_files({"DST": target}, [source])
    checkpoint = read_checkpoint(source)
    translation = translate(checkpoint)
    known = translation.is_detector or translation.is_backbone
    tensors = translation.tensors if known else checkpoint.stored
    cfg = known_config(checkpoint) if translation.is_detector else None
    # The config of another program stays as it is.
    config = checkpoint.metadata.config if cfg is None else dump_config(without_paths(cfg))
    norms = norms_of(checkpoint, tensors)
    convs = norms.weight_standardization
    if plain := {name: found for name, found in convs.items() if trunk_of([name]) is None}:
        tensors = folded(tensors, plain)
        translation.changes.append(f"weight standardisation folded into {len(plain)} convolutions")
        if cfg is not None:
            config = dump_config(without_paths(cfg.replace(dict.fromkeys(CONV_KEYS, ""))))
    metadata = replace(
        norm_metadata(norms.group_norm_eps, norms.group_norm_groups),
        weight_standardization={name: found for name, found in convs.items() if name not in plain},
        class_names=checkpoint.metadata.class_names,
        category_ids=checkpoint.metadata.category_ids,
        input=translation.convention,
        config=config,
        config_keys={} if config is not None else to_plain(unspecified_keys(checkpoint)),
    )
    save_weights(target, tensors, metadata)
    changes = [f"names of {translation.scheme}" if known else "names as they were", *translation.changes]
    if translation.left_out:
        changes.append(f"left out, as detectron2 has no name for them: {', '.join(translation.left_out)}")
    return RewriteReport(str(target), len(tensors), translation.scheme, translation.left_out, changes)
