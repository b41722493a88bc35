"""Training: everything is checked first, then the run folder is written, then one step follows the other."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from ..distributed.group import (
    barrier,
    by_main,
    gather,
    get_rank,
    is_main,
    parallelize,
    restart_count,
    world_size,
)
from ..errors import Diverged, UserError
from ..evaluation import Interrupted
from ..layers import FrozenBatchNorm2d
from ..modeling.mask_rcnn import MaskRCNN
from ..structures import Sample
from ..weights import norm_settings
from .checkpoint import BEST, FINAL, RESULTS, checkpoint_name, save_checkpoint
from .divergence import examine, replay_command, seed_iteration, write_black_box
from .drawing import draw_curves, draw_test_images
from .evaluator import Results, evaluate_test_sets, make_folder, scalars_of, write_results
from .folder_lock import FolderLock
from .interruption import Interruption
from .meter import Meter, NotFinite
from .metrics import MetricsWriter, run_log
from .run import Run, best_metric, lock_folder, open_run_folder, prepare
from .run_config import write_run_config
from .schedule import learning_rate_factor, set_learning_rate
from .step import train_step

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

MAX_SKIPPED = 20
"""With ``SOLVER.NON_FINITE skip``: so many steps that are not finite end a run after all."""


def train(
    cfg: Config, *, resume: bool = False, allow_changes: bool = False, other_classes: bool = False
) -> Results:
    """Train the model of a config and evaluate it on ``DATASETS.TEST``.

    ``OUTPUT_DIR`` then holds ``config.yaml``, ``log.txt``, ``metrics.jsonl``, TensorBoard events,
    ``model_*.pth``, ``last_checkpoint``, ``inference/``, ``results.json`` and ``pictures/``. In a process
    group, each process calls this function.

    Args:
        cfg: whole config.
        resume: continue the run in ``OUTPUT_DIR`` from its newest checkpoint, with the same batches and
            random numbers as without the break. A run that has none yet begins again; a finished one is
            evaluated again. Workers that torchrun has restarted resume in any case.
        allow_changes: resume also with other settings or data than the run began with; without it, only
            length, periods, device, workers and paths may change.
        other_classes: resume also on data of as many classes with other names, taken by position.

    Returns:
        the final results; empty without test sets.

    Raises:
        UserError: data, classes, weights or settings do not fit, or there is no run to resume (nothing has
            been written then), or training diverged.
        SystemExit: SIGTERM (status 143) or SIGINT (130) came, and the run is saved.
    """
    resume = resume or restart_count() > 0
    with run_log() as log, FolderLock(cfg.output_dir) as lock:
        by_main(partial(lock_folder, lock))
        run = prepare(cfg, resume, allow_changes=allow_changes, other_classes=other_classes)
        run.lock = lock
        by_main(partial(open_run_folder, run, resume))
        if is_main():
            log.open(run.folder / "log.txt")
        again = run.evaluate_first or run.start >= run.cfg.solver.max_iter
        metrics = closing(MetricsWriter(run.folder, run.start, again)) if is_main() else nullcontext()
        with metrics as writer, Interruption() as interruption:
            try:
                training_loop(run, writer, interruption)
                results = finish(run, writer, interruption)
            except Interrupted:
                # Weights are saved before they are evaluated.
                leave(interruption.requested(), "during an evaluation; --resume repeats it")
        return results


def leave(number: int, what: str) -> NoReturn:
    """End the process after a signal.

    Args:
        number: of the signal.
        what: was done.

    Raises:
        SystemExit: with the status that shells give.
    """
    logger.warning("%s: %s", signal.Signals(number).name, what)
    raise SystemExit(128 + number)


def training_loop(run: Run, writer: MetricsWriter | None, interruption: Interruption) -> None:
    """From ``run.start`` to ``SOLVER.MAX_ITER``, with reports, checkpoints and evaluations on the way."""
    cfg, solver = run.cfg, run.cfg.solver
    if run.start >= solver.max_iter:
        logger.info("iteration %d of %d: nothing left to train", run.start, solver.max_iter)
        return
    if run.evaluate_first:
        evaluate_and_keep_best(run, writer, run.start - 1, interruption)
        run.evaluate_first = False
        if is_due(run.start, solver.checkpoint_period):
            save(run, writer, run.losses, run.start - 1)
    if cfg.model.compile:
        # One kernel for all sizes: kernels of single sizes would depend on which image comes first.
        run.model.backbone.compile(dynamic=True)
    model = parallelize(run.model, run.device)
    batches = iter(run.loader)
    meter = Meter(run.device, run.start, solver.max_iter, run.losses)
    logger.info("training on %s, processes: %d, seed: %d", run.device, world_size(), cfg.seed)

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
        # The checkpoint is saved before the evaluation, which may fail or be killed, and again after it.
        run.evaluate_first = evaluate_now or (last and bool(run.tests))
        if report_now:
            check_folder(run, writer, iteration, meter.state())
            scalars = meter.report(solver.base_lr * factor)
            if writer is not None:
                writer.write(iteration, scalars)
        with meter.pause():
            if save_now or stop:
                save(run, writer, meter.state(), iteration)
            if evaluate_now and not stop:
                try:
                    evaluate_and_keep_best(run, writer, iteration, interruption)
                except Interrupted:
                    if not save_now:
                        save(run, writer, meter.state(), iteration)
                    raise
                run.evaluate_first = False
                if save_now:
                    save(run, writer, meter.state(), iteration)
        if stop:
            leave(stop, f"saved after iteration {done}; --resume continues")


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
    check_folder(run, writer, iteration, losses)
    if writer is not None:
        writer.sync()
        write_checkpoint(run, losses, iteration)
    barrier()


def write_checkpoint(run: Run, losses: dict[str, list[float]], iteration: int) -> None:
    """Write the checkpoint after an iteration, in the first process."""
    last = iteration + 1 == run.cfg.solver.max_iter
    save_checkpoint(
        run.folder,
        FINAL if last else checkpoint_name(iteration),
        run.state.evaluated,
        run.metadata(iteration, losses),
        keep=run.cfg.checkpoint.keep,
    )


def check_folder(
    run: Run, writer: MetricsWriter | None, iteration: int, losses: dict[str, list[float]] | None = None
) -> None:
    """Save what was trained and stop, where somebody deleted the run's folder.

    Args:
        run: its folder may be gone, or be made again by what was written since.
        writer: in the first process.
        iteration: the last that was done.
        losses: see :func:`save`.

    Raises:
        UserError: the folder was deleted.
    """
    if writer is None or run.lock.is_there():
        return
    run.lock.release()
    make_folder(run.folder)
    run.lock.take(patience=0)  # another run may have begun there
    write_run_config(run.cfg, run.device)
    write_checkpoint(run, losses or {}, iteration)
    raise UserError(
        f"OUTPUT_DIR {run.folder} was deleted while the run went on, with all that it held; it is made again "
        f"with the checkpoint after iteration {iteration + 1}: --resume continues from there"
    )


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
    eps = norm_settings(run.model).norm_eps
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


def evaluate_and_keep_best(
    run: Run, writer: MetricsWriter | None, iteration: int, interruption: Interruption
) -> Results:
    """Evaluate on all test sets and write ``model_best.pth`` if the model is better than before.

    Raises:
        Interrupted: a signal came before there were results.
    """
    model = cast(MaskRCNN, run.state.evaluated)
    results = evaluate_test_sets(run.cfg, model, run.tests, interruption)
    scalars = scalars_of(results)
    check_folder(run, writer, iteration)
    if writer is not None:
        writer.write(iteration, scalars)
    metric = best_metric(run.cfg)
    value = scalars.get(metric, float("nan"))
    if value > run.best:
        run.best = value
        if is_main():
            metadata = replace(run.origin(), iteration=iteration, others={metric: value})
            save_checkpoint(run.folder, BEST, model, metadata, is_last=False)
            logger.info("best %s so far: %.2f, saved as %s", metric, value, BEST)
    return results


def finish(run: Run, writer: MetricsWriter | None, interruption: Interruption) -> Results:
    """Final evaluation, ``results.json`` and pictures.

    Raises:
        Interrupted: a signal came before the end.
    """
    results: Results = {}
    last = run.cfg.solver.max_iter - 1
    if run.tests:
        results = evaluate_and_keep_best(run, writer, last, interruption)
        if run.evaluate_first and run.start <= last + 1:
            run.evaluate_first = False
            save(run, writer, {}, last)  # with what is best now
    if is_main():
        write_results(run.folder / RESULTS, results)
        with suppress(Interrupted), interruption.at_once():
            draw_curves(run.folder, run.folder / "pictures" / "curves.png")
            for _, test_set in run.tests.values():
                model = cast(MaskRCNN, run.state.evaluated)
                show = None if writer is None else partial(writer.add_picture, iteration=last)
                draw_test_images(run.cfg, model, test_set, Path(run.folder) / "pictures", show)
    if interruption.requested():  # the other processes wait here for the first
        raise Interrupted
    check_folder(run, writer, last)
    logger.info("finished: see %s", run.folder)
    return results
