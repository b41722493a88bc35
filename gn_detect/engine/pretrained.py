"""The config of trained weights, for commands and predictors that are given the weights alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Config, load_config, read_overrides, without_paths
from ..config.load import parse_config
from ..config.paths import CONFIG
from ..errors import UserError
from ..weights import Checkpoint, implied_keys, read_architecture, read_checkpoint, translate
from ..weights.hub import pinned
from ..weights.zoo import ZOO, entry_of, read_catalog
from .checkpoint import BEST, FINAL, read_last_checkpoint

BASE_FPN, BASE_C4 = "Base-RCNN-FPN.yaml", "Base-RCNN-C4.yaml"

logger = logging.getLogger(__name__)


def read_pretrained(source: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, Checkpoint]:
    """Return the config of trained weights, with ``MODEL.WEIGHTS`` set to them, and the weights.

    The config is the one of the model zoo, the one inside the file, that of the run's folder around the file,
    or what the tensors imply.

    Args:
        source: a run's folder, a checkpoint file, ``zoo://NAME``, ``hf://USER/REPO`` or another URL, or a
            name of the model zoo.
        overrides: ``KEY VALUE`` pairs; they win.

    Raises:
        UserError: the weights cannot be read, no config is known for them, or a key is wrong.
    """
    weights = pinned(_find_weights(source))
    checkpoint = read_checkpoint(weights)
    entry = entry_of(weights)
    cfg = config_of(checkpoint) if entry is None else load_config(entry.config, entry.overrides)
    # The GPU of the training's machine may not be here.
    device = "auto" if cfg.model.device.startswith("cuda") else cfg.model.device
    keys = {"MODEL.DEVICE": device, **read_overrides(overrides), "MODEL.WEIGHTS": weights}
    return cfg.replace(keys), checkpoint


def config_of(checkpoint: Checkpoint) -> Config:
    """Return the config that a checkpoint was trained with, or one that its tensors imply.

    The config inside the file has no paths; if the run's folder around it holds the same one with paths, that
    is returned.

    Raises:
        UserError: the tensors are no detector that this package builds.
    """
    inside = _config_inside(checkpoint)
    file = checkpoint.path.parent / CONFIG
    if file.is_file():
        try:
            around = load_config(file)
        except UserError:
            if inside is None:
                raise
        else:
            if inside is None or without_paths(around) == inside:
                return around
    return _implied_config(checkpoint) if inside is None else inside


def as_pairs(keys: Mapping[str, Any]) -> list[str]:
    """Return ``KEY VALUE`` texts, as a command line has them."""
    pairs = []
    for key, value in keys.items():
        pairs += [key, os.fspath(value) if isinstance(value, str | os.PathLike) else repr(value)]
    return pairs


def _find_weights(source: str | Path) -> str:
    path = Path(source)
    if not path.is_dir():
        is_zoo_name = not path.exists() and str(source) in read_catalog()
        return f"{ZOO}{source}" if is_zoo_name else str(source)
    for name in (BEST, FINAL):
        if (path / name).is_file():
            return str(path / name)
    last = read_last_checkpoint(path)
    if last is None:
        raise UserError(
            "missing-weights", f"{path} holds no checkpoint; give the folder of a run or a checkpoint file"
        )
    return str(last.path)


def _config_inside(checkpoint: Checkpoint) -> Config | None:
    text = checkpoint.metadata.config
    try:
        return None if text is None else parse_config(text)
    except UserError:  # another program's
        return None


def _implied_config(checkpoint: Checkpoint) -> Config:
    architecture = read_architecture(checkpoint)
    if not architecture.is_detector:
        raise UserError(
            "not-a-detector",
            f"{checkpoint.path} is a {architecture} and finds no objects; train a detector from it with "
            f"gn-detect train --weights {checkpoint.path}",
        )
    keys = {**architecture.keys, "MODEL.MASK_ON": architecture.has_masks}
    tensors, head = translate(checkpoint).tensors, "roi_heads.box_predictor"
    scores = tensors.get(f"{head}.cls_score.weight", tensors.get(f"{head}.0.cls_score.weight"))
    if scores is not None:
        keys["MODEL.ROI_HEADS.NUM_CLASSES"] = len(scores) - 1  # the background is the last
    if architecture.norm == "GN":
        keys["MODEL.RESNETS.STRIDE_IN_1X1"] = False  # as in all published GN models
    logger.warning(
        "%s holds no config: the network comes from its tensors; image sizes, thresholds and anchors that it "
        "does not name are detectron2's; if they were others, give its config (--config-file)",
        checkpoint.path,
    )
    base = BASE_FPN if "MODEL.FPN.OUT_CHANNELS" in keys else BASE_C4
    cfg = load_config(base).replace(keys)
    return cfg.replace(implied_keys(cfg, checkpoint))
