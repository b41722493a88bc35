"""Evaluation of a model on the test sets of a config."""

from __future__ import annotations

import logging
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from ..config import Config, load_config
from ..data import build_loss_loader, check_classes, match_classes
from ..distributed.group import by_main, get_rank, is_main, resolve_device, share, world_size
from ..errors import UserError
from ..evaluation import BOUNDARY, DIAGNOSIS, METRICS, VALIDATION, Stop, evaluate_model, mean_losses
from ..evaluation.model import Detector
from ..files import atomic_write_json, json_values
from ..modeling import detection_format, make_model
from ..modeling.mask_rcnn import MaskRCNN
from ..weights import Checkpoint, load_weights, read_checkpoint
from .augmented import AugmentedDetector
from .checkpoint import AUGMENTED, CONFIG, INFERENCE, RESULTS, share_last_checkpoint
from .folder_lock import is_in_use
from .metrics import run_log
from .resume import OTHER_CLASSES
from .run import TestSets, load_test_sets, make_folder, write_run_config
from .tiled import in_tiles

logger = logging.getLogger(__name__)

# {"bbox": {"AP": ...}, "segm": {...}, "diagnosis": {...}} in percent, with TEST.AUG also "bbox_TTA" and the
# like, with TEST.LOSS_IMAGES the losses as "validation"; for several test sets one such dict for each name.
Results = dict[str, Any]

# Subfolder of inference/<dataset> for an evaluation while a training uses the run's folder.
EVAL_FOLDER = "eval"


def evaluate(cfg: Config, *, resume: bool = False, other_classes: bool = False) -> Results:
    """Compute box and mask AP of a checkpoint on ``DATASETS.TEST``.

    Writes ``OUTPUT_DIR/inference/<dataset>/`` and ``OUTPUT_DIR/results.json``, and, if there is none,
    ``config.yaml`` and ``environment.json``, so that a report can be made. While a training uses the folder,
    it writes only ``OUTPUT_DIR/inference/<dataset>/eval/``. With ``TEST.AUG.ENABLED`` a second evaluation,
    with test-time augmentation, writes ``inference_TTA/<dataset>/`` in the same way.

    Args:
        cfg: ``MODEL.WEIGHTS`` is the checkpoint.
        resume: take the newest checkpoint of ``OUTPUT_DIR`` instead.
        other_classes: take the classes of a dataset by their position. By default they are matched by name
            with a checkpoint that has class names; a dataset may list fewer, in another order.

    Raises:
        UserError: there is no checkpoint, it does not fit the config, the data are wrong or of other classes,
            or ``OUTPUT_DIR`` holds the results of other data of the same name.
    """
    folder = Path(cfg.output_dir)
    with run_log() as log:
        device = resolve_device(cfg.model.device)
        weights = share_last_checkpoint(folder) if resume else cfg.model.weights
        if not weights:
            missing = f"{cfg.output_dir} has no checkpoint" if resume else "MODEL.WEIGHTS is empty"
            instead = ", in place of --resume" if resume else ", or the key"
            raise UserError(
                "no-weights", f"nothing to evaluate: {missing}; add --weights path/to/model.pth{instead}"
            )
        tests = load_test_sets(cfg)
        if not tests:
            raise UserError(
                "no-dataset", "DATASETS.TEST is empty; name the dataset to evaluate on, or give --val-json"
            )
        model = make_model(cfg)
        checkpoint = weights if isinstance(weights, Checkpoint) else read_checkpoint(weights)
        match_test_sets(cfg, tests, checkpoint, other_classes)
        _refuse_other_data(cfg)
        logger.info("%s", load_weights(model, checkpoint, config=cfg))
        model.to(device)
        in_use = by_main(partial(is_in_use, folder))
        if is_main():
            make_folder(folder)
        if in_use:
            logger.info("a training uses %s: its own results stay as they are", cfg.output_dir)
        elif is_main():
            log.open(folder / "log.txt")
        results = evaluate_test_sets(cfg, model, tests, below=EVAL_FOLDER if in_use else "")
        if is_main() and not in_use and not is_in_use(folder):  # a training may have begun meanwhile
            write_results(folder / RESULTS, results)
            if not (folder / CONFIG).exists():
                write_run_config(cfg, device)
        return results


def _refuse_other_data(cfg: Config) -> None:
    """Refuse to replace the results of a run by those on other data of the same name."""
    earlier = Path(cfg.output_dir) / CONFIG
    if not earlier.is_file():
        return
    try:
        registered = load_config(earlier).datasets.registered
    except UserError:  # damaged, or of another version: its data are not known
        return
    for name in cfg.datasets.test:
        before, now = registered.get(name), cfg.datasets.registered.get(name)
        if before is None or now is None:
            continue
        if os.path.realpath(before.annotations) != os.path.realpath(now.annotations):
            raise UserError(
                "replaced-file",
                f"{cfg.output_dir} holds a run whose '{name}' is {before.annotations}, and its results would "
                f"be replaced by those on {now.annotations}; add another OUTPUT_DIR, such as "
                f"{cfg.output_dir}-{Path(now.annotations).stem}",
            )


def match_test_sets(cfg: Config, tests: TestSets, checkpoint: Checkpoint, other_classes: bool) -> None:
    """Give each test set the labels of a checkpoint's classes, by name if the checkpoint has class names.

    Raises:
        UserError: a test set has a class that the checkpoint lacks, or another number of classes, matched by
            position.
    """
    count = cfg.model.roi_heads.num_classes
    by_name = len(checkpoint.metadata.class_names) == count and not other_classes
    for _, dataset in tests.values():
        if by_name:
            match_classes(dataset, checkpoint.metadata.class_names, str(checkpoint.path), OTHER_CLASSES)
        else:
            check_classes(dataset, count)


def evaluate_test_sets(
    cfg: Config,
    model: MaskRCNN,
    tests: TestSets,
    stop: Stop | None = None,
    below: str = "",
    augmented: bool = True,
) -> Results:
    """Return AP on each set, the same in all processes; the model keeps its mode and memory format.

    Args:
        cfg: whole config.
        model: on its device.
        tests: loaders and datasets.
        stop: may end the evaluation with Interrupted, after each batch.
        below: subfolder of each dataset's folder for the files.
        augmented: evaluate with test-time augmentation, too, where ``TEST.AUG.ENABLED`` asks for it.
    """
    iou_types = ["bbox", "segm"] if cfg.model.mask_on else ["bbox"]
    iou_types += [BOUNDARY] * (cfg.test.boundary_ap and cfg.model.mask_on)
    backend = cfg.test.coco_eval_backend
    share(model.buffers())
    results: dict[str, Results] = {name: {} for name in tests}
    detectors: dict[str, Detector] = {"": in_tiles(model, cfg)}
    if augmented and cfg.test.aug.enabled:
        detectors[AUGMENTED] = in_tiles(AugmentedDetector(model, cfg), cfg)
    for ending, detector in detectors.items():
        for name, (loader, dataset) in tests.items():
            folder = Path(cfg.output_dir) / f"{INFERENCE}{ending}" / name / below
            how = f" in tiles of {cfg.test.tiles.size} pixels" if cfg.test.tiles.size else ""
            how += " with test-time augmentation" if ending else ""
            logger.info("evaluating %d images of %s%s", len(dataset), name, how)
            with model.in_memory_format(detection_format(cfg)):
                found = evaluate_model(
                    model,
                    loader,
                    dataset,
                    folder,
                    backend=backend,
                    iou_types=iou_types,
                    stop=stop,
                    detector=detector,
                )
                if cfg.test.loss_images and not ending:
                    images = build_loss_loader(cfg, dataset, rank=get_rank(), world_size=world_size())
                    found[VALIDATION] = mean_losses(model, images, stop)
            if is_main():
                write_results(folder / RESULTS, found)
            kinds = [kind for kind in found if not (ending and kind == DIAGNOSIS)]  # its folder has that
            results[name] |= {f"{kind}{ending}": found[kind] for kind in kinds}
    return next(iter(results.values())) if len(results) == 1 else results


def scalars_of(results: Results) -> dict[str, float]:
    """Return AP, AR and losses as flat scalars: ``bbox/AP``, ``validation/total_loss``.

    With several test sets the dataset comes first: ``<dataset>/bbox/AP``.
    """
    flat: dict[str, float] = {}
    for key, value in results.items():
        if key.startswith(DIAGNOSIS):
            continue
        if isinstance(value, dict):
            flat.update({f"{key}/{name}": number for name, number in scalars_of(value).items()})
        else:
            flat[key] = value
    return flat


def headline(scalars: dict[str, float]) -> dict[str, float]:
    """Return the scalars of all categories together that are defined for the data."""
    return {
        name: float(value)
        for name, value in scalars.items()
        if name.rpartition("/")[2] in METRICS and math.isfinite(value)
    }


def score_thresholds(cfg: Config, results: Results, tests: TestSets) -> list[float]:
    """Return the score with the best F1 for each class by label, of the test set that decides the best AP.

    A class without a true positive has the score of all classes together. Empty if none has a true positive.
    """
    name, (_, dataset) = next(iter(tests.items()))
    results = results if len(tests) == 1 else results[name]
    found = results.get(DIAGNOSIS, {}).get("segm" if cfg.model.mask_on else "bbox")
    if not found or found["threshold"] is None:
        return []
    known = sorted(category_id for category_id in dataset.category_ids if category_id is not None)
    by_id: dict[Any, Any] = dict(zip(known, found["thresholds"].values(), strict=True))
    best = [by_id.get(category_id) or found["threshold"] for category_id in dataset.category_ids]
    return [float(each["score"]) for each in best]


def write_results(path: Path, results: Results) -> None:
    """Write results as JSON; null stands for nan, an AP that COCO does not define for these data."""
    atomic_write_json(path, json_values(results), indent=2)
