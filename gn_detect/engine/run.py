"""The parts of a run, built and checked before anything is written, and the first files of its folder."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import secrets
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..config import dump_config, load_config, with_absolute_paths, without_paths
from ..config.paths import FOLDER
from ..data import (
    CocoDataset,
    SampleLoader,
    build_test_loader,
    build_train_loader,
    check_classes,
    datasets_root,
    match_classes,
    warn_of_faults,
)
from ..distributed.group import (
    by_main,
    check_synchronised_norms,
    from_main,
    get_rank,
    is_main,
    resolve_device,
    restart_count,
    world_size,
)
from ..errors import UserError
from ..evaluation import METRICS
from ..files import atomic_write_json, atomic_write_text, check_writable, remedy
from ..modeling import make_model
from ..modeling.mask_rcnn import MaskRCNN
from ..text import Lines
from ..weights import (
    Checkpoint,
    CheckpointMetadata,
    InputConvention,
    load_weights,
    norm_settings,
    read_checkpoint,
)
from ..weights.hub import is_hub, pinned
from .checkpoint import (
    BEST,
    CONFIG,
    ENVIRONMENT,
    drop_old_checkpoints,
    remove_leftovers,
    share_last_checkpoint,
    start_anew,
)
from .folder_lock import FolderLock
from .loggers import check_loggers
from .memory import with_measured_parts
from .metrics import MetricsWriter, count_evaluations
from .optimizer import describe_parameters, learning_rate_factor, scale_config, set_learning_rate
from .resume import (
    changes,
    check_changes,
    check_classes_of_run,
    describe_data,
    refuse_no_run,
    saved_config,
)
from .starting_weights import read_starting_weights
from .step import TrainingState, make_state

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

# When one of these keys, or the content of the test data, has changed, the best AP so far does not count.
BEST_IS_OF = ("DATASETS.TEST", "SOLVER.BEST_CHECKPOINT_METRIC")

TestSets = dict[str, tuple[SampleLoader, CocoDataset]]  # by name

_PACKAGES = ("gn-detect", "torch", "torchvision", "numpy", "pillow", "pycocotools", "hotcoco", "triton")


@dataclass
class Run:
    """All parts of a run, and its progress."""

    cfg: Config  # scaled to the processes, with a seed that is not negative
    device: torch.device
    model: MaskRCNN  # the plain model on the device
    state: TrainingState
    loader: SampleLoader  # training batches, from iteration ``start`` on
    dataset: CocoDataset  # training data
    tests: TestSets  # this process's share
    data: dict[str, str]  # describe_data() of both
    start: int = 0  # the first iteration; 0 unless the run is resumed
    best: float = -1.0  # in the first process: the metric of model_best.pth
    stale: int = 0  # in the first process: evaluations since that one
    stopped: bool = False  # SOLVER.EARLY_STOP ends the run here
    losses: dict[str, list[float]] = field(default_factory=dict)  # from the checkpoint: since the last report
    thresholds: list[float] = field(default_factory=list)  # of the last evaluation, see score_thresholds()
    scores: dict[str, float] = field(default_factory=dict)  # AP and AR of the last evaluation, see headline()
    skipped: int = 0  # steps that were skipped because something was not finite
    is_evaluated: bool = True  # the weights after ``done`` iterations need no evaluation
    precise: int = -1  # iterations after which TEST.PRECISE_BN set the statistics last
    done: int = field(init=False)  # iterations that are done
    saved: int = field(init=False)  # iterations in the newest checkpoint
    lock: FolderLock = field(init=False, repr=False)
    writer: MetricsWriter | None = field(init=False, default=None)  # in the first process

    def __post_init__(self) -> None:
        self.done = self.saved = self.start

    @property
    def folder(self) -> Path:
        return Path(self.cfg.output_dir)

    @property
    def end(self) -> int:
        return self.done if self.stopped else self.cfg.solver.max_iter

    def check_patience(self) -> None:
        """Let all processes stop if ``SOLVER.EARLY_STOP`` says so."""
        patience = self.cfg.solver.early_stop.patience
        if patience:
            self.stopped = from_main(self.stale >= patience)

    def is_due(self, period: int) -> bool:
        """Return whether a periodic action follows the last iteration; at the end, each action does."""
        return self.done >= self.end or (period > 0 and self.done % period == 0)

    def metadata(self, losses: dict[str, list[float]]) -> CheckpointMetadata:
        """Return everything that a checkpoint holds in addition to the weights."""
        return replace(
            self.origin(),
            iteration=self.done - 1,
            seed=self.cfg.seed,
            losses=losses,
            score_thresholds=self.thresholds if self.is_evaluated else [],
            results=self.scores if self.is_evaluated else {},
            **self.state.metadata(),
        )

    def origin(self) -> CheckpointMetadata:
        """Return config, data, input, classes and norms, so that weights can be used without the run."""
        return replace(
            norm_settings(self.model),
            data=self.data,
            config=dump_config(without_paths(self.cfg)),
            input=InputConvention.of_config(self.cfg),
            class_names=list(self.dataset.class_names),
            category_ids=cast(list[int], list(self.dataset.category_ids)),
        )


def prepare(cfg: Config, resume: bool, *, allow_changes: bool = False, other_classes: bool = False) -> Run:
    """Check everything that can be checked, and build all parts; write no new file.

    Arguments are those of :func:`gn_detect.train`.
    """
    device = resolve_device(cfg.model.device)
    by_main(partial(check_loggers, cfg))
    if is_hub(cfg.model.weights):  # the commit goes into config.yaml and the checkpoints
        cfg = cfg.replace({"MODEL.WEIGHTS": by_main(partial(pinned, cfg.model.weights))})
    given = cfg
    cfg = scale_config(cfg, world_size())
    checkpoint = share_last_checkpoint(cfg.output_dir, set_aside=True) if resume else None
    if resume and checkpoint is None:
        by_main(partial(refuse_no_run, cfg.output_dir))
    known = CheckpointMetadata() if checkpoint is None else checkpoint.metadata
    cfg = _decide_seed(cfg, known)
    given, cfg = (_with_parts_of(each, checkpoint) for each in (given, cfg))
    start = _first_iteration(cfg, checkpoint)

    _check_accumulation(cfg)
    loader, dataset = build_train_loader(cfg, rank=get_rank(), world_size=world_size(), start_iteration=start)
    if checkpoint is not None and not other_classes:
        check_classes_of_run(dataset, checkpoint)
    check_classes(dataset, cfg.model.roi_heads.num_classes)
    given, cfg = (_with_class_weights(each, dataset) for each in (given, cfg))
    tests = load_test_sets(cfg)
    test_sets = {name: test_set for name, (_, test_set) in tests.items()}
    for test_set in test_sets.values():
        owner = f"dataset {dataset.name}, which is trained on,"
        advice = "give both the same names, or leave out of the test set what is not trained"
        match_classes(test_set, dataset.class_names, owner, advice)
    _check_best_metric(cfg, next(iter(test_sets.values()), dataset))
    data = describe_data(cfg, dataset, test_sets)
    if checkpoint is not None:
        check_changes(given, checkpoint, data, allow_changes)
    warn_of_faults(dataset, list(test_sets.values()))

    torch.manual_seed(cfg.seed)
    model = make_model(cfg)
    check_synchronised_norms(model, device)
    if checkpoint is not None:
        load_weights(model, checkpoint)
        logger.info("resuming from %s at iteration %d", checkpoint.path, start)
    elif cfg.model.weights:
        names = dataset.class_names
        weights, converted = read_starting_weights(cfg)
        report = load_weights(model, weights, for_training=True, config=cfg, class_names=names)
        report.converted = [*converted, *report.converted]
        logger.info("%s", report)
    model.to(device).train()
    state = make_state(cfg, model)
    cfg = with_measured_parts(cfg, state, dataset)
    if cfg.model.freeze or cfg.solver.lr_multipliers:
        logger.info("%s", Lines(describe_parameters(model, state.optimizer)))
    run = Run(cfg, device, model, state, loader, dataset, tests, data, start)
    if checkpoint is not None:
        run.state.restore(known, str(checkpoint.path))
        set_learning_rate(run.state.optimizer, learning_rate_factor(cfg, max(start - 1, 0)))
        run.losses = known.losses or {}
        if is_main():
            run.best, iteration = _best_so_far(given, data)
            run.stale = count_evaluations(run.folder, iteration, start - 1)
        run.check_patience()
    return run


def load_test_sets(cfg: Config) -> TestSets:
    """Return loader and dataset for this process's share of each set of ``DATASETS.TEST``."""
    build = partial(build_test_loader, cfg, rank=get_rank(), world_size=world_size())
    return {name: build(name) for name in cfg.datasets.test}


def _first_iteration(cfg: Config, checkpoint: Checkpoint | None) -> int:
    """Return the iteration after that of a checkpoint.

    With ``SOLVER.REFERENCE_WORLD_SIZE`` and another number of processes than before, iterations have another
    batch size: the result is the iteration before which as many images were seen, rounded down.
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
    """Replace a negative ``SEED``: by the checkpoint's, or by a random one, equal in all processes."""
    if cfg.seed >= 0:
        return cfg
    seed = from_main(secrets.randbelow(2**31))
    return cfg.replace({"SEED": seed if known.seed is None else known.seed})


def _with_class_weights(cfg: Config, dataset: CocoDataset) -> Config:
    """Replace ``CLASS_WEIGHTS auto`` by numbers: 1 / sqrt(objects), with a mean of 1 over the objects.

    A class without objects has the weight of one with a single object.
    """
    if cfg.model.roi_box_head.class_weights != "auto":
        return cfg
    counts = np.bincount(dataset.objects.labels, minlength=len(dataset.class_names))
    weights = 1 / np.sqrt(np.maximum(counts, 1))
    weights /= (counts * weights).sum() / counts.sum()
    return cfg.replace({"MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS": [round(float(w), 4) for w in weights]})


def _with_parts_of(cfg: Config, checkpoint: Checkpoint | None) -> Config:
    """Replace ``ACCUMULATE auto`` by the number that was measured when the run began."""
    saved = saved_config(checkpoint) if checkpoint is not None and not cfg.solver.accumulate else None
    return cfg if saved is None else cfg.replace({"SOLVER.ACCUMULATE": saved.solver.accumulate})


def _check_accumulation(cfg: Config) -> None:
    solver, unit = cfg.solver, world_size() * cfg.solver.accumulate
    if solver.accumulate > 1 and solver.ims_per_batch % unit:
        raise UserError(
            "indivisible-batch",
            f"SOLVER.IMS_PER_BATCH {solver.ims_per_batch} is not divisible by {world_size()} processes times "
            f"SOLVER.ACCUMULATE {solver.accumulate}; set it to a multiple of {unit}",
        )


def _check_best_metric(cfg: Config, dataset: CocoDataset) -> None:
    """Refuse a ``SOLVER.BEST_CHECKPOINT_METRIC`` that no evaluation on ``dataset`` gives."""
    metric = cfg.solver.best_checkpoint_metric
    if metric == "auto":
        return
    kind, _, name = metric.partition("/")
    if kind == "boundary" and not cfg.test.boundary_ap:
        raise UserError(
            "conflicting-keys", f"SOLVER.BEST_CHECKPOINT_METRIC {metric} needs TEST.BOUNDARY_AP True; add it"
        )
    if kind != "bbox" and not cfg.model.mask_on:
        raise UserError(
            "conflicting-keys",
            f"SOLVER.BEST_CHECKPOINT_METRIC {metric} needs MODEL.MASK_ON True; choose bbox/{name}",
        )
    listed = zip(dataset.class_names, dataset.category_ids, strict=True)
    known = [*METRICS, *(f"AP-{category}" for category, i in listed if i is not None)]
    if name not in known:
        raise UserError(
            "bad-value",
            f"SOLVER.BEST_CHECKPOINT_METRIC {metric} is unknown; after {kind}/ choose {', '.join(METRICS)} "
            f"or AP-<category>",
        )


def best_metric(cfg: Config) -> str:
    """Return the name of the scalar that decides the best checkpoint, of the first test set if of several."""
    metric = cfg.solver.best_checkpoint_metric
    if metric == "auto":
        metric = "segm/AP" if cfg.model.mask_on else "bbox/AP"
    return metric if len(cfg.datasets.test) < 2 else f"{cfg.datasets.test[0]}/{metric}"


def _best_so_far(cfg: Config, data: dict[str, str]) -> tuple[float, int]:
    """Return the value in ``model_best.pth`` and its iteration.

    They are -1 and the newest possible iteration if there is none, or it is of other test data or metric.
    """
    path, none = Path(cfg.output_dir) / BEST, (-1.0, sys.maxsize)
    if not path.is_file():
        return none
    try:
        best = read_checkpoint(path)
    except UserError as error:
        logger.warning("%s is passed over, and the next evaluation replaces it: %s", BEST, error)
        return none
    for change in changes(cfg, best, data):
        if change.key.removeprefix("the content of ").startswith(BEST_IS_OF):
            return none
    value, iteration = best.metadata.others.get(best_metric(cfg)), best.metadata.iteration
    return (value, iteration) if isinstance(value, float) and iteration is not None else none


def lock_folder(lock: FolderLock) -> None:
    """Lock ``OUTPUT_DIR`` if it exists, before anything is written.

    Raises:
        UserError: another training uses it, or it cannot be written.
    """
    if lock.folder.is_dir():
        check_writable(lock.folder / CONFIG)
        lock.take()


def open_run_folder(run: Run, resume: bool = False) -> None:
    """Create ``OUTPUT_DIR`` and write ``config.yaml`` and ``environment.json``.

    With ``resume``, files in the folder belong to this run if they are of the same config.
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


def make_folder(path: str | Path) -> None:
    """Create a run folder, or raise UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "cannot-write", f"OUTPUT_DIR {path} cannot be created: {error.strerror}; {remedy(error)}"
        ) from error


def write_run_config(cfg: Config, device: torch.device) -> None:
    """Write ``config.yaml``, with absolute paths, and ``environment.json`` into ``OUTPUT_DIR``."""
    folder, named = Path(cfg.output_dir), {*cfg.datasets.train, *cfg.datasets.test}
    if named - cfg.datasets.registered.keys():  # some are built in
        cfg = cfg.replace({"DATASETS.ROOT": str(datasets_root(cfg))})
    cfg = with_absolute_paths(cfg)
    atomic_write_text(folder / CONFIG, dump_config(cfg))
    environment = {**_describe_environment(device), FOLDER: cfg.output_dir}
    atomic_write_json(folder / ENVIRONMENT, environment, indent=2)


def _describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware, for readers of the run's numbers."""
    described: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
        "device": str(device),
        "processes": world_size(),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    return described


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the processor's name, which Linux has only in a file."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
