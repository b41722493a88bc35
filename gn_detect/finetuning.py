"""Fine-tuning as one function: ``gn-detect train`` without a config."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from .config import Config
from .distributed.group import is_main
from .engine import Predictor, train
from .engine.autoconfig import OUTPUT, backbone_keys, choose_config, with_datasets
from .engine.pretrained import as_pairs
from .engine.run_data import prepare_data
from .errors import UserError
from .progress import fitted
from .structures import Results

PathLike = str | Path


@dataclass(frozen=True)
class FineTuned:
    """A finished run.

    Attributes:
        folder: checkpoints, ``config.yaml``, ``log.txt``, ``results.json``, pictures.
        config: the chosen config with the given keys.
        reasons: the reason of each choice by its topic, such as ``run.reasons["anchors"]``.
        results: ``results["bbox"]["AP"]`` in percent; empty without validation data.
    """

    folder: Path
    config: Config = field(repr=False)
    reasons: dict[str, str] = field(repr=False)
    results: Results

    @cached_property
    def predictor(self) -> Predictor:
        """Return the predictor of the best checkpoint, or of the last one without validation data."""
        return Predictor.from_pretrained(self.folder)

    def report(self, path: PathLike | None = None) -> Path:
        """Write the run as one HTML page and return its path, by default ``report.html`` in the folder."""
        from .report import write_report

        return write_report(self.folder, path)


def finetune(
    train_json: PathLike | None = None,
    train_images: PathLike | None = None,
    val_json: PathLike | None = None,
    val_images: PathLike | None = None,
    *,
    data: PathLike | None = None,
    weights: PathLike = "",
    backbone: str = "",
    output_dir: PathLike = OUTPUT,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> FineTuned:
    """Choose a config for own data, train and evaluate.

    The choices follow from the data, the machine and the weights; they are printed with their reasons. Each
    process of a group calls this function, as torchrun starts them.

    Args:
        train_json: COCO annotations to train on.
        train_images: folder of their images.
        val_json: COCO annotations to evaluate on.
        val_images: folder of their images.
        data: in place of these four: a file or folder in any format that ``gn-detect import`` reads. It
            becomes COCO files in ``output_dir/data``, and is split by images where it has no val part.
        weights: a starting point: a file, ``zoo://NAME``, ``hf://USER/REPO`` or a URL; from scratch by
            default.
        backbone: a network of torchvision or timm, such as ``mobilenet_v2`` or ``timm/resnet26d``;
            ``weights`` is then a file of its classifier, or empty.
        output_dir: the run's folder.
        overrides: config keys, such as ``{"SOLVER.MAX_ITER": 500}``: they win, and the other choices follow.
        resume: continue the run in ``output_dir``.

    Raises:
        UserError: the data, the weights or a key are wrong, or training diverged.
        SystemExit: SIGTERM (status 143) or SIGINT (130) came, and the run is saved.
    """
    if (val_json is None) != (val_images is None):
        raise UserError("lone-flag", "val_json and val_images belong together; give both")
    if data is not None and (train_json, train_images, val_json) != (None, None, None):
        raise UserError("conflicting-flags", f"data={data} and train_json name the same thing; give one")
    keys = {**(backbone_keys(backbone) if backbone else {}), **(overrides or {}), "OUTPUT_DIR": output_dir}
    if weights:
        keys["MODEL.WEIGHTS"] = weights
    if data is not None:
        given = {
            key: keys.get(key, default) for key, default in (("SEED", 0), ("DATASETS.ALLOW_OUTSIDE", False))
        }
        prepared = prepare_data(
            data, output_dir, int(given["SEED"]), bool(given["DATASETS.ALLOW_OUTSIDE"]), resume
        )
        if is_main():
            print(prepared, flush=True)
        train_json, train_images = prepared.train
        val_json, val_images = prepared.val or (None, None)
    if train_json is None or train_images is None:
        raise UserError("lone-flag", "train_json and train_images belong together; give both, or data")
    cfg, recipe = choose_config(train_json, train_images, as_pairs(keys), has_val=val_json is not None)
    if is_main():
        print(f"chosen for {recipe.facts}:\n{fitted(str(recipe), sys.stdout)}", flush=True)
    val = None if val_json is None else (str(val_json), str(val_images))
    cfg = with_datasets(cfg, (str(train_json), str(train_images)), val)
    results = train(cfg, resume=resume)
    return FineTuned(Path(cfg.output_dir), cfg, recipe.reasons, cast(Results, results))
