"""Evaluation of a model on the test sets of a config."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

from ..config import Config, load_config
from ..data import CocoDataset, SampleLoader, build_test_loader, check_classes, match_classes
from ..distributed.group import by_main, get_rank, is_main, resolve_device, share_buffers, world_size
from ..errors import UserError
from ..evaluation import Stop, evaluate_model
from ..files import atomic_write_json, remedy
from ..modeling import detection_format
from ..modeling.mask_rcnn import MaskRCNN
from ..weights import Checkpoint, load_weights, read_checkpoint
from .checkpoint import CONFIG, INFERENCE, RESULTS, share_last_checkpoint
from .folder_lock import is_in_use
from .metrics import run_log
from .model import make_model
from .run_config import write_run_config

logger = logging.getLogger(__name__)

Results = dict[str, Any]
"""``{"bbox": {"AP": ...}, "segm": {...}}`` in percent; for several test sets one such dict for each name."""

BESIDE = "eval"
"""Subfolder of ``inference/<dataset>`` for an evaluation while a training uses the run's folder."""

TestSets = dict[str, tuple[SampleLoader, CocoDataset]]
"""Loader and dataset by name."""


OTHER_CLASSES = (
    "give data of these classes, or take the classes by their position, whatever they are called, with "
    "--other-classes"
)
"""The remedy where a checkpoint's classes are not those of the data."""


def evaluate(cfg: Config, *, resume: bool = False, other_classes: bool = False) -> Results:
    """Box and mask AP of a checkpoint on ``DATASETS.TEST``.

    Writes ``OUTPUT_DIR/inference/<dataset>/`` and ``OUTPUT_DIR/results.json``, and where there is none its
    ``config.yaml`` and ``environment.json``, so that it can be reported on. While a training uses the folder,
    it writes only ``OUTPUT_DIR/inference/<dataset>/eval/``.

    Args:
        cfg: ``MODEL.WEIGHTS`` is the checkpoint.
        resume: take the newest checkpoint of ``OUTPUT_DIR`` instead.
        other_classes: take the classes of a dataset by their position. By default those of a checkpoint that
            knows its classes are matched by name; a dataset may list fewer, in another order.

    Raises:
        UserError: there is no checkpoint, it does not fit the config, the data are wrong or of other classes,
            or ``OUTPUT_DIR`` holds the results of other data of the same name.
    """
    with run_log() as log:
        device = resolve_device(cfg)
        weights = share_last_checkpoint(cfg.output_dir) if resume else cfg.model.weights
        if not weights:
            missing = f"{cfg.output_dir} has no checkpoint" if resume else "MODEL.WEIGHTS is empty"
            instead = ", in place of --resume" if resume else ", or the key"
            raise UserError(f"nothing to evaluate: {missing}; add --weights path/to/model.pth{instead}")
        tests = load_test_sets(cfg)
        if not tests:
            raise UserError("DATASETS.TEST is empty; name the dataset to evaluate on, or give --val-json")
        model = make_model(cfg)
        checkpoint = weights if isinstance(weights, Checkpoint) else read_checkpoint(weights)
        match_test_sets(cfg, tests, checkpoint, other_classes)
        _refuse_other_data(cfg)
        logger.info("%s", load_weights(model, checkpoint, config=cfg))
        model.to(device)
        in_use = by_main(partial(is_in_use, cfg.output_dir))
        if is_main():
            make_folder(cfg.output_dir)
        if in_use:
            logger.info("a training uses %s: its own results stay as they are", cfg.output_dir)
        elif is_main():
            log.open(Path(cfg.output_dir) / "log.txt")
        results = evaluate_test_sets(cfg, model, tests, below=BESIDE if in_use else "")
        if is_main() and not in_use and not is_in_use(cfg.output_dir):  # one may have begun meanwhile
            write_results(Path(cfg.output_dir) / RESULTS, results)
            if not (Path(cfg.output_dir) / CONFIG).exists():
                write_run_config(cfg, device)
        return results


def _refuse_other_data(cfg: Config) -> None:
    """Results that take the place of a run's own belong to the data that its config names."""
    earlier = Path(cfg.output_dir) / CONFIG
    if not earlier.is_file():
        return
    try:
        registered = load_config(earlier).datasets.registered
    except UserError:  # damaged, or of another version: nothing is known of its data
        return
    for name in cfg.datasets.test:
        before, now = registered.get(name), cfg.datasets.registered.get(name)
        if before is None or now is None:
            continue
        if os.path.realpath(before.annotations) != os.path.realpath(now.annotations):
            raise UserError(
                f"{cfg.output_dir} holds a run whose '{name}' is {before.annotations}, and its results would "
                f"be replaced by those on {now.annotations}; add another OUTPUT_DIR, such as "
                f"{cfg.output_dir}-{Path(now.annotations).stem}"
            )


def load_test_sets(cfg: Config) -> TestSets:
    """Every set of ``DATASETS.TEST``, this process's share of it.

    Raises:
        UserError: files are missing or wrong.
    """
    build = partial(build_test_loader, cfg, rank=get_rank(), world_size=world_size())
    return {name: build(name) for name in cfg.datasets.test}


def match_test_sets(cfg: Config, tests: TestSets, checkpoint: Checkpoint, other_classes: bool) -> None:
    """Give each test set the labels of a checkpoint's classes, by name where the checkpoint knows names.

    Args:
        other_classes: by position in any case.

    Raises:
        UserError: a test set has a class that the checkpoint does not know, or by position another number.
    """
    count = cfg.model.roi_heads.num_classes
    by_name = len(checkpoint.metadata.class_names) == count and not other_classes
    for _, dataset in tests.values():
        if by_name:
            match_classes(dataset, checkpoint.metadata.class_names, str(checkpoint.path), OTHER_CLASSES)
        else:
            check_classes(dataset, count)


def evaluate_test_sets(
    cfg: Config, model: MaskRCNN, tests: TestSets, stop: Stop | None = None, below: str = ""
) -> Results:
    """AP on each set, the same in all processes; the model comes back in its mode and memory format.

    Args:
        cfg: whole config.
        model: on its device.
        tests: loaders and datasets.
        stop: is asked after each batch.
        below: subfolder of each dataset's folder for the files.

    Raises:
        Interrupted: ``stop`` says so.
    """
    iou_types = ["bbox", "segm"] if cfg.model.mask_on else ["bbox"]
    share_buffers(model)
    results = {}
    for name, (loader, dataset) in tests.items():
        folder = Path(cfg.output_dir) / INFERENCE / name / below
        logger.info("evaluating %d images of %s", len(dataset), name)
        backend = cfg.test.coco_eval_backend
        with model.in_memory_format(detection_format(cfg)):
            found = evaluate_model(
                model, loader, dataset, folder, backend=backend, iou_types=iou_types, stop=stop
            )
        results[name] = found
        if is_main():
            write_results(folder / RESULTS, results[name])
    return next(iter(results.values())) if len(results) == 1 else results


def scalars_of(results: Results) -> dict[str, float]:
    """Results as flat scalars: ``bbox/AP``, or ``<dataset>/bbox/AP`` for several test sets."""
    flat: dict[str, float] = {}
    for key, value in results.items():
        if isinstance(value, dict):
            flat.update({f"{key}/{name}": number for name, number in scalars_of(value).items()})
        else:
            flat[key] = value
    return flat


def write_results(path: Path, results: Results) -> None:
    """As JSON; what COCO does not define for these data (nan) becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return None if value != value else value

    atomic_write_json(path, plain(results), indent=2)


def make_folder(path: str | Path) -> None:
    """Create the run folder.

    Raises:
        UserError: it cannot be created.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {path} cannot be created: {error.strerror}; {remedy(error)}") from error
