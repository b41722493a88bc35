"""The parts of a run, made and checked before anything is written."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from ..config import dump_config, load_config, without_paths
from ..data import (
    CocoDataset,
    SampleLoader,
    build_train_loader,
    check_classes,
    match_classes,
    warn_of_faults,
)
from ..distributed.group import (
    by_main,
    check_synchronised_norms,
    from_main,
    get_rank,
    resolve_device,
    restart_count,
    scale_config,
    world_size,
)
from ..errors import UserError
from ..evaluation import METRICS
from ..files import check_writable
from ..modeling.mask_rcnn import MaskRCNN
from ..weights import Checkpoint, CheckpointMetadata, InputConvention, load_weights, norm_settings
from .checkpoint import CONFIG, drop_old_checkpoints, remove_leftovers, share_last_checkpoint, start_anew
from .evaluator import OTHER_CLASSES, TestSets, load_test_sets, make_folder
from .folder_lock import FolderLock
from .model import make_model
from .resume import check_changes, check_classes_of_run, describe_data, refuse_no_run, saved_config
from .run_config import write_run_config
from .schedule import learning_rate_factor, set_learning_rate
from .step import TrainingState, make_state

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

BEST_IS_OF = ("DATASETS.TEST", "SOLVER.BEST_CHECKPOINT_METRIC")
"""Keys that the best value so far depends on; when one has changed, that value does not count."""


@dataclass
class Run:
    """All parts of a run, made before anything is written.

    Attributes:
        cfg: scaled to the processes, its seed decided.
        device: of this process.
        model: the plain model on the device.
        state: optimiser and whatever else a step changes.
        loader, dataset: training batches, from ``start`` on.
        tests: the test sets.
        data: :func:`describe_data` of both.
        start: the first iteration; 0 unless the run is resumed.
        best: best value of ``SOLVER.BEST_CHECKPOINT_METRIC`` so far.
        losses: those since the last report, where the run was interrupted between two.
        evaluate_first: the run was interrupted before an evaluation that was due.
        skipped: steps of this process that were left out as they were not finite.
    """

    cfg: Config
    device: torch.device
    model: MaskRCNN
    state: TrainingState
    loader: SampleLoader
    dataset: CocoDataset
    tests: TestSets
    data: dict[str, str]
    start: int = 0
    best: float = -1.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    evaluate_first: bool = False
    skipped: int = 0
    folder: Path = field(init=False)
    lock: FolderLock = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.cfg.output_dir)
        self.lock = FolderLock(self.folder)

    def metadata(self, iteration: int, losses: dict[str, list[float]]) -> CheckpointMetadata:
        """Return the metadata of a checkpoint to resume from; ``iteration`` is the last one, from 0."""
        return replace(
            self.origin(),
            iteration=iteration,
            seed=self.cfg.seed,
            best=self.best,
            losses=losses,
            evaluate_first=self.evaluate_first,
            data=self.data,
            **self.state.metadata(),
        )

    def origin(self) -> CheckpointMetadata:
        """Return the metadata with which a checkpoint can be used without the run's config and data."""
        return replace(
            norm_settings(self.model),
            config=dump_config(without_paths(self.cfg)),
            input=InputConvention.of_config(self.cfg),
            class_names=list(self.dataset.class_names),
            category_ids=cast(list[int], list(self.dataset.category_ids)),
        )


def prepare(cfg: Config, resume: bool, *, allow_changes: bool = False, other_classes: bool = False) -> Run:
    """Check everything that can be checked, and build all parts; no new file is written.

    Args:
        cfg: whole config.
        resume, allow_changes, other_classes: see :func:`gn_detect.train`.
    """
    device = resolve_device(cfg)
    given = cfg
    cfg = scale_config(cfg, world_size())
    checkpoint = share_last_checkpoint(cfg.output_dir, set_aside=True) if resume else None
    if resume and checkpoint is None:
        by_main(partial(refuse_no_run, cfg.output_dir))
    known = CheckpointMetadata() if checkpoint is None else checkpoint.metadata
    cfg = _decide_seed(cfg, known)
    start = _first_iteration(cfg, checkpoint)

    check_parts(cfg)
    loader, dataset = build_train_loader(cfg, rank=get_rank(), world_size=world_size(), start_iteration=start)
    if checkpoint is not None and not other_classes:
        check_classes_of_run(dataset, checkpoint, OTHER_CLASSES)
    check_classes(dataset, cfg.model.roi_heads.num_classes)
    tests = load_test_sets(cfg)
    test_sets = {name: test_set for name, (_, test_set) in tests.items()}
    for test_set in test_sets.values():
        owner = f"dataset {dataset.name}, which is trained on,"
        remedy = "give both the same names, or leave out of the test set what is not trained"
        match_classes(test_set, dataset.class_names, owner, remedy)
    check_best_metric(cfg, next(iter(test_sets.values()), dataset))
    data = describe_data(dataset, test_sets)
    changes = [] if checkpoint is None else check_changes(given, checkpoint, data, allow_changes)
    warn_of_faults(dataset, list(test_sets.values()))

    torch.manual_seed(cfg.seed)
    model = make_model(cfg)
    check_synchronised_norms(model, device)
    if checkpoint is not None:
        load_weights(model, checkpoint)
        logger.info("resuming from %s at iteration %d", checkpoint.path, start)
    elif cfg.model.weights:
        names = dataset.class_names
        report = load_weights(model, cfg.model.weights, for_training=True, config=cfg, class_names=names)
        logger.info("%s", report)
    model.to(device).train()
    run = Run(cfg, device, model, make_state(cfg, model), loader, dataset, tests, data, start)
    if checkpoint is not None:
        run.state.restore(known, str(checkpoint.path))
        # The rate of the last iteration: without anything left to train, it is saved again.
        set_learning_rate(run.state.optimizer, learning_rate_factor(cfg, max(start - 1, 0)))
        if not any(change.key.removeprefix("the content of ").startswith(BEST_IS_OF) for change in changes):
            run.best = -1.0 if known.best is None else float(known.best)
        run.losses = known.losses or {}
        run.evaluate_first = bool(known.evaluate_first)
    return run


def _first_iteration(cfg: Config, checkpoint: Checkpoint | None) -> int:
    """Return the iteration after that of a checkpoint.

    With ``SOLVER.REFERENCE_WORLD_SIZE`` and other processes than before, iterations are of another batch: it
    is the one before which as many images were seen, rounded down.
    """
    if checkpoint is None or checkpoint.metadata.iteration is None:
        return 0
    start = checkpoint.metadata.iteration + 1
    saved = saved_config(checkpoint)
    if saved is None:
        return start
    before, reference = saved.solver, cfg.solver.reference_world_size
    if 0 in (reference, before.reference_world_size) or reference == before.reference_world_size:
        return start
    same = start * before.ims_per_batch // cfg.solver.ims_per_batch
    logger.info(
        "iteration %d with %d images in each is iteration %d with %d",
        start,
        before.ims_per_batch,
        same,
        cfg.solver.ims_per_batch,
    )
    return same


def _decide_seed(cfg: Config, known: CheckpointMetadata) -> Config:
    """A negative ``SEED`` becomes a random one, equal in all processes; a resumed run keeps its own."""
    if cfg.seed >= 0:
        return cfg
    seed = from_main(secrets.randbelow(2**31))
    return cfg.replace({"SEED": seed if known.seed is None else known.seed})


def check_parts(cfg: Config) -> None:
    """Refuse a batch that cannot be divided over processes and parts.

    Raises:
        UserError: ``SOLVER.IMS_PER_BATCH`` does not fit.
    """
    solver, unit = cfg.solver, world_size() * cfg.solver.accumulate
    if solver.accumulate > 1 and solver.ims_per_batch % unit:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {solver.ims_per_batch} is not divisible by {world_size()} processes times "
            f"SOLVER.ACCUMULATE {solver.accumulate}; set it to a multiple of {unit}"
        )


def lock_folder(lock: FolderLock) -> None:
    """Lock ``OUTPUT_DIR``, if it is there; before anything is written.

    Raises:
        UserError: another training uses it, or it cannot be written.
    """
    if lock.folder.is_dir():
        check_writable(lock.folder / CONFIG)
        lock.take()


def open_run_folder(run: Run, resume: bool = False) -> None:
    """Create ``OUTPUT_DIR`` and write ``config.yaml`` and ``environment.json``.

    Args:
        run: with its lock.
        resume: what lies there belongs to this run, if it is of the same config.
    """
    make_folder(run.folder)
    lock_folder(run.lock)
    if run.lock.is_held:
        remove_leftovers(run.folder)
    if run.start > 0:
        drop_old_checkpoints(run.folder, run.cfg.checkpoint.keep)
    elif not (resume and _is_first_attempt(run)):
        start_anew(run.folder)
    write_run_config(run.cfg, run.device)


def _is_first_attempt(run: Run) -> bool:
    """Return whether the folder holds this run, killed before its first checkpoint; any seed counts."""
    if restart_count() > 0:
        return True
    try:
        before = load_config(run.folder / CONFIG)
    except UserError:
        return False
    return without_paths(before.replace({"SEED": run.cfg.seed})) == without_paths(run.cfg)


def check_best_metric(cfg: Config, dataset: CocoDataset) -> None:
    """Refuse a ``SOLVER.BEST_CHECKPOINT_METRIC`` that no evaluation gives.

    Args:
        dataset: that decides: the first of the test sets; its labels are the model's.

    Raises:
        UserError: it names masks of a model without masks, or no metric and no category.
    """
    metric = cfg.solver.best_checkpoint_metric
    if metric == "auto":
        return
    kind, _, name = metric.partition("/")
    if kind == "segm" and not cfg.model.mask_on:
        raise UserError(
            f"SOLVER.BEST_CHECKPOINT_METRIC {metric} needs MODEL.MASK_ON True; choose bbox/{name}"
        )
    listed = zip(dataset.class_names, dataset.category_ids, strict=True)
    known = [*METRICS, *(f"AP-{category}" for category, i in listed if i is not None)]
    if name not in known:
        raise UserError(
            f"SOLVER.BEST_CHECKPOINT_METRIC {metric} is unknown; after {kind}/ choose {', '.join(METRICS)} "
            f"or AP-<category>"
        )


def best_metric(cfg: Config) -> str:
    """The scalar that decides which checkpoint is best; with several test sets, the first one's."""
    metric = cfg.solver.best_checkpoint_metric
    if metric == "auto":
        metric = "segm/AP" if cfg.model.mask_on else "bbox/AP"
    return metric if len(cfg.datasets.test) < 2 else f"{cfg.datasets.test[0]}/{metric}"
