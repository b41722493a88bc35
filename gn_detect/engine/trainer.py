"""Training: everything is checked first, then the run folder is written, then one step follows the other."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..errors import Diverged, UserError
from ..layers import FrozenBatchNorm2d
from ..modeling.mask_rcnn import MaskRCNN
from ..structures import Sample
from ..weights import NORM_EPS, NORM_GROUPS, USUAL_EPS, norm_settings
from .black_box import examine, replay_command, seed_iteration, write_black_box
from .checkpoint import BEST, FINAL, RESULTS, checkpoint_name, save_checkpoint
from .distributed import barrier, gather, get_rank, is_main, parallelize, restart_count, world_size
from .evaluator import Results, evaluate_test_sets, scalars_of, write_results
from .interruption import Interruption
from .meter import Meter, NotFinite
from .pictures import draw_curves, draw_test_images
from .run import Run, best_metric, open_run_folder, prepare
from .schedule import learning_rate_factor, set_learning_rate
from .step import train_step
from .writers import MetricsWriter, run_log

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

MAX_SKIPPED = 20
"""With ``SOLVER.NON_FINITE skip``: so many steps that are not finite end a run after all."""


def train(cfg: Config, *, resume: bool = False) -> Results:
    """Train the model of a config and evaluate it on ``DATASETS.TEST``.

    ``OUTPUT_DIR`` then holds ``config.yaml``, ``log.txt``, ``metrics.jsonl``, TensorBoard events,
    ``model_*.pth``, ``last_checkpoint``, ``inference/``, ``results.json`` and ``pictures/``. In a process
    group, each process calls this function.

    Args:
        cfg: whole config.
        resume: continue from the newest checkpoint of ``OUTPUT_DIR``, if there is one, with the same batches
            and random numbers as without the break. A finished run is evaluated again. Workers that torchrun
            has restarted resume in any case.

    Returns:
        the final results; empty without test sets.

    Raises:
        UserError: data, classes, weights or settings do not fit (nothing has been written then), or training
            diverged.
        SystemExit: SIGTERM (status 143) or SIGINT (130) came, and the run is saved.
    """
    resume = resume or restart_count() > 0
    with run_log() as log:
        run = prepare(cfg, resume)
        if is_main():
            open_run_folder(run)
            log.open(run.folder / "log.txt")
        barrier()
        again = run.evaluate_first or run.start >= run.cfg.solver.max_iter
        metrics = closing(MetricsWriter(run.folder, run.start, again)) if is_main() else nullcontext()
        with metrics as writer:
            training_loop(run, writer)
            results = finish(run, writer)
        return results


def training_loop(run: Run, writer: MetricsWriter | None) -> None:
    """From ``run.start`` to ``SOLVER.MAX_ITER``, with reports, checkpoints and evaluations on the way."""
    cfg, solver = run.cfg, run.cfg.solver
    if run.start >= solver.max_iter:
        logger.info("iteration %d of %d: nothing left to train", run.start, solver.max_iter)
        return
    if run.evaluate_first:
        evaluate_and_keep_best(run, writer, run.start - 1)
        run.evaluate_first = False
    if cfg.model.compile:
        # One kernel for all sizes: kernels of single sizes would depend on which image comes first.
        run.model.backbone.compile(dynamic=True)
    model = parallelize(run.model, run.device)
    batches = iter(run.loader)
    meter = Meter(run.device, run.start, solver.max_iter, run.losses)
    logger.info("training on %s, processes: %d, seed: %d", run.device, world_size(), cfg.seed)

    with Interruption() as interruption:
        for iteration in range(run.start, solver.max_iter):
            done = iteration + 1
            last = done == solver.max_iter
            save_now = last or is_due(done, solver.checkpoint_period)
            evaluate_now = bool(run.tests) and not last and is_due(done, cfg.test.eval_period)

            with saved_if_unreadable(run, writer, meter, iteration), meter.waiting_for_data():
                batch = next(batches)
            factor = learning_rate_factor(cfg, iteration)
            set_learning_rate(run.state.optimizer, factor)
            seed_iteration(cfg.seed, iteration, get_rank())
            losses, broken = train_step(cfg, model, batch, run.state)
            meter.add(losses, broken, batch)

            stop = interruption.requested()
            report_now = is_due(done, solver.log_period) or save_now or evaluate_now
            check_finite(run, meter, now=report_now or bool(stop))
            if report_now:
                scalars = meter.report(solver.base_lr * factor)
                if writer is not None:
                    writer.write(iteration, scalars)
            with meter.pause():
                # Saved before the evaluation, which may fail or be killed, and with its outcome after it.
                run.evaluate_first = evaluate_now or (last and bool(run.tests))
                if save_now or stop:
                    save(run, writer, meter.state(), iteration)
                if evaluate_now and not stop:
                    evaluate_and_keep_best(run, writer, iteration)
                    run.evaluate_first = False
                    if save_now:
                        save(run, writer, meter.state(), iteration)
            if stop:
                logger.warning(
                    "%s: saved after iteration %d; --resume continues", signal.Signals(stop).name, done
                )
                raise SystemExit(128 + stop)


def is_due(done: int, period: int) -> bool:
    """Whether something happens after ``done`` iterations; a period of 0 means never."""
    return period > 0 and done % period == 0


@contextmanager
def saved_if_unreadable(
    run: Run, writer: MetricsWriter | None, meter: Meter, iteration: int
) -> Iterator[None]:
    """A file that cannot be read in the middle of a run costs no iteration that was done.

    Of several processes one alone sees the fault, and a checkpoint needs all.
    """
    try:
        yield
    except UserError:
        if world_size() == 1 and iteration > run.start:
            check_finite(run, meter, now=True)
            save(run, writer, meter.state(), iteration - 1)
            logger.warning(
                "saved after iteration %d; once the data are mended, --resume continues", iteration
            )
        raise


def save(run: Run, writer: MetricsWriter | None, losses: dict[str, list[float]], iteration: int) -> None:
    """The checkpoint after an iteration, by the first process; the others wait for it.

    Args:
        losses: since the last report.
    """
    if writer is not None:
        writer.sync()
        last = iteration + 1 == run.cfg.solver.max_iter
        save_checkpoint(
            run.folder,
            FINAL if last else checkpoint_name(iteration),
            run.state.evaluated,
            run.metadata(iteration, losses),
            keep=run.cfg.checkpoint.keep,
        )
    barrier()


def check_finite(run: Run, meter: Meter, now: bool) -> None:
    """Stop at, or note, a step whose loss or gradient was not finite, with a black box.

    Args:
        now: read the losses from the device. Where such steps are skipped, they are read in each iteration:
            the next step changes the weights that the black box holds.

    Raises:
        Diverged: as it says.
    """
    if not now and run.cfg.solver.non_finite == "stop":
        return
    try:
        meter.state()
    except NotFinite as error:
        with meter.pause():
            message = keep_black_box(run, error)
        run.skipped += 1
        if run.cfg.solver.non_finite == "stop" or run.skipped >= MAX_SKIPPED:
            raise Diverged(message) from None
        logger.warning("step skipped: %s", message)


def keep_black_box(run: Run, error: NotFinite) -> str:
    """Write ``OUTPUT_DIR/black_box/``; all processes take part. Returns one line about it."""
    run.state.optimizer.zero_grad(set_to_none=True)
    items = next(islice(run.loader.batches(), error.iteration - run.start, None))
    batch: list[Sample] = [run.loader.samples[item] for item in items]
    weights, scale = run.model.state_dict(), run.state.scaler.get_scale()
    told = norm_settings(run.model)
    eps = dict.fromkeys(told.get(NORM_GROUPS, {}), USUAL_EPS) | told.get(NORM_EPS, {})
    finding = examine(run.cfg, weights, batch, error.iteration, get_rank(), scale, eps)
    findings = dict(enumerate(gather(finding)))
    guilty = [rank for rank, found in findings.items() if not found.is_finite] or list(findings)
    batches = dict(enumerate(gather(batch if get_rank() in guilty else [])))
    folder = run.folder / "black_box" / f"iteration_{error.iteration:07d}"
    kept = {rank: batches[rank] for rank in guilty}
    if is_main():
        found = {rank: findings[rank] for rank in guilty}
        write_black_box(folder, run.cfg, weights, error.iteration, kept, found, scale, eps)
    values = ", ".join(f"{name} {value:.4g}" for name, value in error.losses.items())
    ids = ", ".join(str(sample.image_id) for part in kept.values() for sample in part)
    return (
        f"training diverged at iteration {error.iteration}: {values} (image ids {ids}); "
        f"{findings[guilty[0]]}; {_remedy(run)}; {replay_command(folder)} repeats the step"
    )


def _remedy(run: Run) -> str:
    """What to do when training diverges."""
    frozen = any(isinstance(module, FrozenBatchNorm2d) for module in run.model.modules())
    if frozen and not run.cfg.model.weights and run.start == 0:
        return "FrozenBN without MODEL.WEIGHTS normalises nothing: set MODEL.RESNETS.NORM GN, or give weights"
    return (
        f"lower SOLVER.BASE_LR ({run.cfg.solver.base_lr:g}), warm up longer with SOLVER.WARMUP_ITERS "
        f"or set SOLVER.CLIP_GRADIENTS.ENABLED True"
    )


def evaluate_and_keep_best(run: Run, writer: MetricsWriter | None, iteration: int) -> Results:
    """Evaluate on all test sets and write ``model_best.pth`` if the model is better than before."""
    model = cast(MaskRCNN, run.state.evaluated)
    results = evaluate_test_sets(run.cfg, model, run.tests)
    scalars = scalars_of(results)
    if writer is not None:
        writer.write(iteration, scalars)
    metric = best_metric(run.cfg)
    value = scalars.get(metric, float("nan"))
    if value > run.best:
        run.best = value
        if is_main():
            metadata = {"iteration": iteration, metric: value, **run.origin()}
            save_checkpoint(run.folder, BEST, model, metadata, is_last=False)
            logger.info("best %s so far: %.2f, saved as %s", metric, value, BEST)
    return results


def finish(run: Run, writer: MetricsWriter | None) -> Results:
    """Final evaluation, ``results.json`` and pictures."""
    results: Results = {}
    last = run.cfg.solver.max_iter - 1
    if run.tests:
        results = evaluate_and_keep_best(run, writer, last)
        if run.evaluate_first and run.start <= last + 1:
            run.evaluate_first = False
            save(run, writer, {}, last)  # with what is best now
    if is_main():
        write_results(run.folder / RESULTS, results)
        draw_curves(run.folder, run.folder / "pictures" / "curves.png")
        for _, test_set in run.tests.values():
            model = cast(MaskRCNN, run.state.evaluated)
            show = None if writer is None else partial(writer.add_picture, iteration=last)
            draw_test_images(run.cfg, model, test_set, Path(run.folder) / "pictures", show)
        logger.info("finished: see %s", run.folder)
    barrier()
    return results
