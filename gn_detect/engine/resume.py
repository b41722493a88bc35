"""Checks before a run is resumed: its config and data are compared with those of its checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import load_config, with_absolute_paths
from ..config.load import parse_config
from ..config.types import to_plain
from ..data import CocoDataset, list_names
from ..data.albumentations_pipeline import fingerprint
from ..distributed.group import restart_count, world_size
from ..errors import UserError
from ..weights import Checkpoint
from .checkpoint import CONFIG
from .optimizer import scale_config

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

# Keys, and groups of keys, that may change: they decide about places, length and periods, not about results.
# SOLVER.STEPS, SOLVER.WARMUP_ITERS and the like are not among them, even where MAX_ITER grows: a schedule
# that changed by accident, as in a newly chosen config, looks like one that was changed on purpose.
FREE = (
    "VERSION", "OUTPUT_DIR", "LOGGERS", "CUDNN_BENCHMARK", "VIS", "VIS_PERIOD", "GLOBAL", "CHECKPOINT",
    "MODEL.WEIGHTS",  # a resumed run has the checkpoint's
    "MODEL.DEVICE", "MODEL.COMPILE", "MODEL.CHANNELS_LAST", "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING",
    "DATASETS.REGISTER",  # the place of the data; their content is compared
    "DATASETS.ROOT", "DATASETS.ALLOW_OUTSIDE", "DATALOADER.NUM_WORKERS",
    "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.LOG_PERIOD", "SOLVER.NON_FINITE",
    "SOLVER.CUDA_GRAPHS", "SOLVER.EARLY_STOP",
    "TEST.EVAL_PERIOD", "TEST.IMS_PER_BATCH", "TEST.COCO_EVAL_BACKEND", "TEST.EXPECTED_RESULTS",
    "TEST.BOUNDARY_AP", "TEST.LOSS_IMAGES",
    "TEST.AUG",  # it has results of its own, after the last iteration
)  # fmt: skip

# Keys that name files and folders of a machine, which a checkpoint does not hold.
PATHS = ("OUTPUT_DIR", "MODEL.WEIGHTS", "DATASETS.ROOT", "DATASETS.REGISTER", "INPUT.ALBUMENTATIONS")

# Keys that scale_config rounds, so that scaling twice may move them by one.
COUNTED_IN_ITERATIONS = ("SOLVER.STEPS", "SOLVER.WARMUP_ITERS")

LISTED = 20  # most changes in an error; another base config changes some hundred keys

# The remedy for a checkpoint and data of different classes.
OTHER_CLASSES = (
    "give data of these classes, or take the classes by their position, whatever they are called, with "
    "--other-classes"
)


@dataclass(frozen=True)
class Change:
    """A setting whose value differs from that of the checkpoint."""

    key: str
    before: Any
    now: Any

    @property
    def is_free(self) -> bool:
        return any(self.key == key or self.key.startswith(f"{key}.") for key in FREE)

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.before)} and is {_shown(self.now)}"


def describe_data(cfg: Config, train: CocoDataset, tests: Mapping[str, CocoDataset]) -> dict[str, str]:
    """Return the fingerprints of a run's datasets and pipeline file, by config key and name."""
    found = {"DATASETS.TRAIN": train.fingerprint()}
    if cfg.input.albumentations:
        found["INPUT.ALBUMENTATIONS"] = fingerprint(cfg.input.albumentations)
    return found | {f"DATASETS.TEST {name}": dataset.fingerprint() for name, dataset in tests.items()}


def check_classes_of_run(dataset: CocoDataset, checkpoint: Checkpoint) -> None:
    """Refuse to resume on data of other classes, or of the same in another order."""
    trained = checkpoint.metadata.class_names
    if trained not in ([], dataset.class_names):
        raise UserError(
            "classes-differ",
            f"{checkpoint.path} was trained on the classes {list_names(trained)}, and dataset "
            f"{dataset.name} ({dataset.annotations_path}) has {list_names(dataset.class_names)}; "
            f"{OTHER_CLASSES}",
        )


def check_changes(cfg: Config, checkpoint: Checkpoint, data: Mapping[str, str], allow: bool) -> None:
    """Refuse to resume with other settings or data than the checkpoint's, and log changes that are fine.

    Args:
        cfg: of the run, not scaled to the number of processes.
        checkpoint: to resume from.
        data: :func:`describe_data` of the run.
        allow: log all changes, and refuse none.
    """
    found = list(changes(cfg, checkpoint, data))
    free = [change for change in found if change.is_free]
    if free:
        logger.info("resuming with other settings: %s", "; ".join(map(str, free)))
    others = [change for change in found if not change.is_free]
    if others and not allow:
        named = "; ".join(map(str, others[:LISTED]))
        more = f"; and {len(others) - LISTED} more" if len(others) > LISTED else ""
        raise UserError(
            "other-run",
            f"{checkpoint.path} is of another run: {named}{more}; set what the run began with, or add "
            f"--allow-changes to go on with the new values",
        )
    if others:
        logger.warning("resuming a changed run: %s", "; ".join(map(str, others)))


def changes(cfg: Config, checkpoint: Checkpoint, data: Mapping[str, str]) -> Iterator[Change]:
    """Yield the differences between a run and a checkpoint; see :func:`check_changes`."""
    metadata = checkpoint.metadata
    file = Path(cfg.output_dir) / CONFIG
    saved = saved_config(checkpoint, file)
    if saved is not None:
        yield from _config_changes(cfg, saved)
    yield from _path_changes(cfg, file)
    before = metadata.data or {}
    for key, now in data.items():
        if before.get(key, now) != now:
            yield Change(f"the content of {key}", before[key], now)
    states = {"optimizer": metadata.optimizer}
    if cfg.solver.ema.enabled:
        states["trained"] = metadata.trained
    for key, state in states.items():
        if not state:
            yield Change(f"the state '{key}' of the checkpoint", "saved with it", "missing")


def _config_changes(cfg: Config, saved: Config) -> Iterator[Change]:
    """Compare both configs, scaled to the same number of processes: it decides learning rate and schedule."""
    before, now = saved.solver.reference_world_size, cfg.solver.reference_world_size
    rescaled = now not in (0, before)
    scaled = scale_config(cfg, before or world_size()) if rescaled else cfg
    old, new = dict(leaves(to_plain(saved))), dict(leaves(to_plain(scaled)))
    for key, value in new.items():
        if key in (*PATHS, "SOLVER.REFERENCE_WORLD_SIZE") or (key == "SEED" and value < 0):
            continue  # a checkpoint holds no paths; the scaled keys are compared; a run keeps its own seed
        if not _are_equal(key, old[key], value, rescaled):
            yield Change(key, old[key], value)


def _path_changes(cfg: Config, file: Path) -> Iterator[Change]:
    """Compare the paths of data and first weights, which only the run's ``config.yaml`` holds."""
    try:
        saved = with_absolute_paths(load_config(file))
    except UserError:  # it is gone or damaged
        return
    cfg = with_absolute_paths(cfg)
    if saved.model.weights != cfg.model.weights:
        yield Change("MODEL.WEIGHTS", saved.model.weights, cfg.model.weights)
    files = saved.input.albumentations, cfg.input.albumentations
    if not all(files) and any(files):  # of two files the content is compared
        yield Change("INPUT.ALBUMENTATIONS", *files)
    for name in dict.fromkeys((*cfg.datasets.train, *cfg.datasets.test)):
        before, now = (c.datasets.registered.get(name) for c in (saved, cfg))
        if before is not None and now is not None and before != now:
            yield Change(f"DATASETS.REGISTER.{name}", before.annotations, now.annotations)


def _are_equal(key: str, before: Any, now: Any, rescaled: bool) -> bool:
    if rescaled and key in COUNTED_IN_ITERATIONS:
        old, new = (value if isinstance(value, list) else [value] for value in (before, now))
        return len(old) == len(new) and all(abs(a - b) <= 1 for a, b in zip(old, new, strict=True))
    if rescaled and isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-9)
    return bool(before == now)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; all registered datasets together are one value."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name != "DATASETS.REGISTER":
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def saved_config(checkpoint: Checkpoint, file: Path | None = None) -> Config | None:
    """Return the config of a checkpoint, or of the run's ``config.yaml`` if the checkpoint has none.

    Missing keys have their defaults. None means that neither can be read, as with files of other programs.
    """
    try:
        if checkpoint.metadata.config is not None:
            return parse_config(checkpoint.metadata.config)
        return load_config(file) if file is not None and file.is_file() else None
    except UserError as error:
        logger.warning("the config of %s is not compared, as it cannot be read: %s", checkpoint.path, error)
        return None


def refuse_no_run(folder: str | Path) -> None:
    """Refuse to resume where no run has begun; one without a checkpoint yet begins again, with a warning."""
    if restart_count() > 0:
        logger.info("%s has no checkpoint to resume from: training starts at iteration 0", folder)
    elif (Path(folder) / CONFIG).is_file():
        logger.warning("the run in %s has no checkpoint yet: training starts again at iteration 0", folder)
    else:
        raise UserError(
            "no-run",
            f"there is no run to resume in {folder}: it has no {CONFIG} and no checkpoint; correct "
            f"OUTPUT_DIR, or leave out --resume to begin a run",
        )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
