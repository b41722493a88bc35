"""The parts of a run, made and checked before anything is written."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import dump_config
from ..config.yaml_text import parse_yaml
from ..data import (
    CocoDataset,
    SampleLoader,
    build_train_loader,
    check_classes,
    check_order,
    check_same_classes,
    warn_of_faults,
)
from ..errors import UserError
from ..evaluation import METRICS
from ..files import atomic_write_json, atomic_write_text, check_writable
from ..modeling.mask_rcnn import MaskRCNN
from ..weights import Checkpoint, InputConvention, load_weights, norm_settings, read_checkpoint
from .checkpoint import CONFIG, ENVIRONMENT, read_last_checkpoint, remove_leftovers, start_anew
from .distributed import (
    check_synchronised_norms,
    from_main,
    get_rank,
    is_main,
    resolve_device,
    scale_config,
    world_size,
)
from .environment import describe_environment
from .evaluator import TestSets, load_test_sets, make_folder
from .model import make_model
from .step import TrainingState, make_state

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)


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
    start: int = 0
    best: float = -1.0
    losses: dict[str, list[float]] = field(default_factory=dict)
    evaluate_first: bool = False
    skipped: int = 0
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.cfg.output_dir)

    def metadata(self, iteration: int, losses: dict[str, list[float]]) -> dict[str, Any]:
        """What a checkpoint holds beside the weights; ``iteration`` is the last that was done, from 0."""
        return {
            **self.state.metadata(),
            "iteration": iteration,
            "seed": self.cfg.seed,
            "best": self.best,
            "losses": losses,
            "evaluate_first": self.evaluate_first,
            **self.origin(),
        }

    def origin(self) -> dict[str, Any]:
        """Config, input, classes and norms' eps, so that a checkpoint can be used without them."""
        return {
            "config": dump_config(self.cfg),
            "input": InputConvention.of_config(self.cfg).as_metadata(),
            "class_names": list(self.dataset.class_names),
            "category_ids": list(self.dataset.category_ids),
            **norm_settings(self.model),
        }


def prepare(cfg: Config, resume: bool) -> Run:
    """Check everything that can be checked, and build all parts; no new file is written."""
    device = resolve_device(cfg)
    cfg = scale_config(cfg, world_size())
    checkpoint = _read_last_checkpoint(cfg) if resume else None
    known = {} if checkpoint is None else checkpoint.metadata
    cfg = _decide_seed(cfg, known)
    start = _first_iteration(cfg, known)

    check_parts(cfg)
    loader, dataset = build_train_loader(cfg, rank=get_rank(), world_size=world_size(), start_iteration=start)
    check_classes(dataset, cfg.model.roi_heads.num_classes)
    tests = load_test_sets(cfg)
    for _, test_set in tests.values():
        check_same_classes(dataset, test_set)
    check_best_metric(cfg, dataset)
    warn_of_faults(dataset, [test_set for _, test_set in tests.values()])

    torch.manual_seed(cfg.seed)
    model = make_model(cfg)
    check_synchronised_norms(model, device)
    if checkpoint is not None:
        check_order(dataset, known.get("class_names"), checkpoint.path)
        load_weights(model, checkpoint)
        logger.info("resuming from %s at iteration %d", checkpoint.path, start)
    elif cfg.model.weights:
        names = dataset.class_names
        report = load_weights(model, cfg.model.weights, for_training=True, config=cfg, class_names=names)
        logger.info("%s", report)
    model.to(device).train()
    run = Run(cfg, device, model, make_state(cfg, model), loader, dataset, tests, start)
    if checkpoint is not None:
        run.state.restore(known, str(checkpoint.path))
        run.best = float(known.get("best", -1.0))
        run.losses = known.get("losses", {})
        run.evaluate_first = bool(known.get("evaluate_first", False))
    return run


def _read_last_checkpoint(cfg: Config) -> Checkpoint | None:
    """The first process chooses among the files, and renames those that are damaged; all read the same."""
    chosen, failure = None, None
    if is_main():
        try:
            found = read_last_checkpoint(cfg.output_dir, set_aside=True)
            chosen = None if found is None else str(found.path)
        except UserError as error:
            failure = str(error)
    chosen, failure = from_main((chosen, failure))
    if failure is not None:
        raise UserError(failure)
    if chosen is None:
        logger.info("%s has no checkpoint to resume from: training starts at iteration 0", cfg.output_dir)
        return None
    return found if is_main() else read_checkpoint(chosen)


def _first_iteration(cfg: Config, known: dict[str, Any]) -> int:
    """The iteration after that of a checkpoint's metadata.

    With ``SOLVER.REFERENCE_WORLD_SIZE`` and other processes than before, iterations are of another batch: it
    is the one before which as many images were seen, rounded down.
    """
    start = int(known.get("iteration", -1)) + 1
    if start == 0 or "config" not in known:
        return start
    before = parse_yaml(known["config"])["SOLVER"]
    reference = cfg.solver.reference_world_size
    if 0 in (reference, before["REFERENCE_WORLD_SIZE"]) or reference == before["REFERENCE_WORLD_SIZE"]:
        return start
    same = start * before["IMS_PER_BATCH"] // cfg.solver.ims_per_batch
    logger.info(
        "iteration %d with %d images in each is iteration %d with %d",
        start,
        before["IMS_PER_BATCH"],
        same,
        cfg.solver.ims_per_batch,
    )
    return same


def _decide_seed(cfg: Config, known: dict[str, Any]) -> Config:
    """A negative ``SEED`` becomes a random one, equal in all processes; a resumed run keeps its own."""
    if cfg.seed >= 0:
        return cfg
    seed = from_main(secrets.randbelow(2**31))
    return cfg.replace({"SEED": int(known.get("seed", seed))})


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


def open_run_folder(run: Run) -> None:
    """Create ``OUTPUT_DIR`` and write ``config.yaml`` and ``environment.json``."""
    make_folder(run.folder)
    remove_leftovers(run.folder)
    check_writable(run.folder / CONFIG)
    if run.start == 0:
        start_anew(run.folder)
    atomic_write_text(run.folder / CONFIG, dump_config(run.cfg))
    environment = describe_environment(run.device, world_size())
    atomic_write_json(run.folder / ENVIRONMENT, environment, indent=2)


def check_best_metric(cfg: Config, dataset: CocoDataset) -> None:
    """Refuse a ``SOLVER.BEST_CHECKPOINT_METRIC`` that no evaluation gives.

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
    known = [*METRICS, *(f"AP-{category}" for category in dataset.class_names)]
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
