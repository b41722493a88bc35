"""Training: everything is checked first, then the run folder is written, then one step follows the other."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..config import dump_config
from ..data import (
    CocoDataset,
    SampleLoader,
    build_train_loader,
    check_classes,
    check_same_classes,
    warn_of_faults,
)
from ..errors import UserError
from ..evaluation import METRICS
from ..files import atomic_write_text
from ..layers import FrozenBatchNorm2d
from ..modeling.mask_rcnn import MaskRCNN
from ..structures import Sample
from ..weights import Checkpoint, load_weights, read_checkpoint
from .checkpoint import BEST, FINAL, checkpoint_name, find_last_checkpoint, save_checkpoint, start_anew
from .distributed import (
    barrier,
    check_synchronised_norms,
    from_main,
    get_rank,
    is_main,
    parallelize,
    resolve_device,
    scale_config,
    world_size,
)
from .evaluator import (
    Results,
    TestSets,
    evaluate_test_sets,
    load_test_sets,
    make_folder,
    scalars_of,
    write_results,
)
from .meter import Meter
from .model import make_model
from .optimizer import build_optimizer, clip_gradients, restore_optimizer
from .pictures import draw_curves, draw_test_images
from .schedule import learning_rate_factor, set_learning_rate
from .writers import MetricsWriter, run_log

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
        optimizer: over its trained parameters.
        loader, dataset: training batches, from ``start`` on.
        tests: the test sets.
        start: the first iteration; 0 unless the run is resumed.
        best: best value of ``SOLVER.BEST_CHECKPOINT_METRIC`` so far.
    """

    cfg: Config
    device: torch.device
    model: MaskRCNN
    optimizer: torch.optim.Optimizer
    loader: SampleLoader
    dataset: CocoDataset
    tests: TestSets
    start: int = 0
    best: float = -1.0
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.cfg.output_dir)


def train(cfg: Config, *, resume: bool = False) -> Results:
    """Train the model of a config and evaluate it on ``DATASETS.TEST``.

    ``OUTPUT_DIR`` then holds ``config.yaml``, ``log.txt``, ``metrics.jsonl``, TensorBoard events,
    ``model_*.pth``, ``last_checkpoint``, ``inference/``, ``results.json`` and ``pictures/``. In a process
    group, each process calls this function.

    Args:
        cfg: whole config.
        resume: continue from the newest checkpoint of ``OUTPUT_DIR``, if there is one, with the same batches
            and random numbers as without the break. A finished run is evaluated again.

    Returns:
        the final results; empty without test sets.

    Raises:
        UserError: data, classes, weights or settings do not fit (nothing has been written then), or training
            diverged.
    """
    with run_log() as log:
        run = prepare(cfg, resume)
        if is_main():
            open_run_folder(run)
            log.open(run.folder / "log.txt")
        barrier()
        with closing(MetricsWriter(run.folder, run.start)) if is_main() else nullcontext() as writer:
            training_loop(run, writer)
            results = finish(run, writer)
        return results


def prepare(cfg: Config, resume: bool) -> Run:
    """Check everything that can be checked, and build all parts; no file is written."""
    device = resolve_device(cfg)
    cfg = scale_config(cfg, world_size())
    checkpoint = _read_last_checkpoint(cfg) if resume else None
    cfg = _decide_seed(cfg, checkpoint)
    start = 0 if checkpoint is None else int(checkpoint.metadata.get("iteration", -1)) + 1

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
        load_weights(model, checkpoint)
        logger.info("resuming from %s at iteration %d", checkpoint.path, start)
    elif cfg.model.weights:
        logger.info("%s", load_weights(model, cfg.model.weights, for_training=True))
    model.to(device).train()
    optimizer = build_optimizer(cfg, model)
    run = Run(cfg, device, model, optimizer, loader, dataset, tests, start)
    if checkpoint is not None:
        restore_optimizer(optimizer, checkpoint.metadata.get("optimizer", {}), str(checkpoint.path))
        run.best = float(checkpoint.metadata.get("best", -1.0))
    return run


def _read_last_checkpoint(cfg: Config) -> Checkpoint | None:
    path = find_last_checkpoint(cfg.output_dir)
    if path is None:
        logger.info("%s has no checkpoint to resume from: training starts at iteration 0", cfg.output_dir)
        return None
    return read_checkpoint(path)


def _decide_seed(cfg: Config, checkpoint: Checkpoint | None) -> Config:
    """A negative ``SEED`` becomes a random one, equal in all processes; a resumed run keeps its own."""
    if cfg.seed >= 0:
        return cfg
    seed = from_main(secrets.randbelow(2**31))
    if checkpoint is not None:
        seed = int(checkpoint.metadata.get("seed", seed))
    return cfg.replace({"SEED": seed})


def open_run_folder(run: Run) -> None:
    """Create ``OUTPUT_DIR`` and write ``config.yaml``."""
    make_folder(run.folder)
    atomic_write_text(run.folder / "config.yaml", dump_config(run.cfg))
    if run.start == 0:
        start_anew(run.folder)


def training_loop(run: Run, writer: MetricsWriter | None) -> None:
    """From ``run.start`` to ``SOLVER.MAX_ITER``, with reports, checkpoints and evaluations on the way."""
    cfg, solver = run.cfg, run.cfg.solver
    if run.start >= solver.max_iter:
        logger.info("iteration %d of %d: nothing left to train", run.start, solver.max_iter)
        return
    model = parallelize(run.model, run.device)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    batches = iter(run.loader)
    meter = Meter(run.device, run.start, solver.max_iter, _remedy(run))
    logger.info("training on %s, %d processes, seed %d", run.device, world_size(), cfg.seed)

    for iteration in range(run.start, solver.max_iter):
        done = iteration + 1
        last = done == solver.max_iter
        save_now = last or is_due(done, solver.checkpoint_period)
        evaluate_now = bool(run.tests) and not last and is_due(done, cfg.test.eval_period)

        with meter.waiting_for_data():
            batch = next(batches)
        factor = learning_rate_factor(cfg, iteration)
        set_learning_rate(run.optimizer, factor)
        seed_iteration(cfg.seed, iteration, get_rank())
        losses = train_step(cfg, model, batch, run.optimizer, trained)
        meter.add(losses, batch)

        if is_due(done, solver.log_period) or save_now or evaluate_now:
            scalars = meter.report(solver.base_lr * factor)
            if writer is not None:
                writer.write(iteration, scalars)
        with meter.pause():
            if evaluate_now:
                evaluate_and_keep_best(run, writer, iteration)
            if save_now and is_main():
                save_checkpoint(
                    run.folder,
                    FINAL if last else checkpoint_name(iteration),
                    run.model,
                    _metadata(run, iteration),
                )


def train_step(
    cfg: Config,
    model: nn.Module,
    batch: Sequence[Sample],
    optimizer: torch.optim.Optimizer,
    trained: Sequence[nn.Parameter],
) -> dict[str, Tensor]:
    """One update of the weights. Returns the losses, still on the device."""
    losses = model([sample.image for sample in batch], [sample.target for sample in batch])
    optimizer.zero_grad(set_to_none=True)
    with record_function("backward"):
        torch.stack(list(losses.values())).sum().backward()
    with record_function("optimizer"):
        clip_gradients(cfg, trained)
        optimizer.step()
    return losses


def is_due(done: int, period: int) -> bool:
    """Whether something happens after ``done`` iterations; a period of 0 means never."""
    return period > 0 and done % period == 0


def seed_iteration(seed: int, iteration: int, rank: int) -> None:
    """Random numbers of the model as a function of the iteration.

    Nothing that happens between iterations, an evaluation or a break, can change them, and no random state
    has to be saved.
    """
    torch.manual_seed((seed * 1_000_003 + iteration) * 4093 + rank)


def _remedy(run: Run) -> str:
    """What to do when training diverges."""
    frozen = any(isinstance(module, FrozenBatchNorm2d) for module in run.model.modules())
    if frozen and not run.cfg.model.weights and run.start == 0:
        return "FrozenBN without MODEL.WEIGHTS normalises nothing: set MODEL.RESNETS.NORM GN, or give weights"
    return (
        f"lower SOLVER.BASE_LR ({run.cfg.solver.base_lr:g}), warm up longer with SOLVER.WARMUP_ITERS "
        f"or set SOLVER.CLIP_GRADIENTS.ENABLED True"
    )


def _metadata(run: Run, iteration: int) -> dict[str, Any]:
    """What a checkpoint holds beside the weights; ``iteration`` is the last one that was done, from 0."""
    return {
        "optimizer": run.optimizer.state_dict(),
        "iteration": iteration,
        "seed": run.cfg.seed,
        "best": run.best,
        **class_metadata(run.dataset),
    }


def class_metadata(dataset: CocoDataset) -> dict[str, Any]:
    """Names and ids of the classes, so that a checkpoint can be used without its dataset."""
    return {"class_names": list(dataset.class_names), "category_ids": list(dataset.category_ids)}


def evaluate_and_keep_best(run: Run, writer: MetricsWriter | None, iteration: int) -> Results:
    """Evaluate on all test sets and write ``model_best.pth`` if the model is better than before."""
    results = evaluate_test_sets(run.cfg, run.model, run.tests)
    scalars = scalars_of(results)
    if writer is not None:
        writer.write(iteration, scalars)
    metric = best_metric(run.cfg)
    value = scalars.get(metric, float("nan"))
    if value > run.best:
        run.best = value
        if is_main():
            metadata = {"iteration": iteration, metric: value, **class_metadata(run.dataset)}
            save_checkpoint(run.folder, BEST, run.model, metadata, is_last=False)
            logger.info("best %s so far: %.2f, saved as %s", metric, value, BEST)
    return results


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


def finish(run: Run, writer: MetricsWriter | None) -> Results:
    """Final evaluation, ``results.json`` and pictures."""
    results: Results = {}
    if run.tests:
        results = evaluate_and_keep_best(run, writer, run.cfg.solver.max_iter - 1)
    if is_main():
        write_results(run.folder / "results.json", results)
        draw_curves(run.folder, run.folder / "pictures" / "curves.png")
        for _, test_set in run.tests.values():
            draw_test_images(run.cfg, run.model, test_set, run.folder / "pictures")
        logger.info("finished: see %s", run.folder)
    barrier()
    return results
