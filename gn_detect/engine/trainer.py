"""Training: check everything, write the run folder, then train, save and evaluate to the last iteration."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NoReturn, cast

from ..distributed.group import (
    barrier,
    by_main,
    from_main,
    get_rank,
    is_main,
    parallelize,
    restart_count,
    share,
    world_size,
)
from ..errors import Diverged, UserError
from ..evaluation import Interrupted
from ..modeling.mask_rcnn import MaskRCNN
from .checkpoint import BEST, FINAL, PICTURES, RESULTS, checkpoint_name, save_checkpoint
from .divergence import keep_black_box
from .drawing import draw_curves, draw_test_images
from .evaluator import Results, evaluate_test_sets, headline, scalars_of, score_thresholds, write_results
from .folder_lock import FolderLock
from .interruption import Interruption
from .loggers import Loggers
from .metrics import Meter, MetricsWriter, NotFinite, run_log
from .optimizer import learning_rate_factor, set_learning_rate
from .precise_bn import update_run
from .run import Run, best_metric, lock_folder, make_folder, open_run_folder, prepare, write_run_config
from .step import seed_iteration, train_step

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

MAX_SKIPPED = 20  # with SOLVER.NON_FINITE skip, this number of steps that are not finite ends a run


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
            loggers = Loggers(run.cfg, run.start)
            run.writer = MetricsWriter(run.folder, run.start, loggers, evaluate_again=run.start >= run.end)
        with closing(run.writer) if run.writer else nullcontext(), Interruption() as interruption:
            try:
                results = training_loop(run, interruption)
                finish(run, results, interruption)
            except Interrupted:
                leave(interruption.requested(), "during an evaluation; --resume repeats it")
        return results


def leave(number: int, message: str) -> NoReturn:
    """Log the signal and a message, and end the process with the status that shells give."""
    logger.warning("%s: %s", signal.Signals(number).name, message)
    raise SystemExit(128 + number)


def training_loop(run: Run, interruption: Interruption) -> Results:
    """Train, save and evaluate from iteration ``run.start`` to ``SOLVER.MAX_ITER``; return the last results.

    An evaluation follows the checkpoint of the same iteration. It ends with a line in ``metrics.jsonl``; if
    that line is missing, a resumed run begins with this evaluation.
    """
    cfg, solver = run.cfg, run.cfg.solver
    results: Results = {}
    if run.start >= run.end:
        logger.info("iteration %d of %d: nothing left to train", run.start, run.end)
        run.done = run.end
    elif cfg.model.compile:
        # One kernel for all sizes: kernels of single sizes would depend on which image comes first.
        run.model.backbone.compile(dynamic=True)
    # The first process knows from metrics.jsonl; a finished run is evaluated in any case.
    is_known = run.start == 0 or (run.writer is not None and run.writer.is_evaluated)
    run.is_evaluated = run.start < run.end and from_main(is_known)
    if run.state.graphs is None:
        model = parallelize(run.model)
    else:  # the step averages gradients itself
        model = run.model
        share(model.state_dict().values())
    batches = iter(run.loader)
    meter = Meter(run.device, run.done, run.end, run.losses)
    if run.done < run.end:
        logger.info("training on %s, processes: %d, seed: %d", run.device, world_size(), cfg.seed)

    while True:
        with saved_on_failure(run, meter):
            if run.tests and not run.is_evaluated and run.is_due(cfg.test.eval_period):
                with meter.pause():
                    update_run(run)
                    results = evaluate_and_keep_best(run, interruption)
                    if run.done >= run.end and (run.scores or run.stopped):
                        save(run, meter.state())  # with them; if it is stopped, perhaps for the first time
            if run.done >= run.end:
                return results
            with meter.waiting_for_data():
                batch = next(batches)

        factor = learning_rate_factor(cfg, run.done)
        set_learning_rate(run.state.optimizer, factor)
        seed_iteration(cfg.seed, run.done, get_rank())
        losses, broken = train_step(cfg, model, batch, run.state)
        meter.add(losses, broken, batch)
        run.done += 1
        run.is_evaluated = False

        stop = interruption.requested()
        save_now = bool(stop) or run.is_due(solver.checkpoint_period)
        evaluate_now = bool(run.tests) and run.is_due(cfg.test.eval_period)
        report_now = run.is_due(solver.log_period) or run.is_due(solver.checkpoint_period) or evaluate_now
        check_finite(run, meter, now=report_now or save_now)
        if report_now:
            record(run, meter.report(solver.base_lr * factor))
        if run.is_due(cfg.test.eval_period) and not stop:
            with meter.pause():
                update_run(run)  # first, so that the checkpoint holds what is evaluated
        if save_now:
            with meter.pause():
                save(run, meter.state())
        if stop:
            leave(stop, f"saved after iteration {run.done}; --resume continues")


@contextmanager
def saved_on_failure(run: Run, meter: Meter) -> Iterator[None]:
    """Save the weights if data cannot be read, or if a signal ends an evaluation.

    All processes notice a signal, but only one a file that cannot be read, and a checkpoint needs all.
    """
    try:
        yield
    except (UserError, Interrupted) as error:
        if run.done > run.saved and (world_size() == 1 or isinstance(error, Interrupted)):
            check_finite(run, meter, now=True)
            save(run, meter.state())
            if isinstance(error, UserError):
                logger.warning(
                    "saved after iteration %d; once the data are mended, --resume continues", run.done
                )
        raise


def save(run: Run, losses: dict[str, list[float]]) -> None:
    """Write a checkpoint in the first process, with the losses since the last report; the others wait."""
    check_folder(run, losses)
    if run.writer is not None:
        run.writer.sync()
        _write_checkpoint(run, losses)
    run.saved = run.done
    barrier()


def _write_checkpoint(run: Run, losses: dict[str, list[float]]) -> None:
    name = FINAL if run.done == run.end else checkpoint_name(run.done - 1)
    metadata = run.metadata(losses)
    save_checkpoint(run.folder, name, run.state.evaluated, metadata, keep=run.cfg.checkpoint.keep)


def record(run: Run, scalars: dict[str, float]) -> None:
    """Write scalars of the last iteration in the first process."""
    check_folder(run)
    if run.writer is not None:
        run.writer.write(run.done - 1, scalars)


def check_folder(run: Run, losses: dict[str, list[float]] | None = None) -> None:
    """If somebody deleted the run's folder, make it again, save the weights, and raise UserError.

    The folder may exist again, because something was written into it since; the file of the lock does not.
    """
    if run.writer is None or run.lock.is_there():
        return
    run.lock.release()
    make_folder(run.folder)
    run.lock.take(patience=0)  # another run may have begun there
    write_run_config(run.cfg, run.device)
    _write_checkpoint(run, losses or {})
    run.saved = run.done
    raise UserError(
        "deleted-folder",
        f"OUTPUT_DIR {run.folder} was deleted while the run went on, with all that it held; it is made again "
        f"with the checkpoint after iteration {run.done}: --resume continues from there",
    )


def check_finite(run: Run, meter: Meter, now: bool) -> None:
    """Write a black box of a step whose loss or gradient was not finite; then stop, or log the skipped step.

    Losses are read from the device if ``now``. With ``SOLVER.NON_FINITE skip`` they are read after each step,
    because the next step changes the weights that the black box needs.

    Raises:
        Diverged: with ``SOLVER.NON_FINITE stop``, or after too many skipped steps.
    """
    stops = run.cfg.solver.non_finite == "stop"
    if stops and not now:
        return
    try:
        meter.state()
    except NotFinite as error:
        with meter.pause():
            message = keep_black_box(run, error)
        run.skipped += 1
        if stops or run.skipped >= MAX_SKIPPED:
            raise Diverged("diverged", message) from None
        logger.warning("step skipped: %s", message)


def evaluate_and_keep_best(run: Run, interruption: Interruption) -> Results:
    """Evaluate on all test sets, and write ``model_best.pth`` if the model is better than before.

    The scalars are written last: they mark an evaluation that is complete.
    """
    model = cast(MaskRCNN, run.state.evaluated)
    # Augmented evaluation costs many times as much, so it follows the last iteration only, as in detectron2.
    at_end = run.done >= run.end
    results = evaluate_test_sets(run.cfg, model, run.tests, interruption, "", at_end)
    check_folder(run)
    scalars = scalars_of(results)
    metric = best_metric(run.cfg)
    value = scalars.get(metric, float("nan"))
    run.thresholds = score_thresholds(run.cfg, results, run.tests)
    run.scores = headline(scalars)
    run.stale += 1
    if is_main() and value > run.best:
        run.best, run.stale = value, 0
        metadata = replace(
            run.origin(),
            iteration=run.done - 1,
            score_thresholds=run.thresholds,
            results=run.scores,
            others={metric: value},
        )
        save_checkpoint(run.folder, BEST, model, metadata, is_last=False)
        logger.info("best %s so far: %.2f, saved as %s", metric, value, BEST)
    run.check_patience()
    if run.stopped and not at_end:
        patience = run.cfg.solver.early_stop.patience
        logger.info("no better %s in %d evaluations: training ends (SOLVER.EARLY_STOP)", metric, patience)
        if run.cfg.test.aug.enabled:  # this is the last iteration after all
            results = evaluate_test_sets(run.cfg, model, run.tests, interruption, augmented=True)
            scalars = scalars_of(results)
            run.scores = headline(scalars)
    record(run, scalars)
    run.is_evaluated = True
    return results


def finish(run: Run, results: Results, interruption: Interruption) -> None:
    """Write ``results.json`` and pictures; a signal ends this with Interrupted."""
    if is_main():
        write_results(run.folder / RESULTS, results)
        if run.writer is not None:
            run.writer.finish()
        with suppress(Interrupted), interruption.at_once():
            folder = run.folder / PICTURES
            draw_curves(run.folder, folder / "curves.png")
            for _, test_set in run.tests.values():
                model = cast(MaskRCNN, run.state.evaluated)
                show = None if run.writer is None else partial(run.writer.add_picture, iteration=run.done - 1)
                draw_test_images(run.cfg, model, test_set, folder, show)
    if interruption.requested():  # the other processes wait here for the first
        raise Interrupted
    check_folder(run)
    if run.state.graphs is not None:
        logger.info("CUDA graphs ran %d of %d passes", run.state.graphs.replays, run.state.graphs.runs)
    logger.info("finished: see %s", run.folder)
