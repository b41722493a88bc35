"""Checks of a run that is resumed: its config and data are compared with those of its checkpoint."""

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
from ..distributed.group import restart_count, scale_config, world_size
from ..errors import UserError
from ..weights import Checkpoint
from .checkpoint import CONFIG

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

FREE = (
    "VERSION",
    "OUTPUT_DIR",
    "CUDNN_BENCHMARK",
    "VIS",
    "VIS_PERIOD",
    "GLOBAL",
    "CHECKPOINT",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",  # a resumed run has the checkpoint's
    "MODEL.COMPILE",
    "MODEL.CHANNELS_LAST",
    "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING",
    "DATASETS.ROOT",
    "DATASETS.REGISTER",  # where the data are; their content is compared
    "DATASETS.ALLOW_OUTSIDE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.MAX_ITER",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.LOG_PERIOD",
    "SOLVER.NON_FINITE",
    "TEST.EVAL_PERIOD",
    "TEST.IMS_PER_BATCH",
    "TEST.COCO_EVAL_BACKEND",
    "TEST.EXPECTED_RESULTS",
)
"""Keys, and groups of keys, that may change: they say where, how long and how often, not what is computed.

SOLVER.STEPS, SOLVER.WARMUP_ITERS and the like are not among them, also where MAX_ITER grows: a schedule that
is changed by accident, as by a config that was chosen anew, looks like one that was changed on purpose.
"""

PATHS = ("OUTPUT_DIR", "MODEL.WEIGHTS", "DATASETS.ROOT", "DATASETS.REGISTER")
"""Keys that name files and folders of a machine, which a checkpoint does not hold."""

COUNTED_IN_ITERATIONS = ("SOLVER.STEPS", "SOLVER.WARMUP_ITERS")
"""Keys that :func:`scale_config` rounds, so that scaling twice may move them by one."""

LISTED = 20
"""Most changes that an error names; another base config changes some hundred keys."""


@dataclass(frozen=True)
class Change:
    """A setting whose value differs from that of the checkpoint."""

    key: str
    before: Any
    now: Any

    @property
    def is_free(self) -> bool:
        """Return whether a resumed run may have it."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in FREE)

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.before)} and is {_shown(self.now)}"


def describe_data(train: CocoDataset, tests: Mapping[str, CocoDataset]) -> dict[str, str]:
    """Return what the datasets of a run hold, as text, by config key and name; see ``fingerprint``."""
    found = {"DATASETS.TRAIN": train.fingerprint()}
    return found | {f"DATASETS.TEST {name}": dataset.fingerprint() for name, dataset in tests.items()}


def check_classes_of_run(dataset: CocoDataset, checkpoint: Checkpoint, remedy: str) -> None:
    """Refuse to resume on data of other classes, or of the same in another order.

    Raises:
        UserError: the checkpoint knows its classes, and they are not the dataset's.
    """
    trained = checkpoint.metadata.class_names
    if trained not in ([], dataset.class_names):
        raise UserError(
            f"{checkpoint.path} was trained on the classes {list_names(trained)}, and dataset "
            f"{dataset.name} ({dataset.annotations_path}) has {list_names(dataset.class_names)}; {remedy}"
        )


def check_changes(cfg: Config, checkpoint: Checkpoint, data: Mapping[str, str], allow: bool) -> list[Change]:
    """Compare a run with the one that a checkpoint was saved from, and log what may change.

    Args:
        cfg: of the run, not scaled to the number of processes.
        checkpoint: the one to resume from.
        data: :func:`describe_data` of the run.
        allow: changes of what may not change are logged as well.

    Returns:
        The changes of what may not change.

    Raises:
        UserError: there are some, and they are not allowed.
    """
    changes = list(_changes(cfg, checkpoint, data))
    free = [change for change in changes if change.is_free]
    if free:
        logger.info("resuming with other settings: %s", "; ".join(map(str, free)))
    others = [change for change in changes if not change.is_free]
    if others and not allow:
        named = "; ".join(map(str, others[:LISTED]))
        more = f"; and {len(others) - LISTED} more" if len(others) > LISTED else ""
        raise UserError(
            f"{checkpoint.path} is of another run: {named}{more}; set what the run began with, or add "
            f"--allow-changes to go on with the new values"
        )
    if others:
        logger.warning("resuming a changed run: %s", "; ".join(map(str, others)))
    return others


def _changes(cfg: Config, checkpoint: Checkpoint, data: Mapping[str, str]) -> Iterator[Change]:
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
    old, new = dict(_leaves(to_plain(saved))), dict(_leaves(to_plain(scaled)))
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
    for name in dict.fromkeys((*cfg.datasets.train, *cfg.datasets.test)):
        before, now = (c.datasets.registered.get(name) for c in (saved, cfg))
        if before is not None and now is not None and before != now:
            yield Change(f"DATASETS.REGISTER.{name}", before.annotations, now.annotations)


def _are_equal(key: str, before: Any, now: Any, rescaled: bool) -> bool:
    if not rescaled:
        return bool(before == now)
    if key in COUNTED_IN_ITERATIONS:
        pairs = list(zip(_as_list(before), _as_list(now), strict=False))
        same_length = len(_as_list(before)) == len(_as_list(now))
        return same_length and all(abs(one - other) <= 1 for one, other in pairs)
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-9)
    return bool(before == now)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; all registered datasets together are one value."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name != "DATASETS.REGISTER":
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def saved_config(checkpoint: Checkpoint, file: Path | None = None) -> Config | None:
    """Return the config that a checkpoint was saved with; keys that it lacks have their defaults.

    Args:
        checkpoint: of a run.
        file: the run's ``config.yaml``, for a checkpoint that holds none.

    Returns:
        None where neither can be read, as with files of other programs.
    """
    try:
        if checkpoint.metadata.config is not None:
            return parse_config(checkpoint.metadata.config)
        return load_config(file) if file is not None and file.is_file() else None
    except UserError as error:
        logger.warning("the config of %s is not compared, as it cannot be read: %s", checkpoint.path, error)
        return None


def refuse_no_run(folder: str | Path) -> None:
    """Refuse to resume where no run has begun; one without a checkpoint yet begins again, with a warning.

    Raises:
        UserError: the folder has no ``config.yaml``.
    """
    if restart_count() > 0:
        logger.info("%s has no checkpoint to resume from: training starts at iteration 0", folder)
    elif (Path(folder) / CONFIG).is_file():
        logger.warning("the run in %s has no checkpoint yet: training starts again at iteration 0", folder)
    else:
        raise UserError(
            f"there is no run to resume in {folder}: it has no {CONFIG} and no checkpoint; correct "
            f"OUTPUT_DIR, or leave out --resume to begin a run"
        )


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
