"""The length of a training by passes over the data, or by time."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Collection
from itertools import islice
from typing import TYPE_CHECKING

import torch

from ..data import CocoDataset, join_datasets, resolve_dataset
from ..data.loader import trainable_images, training_images
from ..distributed.group import from_main, parallelize
from ..errors import UserError
from .optimizer import set_learning_rate
from .run import Run, prepare
from .step import seed_iteration, train_step

if TYPE_CHECKING:
    from ..config import Config

logger = logging.getLogger(__name__)

_FIRST, _MEASURED = 2, 8  # iterations: the first ones choose algorithms and take memory
_BATCHES = 4  # of a test set

_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")


def read_time(text: str) -> float:
    """Return the seconds of a text such as ``2h``, ``1h30m``, ``45min`` or ``600s``.

    Raises:
        UserError: it is something else, or 0.
    """
    found = _TIME.fullmatch(text.strip().lower().replace(" ", ""))
    hours, minutes, seconds = (float(part or 0) for part in (found.groups() if found else (0, 0, 0)))
    total = hours * 3600 + minutes * 60 + seconds
    if not total:
        raise UserError("bad-argument", f"--time {text}: write it as 2h, 1h30m, 45m or 600s")
    return total


def of_epochs(cfg: Config, epochs: float, given: Collection[str] = ()) -> Config:
    """Return a config whose training goes ``epochs`` times over the images that are trained on.

    Args:
        cfg: whole config.
        epochs: may be a fraction.
        given: keys that do not follow, see :func:`with_length`.

    Raises:
        UserError: ``epochs`` is not above 0, or the data are wrong.
    """
    if not 0 < epochs < math.inf:
        raise UserError("bad-argument", f"--epochs {epochs:g}: it must be above 0")
    parts = [
        CocoDataset(resolve_dataset(cfg, name), masks=cfg.model.mask_on, quiet=True)
        for name in cfg.datasets.train
    ]
    if not parts:
        raise UserError("no-dataset", "DATASETS.TRAIN is empty; name the dataset to train on")
    images = training_images(cfg, join_datasets(parts))
    count = len(trainable_images(images, cfg.dataloader.filter_empty_annotations))
    return with_length(cfg, max(1, round(epochs * count / cfg.solver.ims_per_batch)), given)


def with_length(cfg: Config, iterations: int, given: Collection[str] = ()) -> Config:
    """Return a config with another ``SOLVER.MAX_ITER``; steps, warm-up and periods follow in proportion.

    Args:
        cfg: whole config.
        iterations: the new length.
        given: keys of the user, which stay as they are.
    """
    factor = iterations / cfg.solver.max_iter

    def scaled(value: int) -> int:
        return max(1, round(value * factor)) if value else 0

    solver = cfg.solver
    keys = {
        "SOLVER.STEPS": sorted({scaled(step) for step in solver.steps}),
        "SOLVER.WARMUP_ITERS": scaled(solver.warmup_iters),
        "SOLVER.CHECKPOINT_PERIOD": scaled(solver.checkpoint_period),
        "TEST.EVAL_PERIOD": scaled(cfg.test.eval_period),
    }
    followed = {key: value for key, value in keys.items() if key not in given}
    return cfg.replace({"SOLVER.MAX_ITER": iterations, **followed})


def within(cfg: Config, seconds: float, given: Collection[str] = ()) -> Config:
    """Return a config whose training and evaluations take about ``seconds`` on this machine.

    Some iterations and detections of a network that is thrown away are timed. All processes call this.

    Args:
        cfg: whole config.
        seconds: for the run, without its start.
        given: keys that do not follow, see :func:`with_length`.

    Raises:
        UserError: the time is too short, or data, weights or keys are wrong.
    """
    run = prepare(cfg, False)
    step, evaluation = from_main((_seconds_of_step(run), _seconds_of_evaluation(run)))
    period = cfg.test.eval_period
    evaluations = 1 if not period else max(1, round(cfg.solver.max_iter / period))
    left = seconds - evaluations * evaluation
    iterations = int(left / step)
    if iterations < 1:
        raise UserError(
            "bad-argument",
            f"--time: an iteration takes {step:.2g} s and an evaluation {evaluation:.2g} s here, so that "
            f"{seconds:.0f} s are too short; give more, or a longer TEST.EVAL_PERIOD",
        )
    logger.info(
        "an iteration takes %.3g s and each of %d evaluations about %.3g s: SOLVER.MAX_ITER %d",
        step,
        evaluations,
        evaluation,
        iterations,
    )
    cfg = cfg.replace({"SOLVER.ACCUMULATE": run.cfg.solver.accumulate})  # measured once
    return with_length(cfg, iterations, given)


def _seconds_of_step(run: Run) -> float:
    model = run.model if run.state.graphs is not None else parallelize(run.model)
    set_learning_rate(run.state.optimizer, 0.0)
    begin = time.perf_counter()
    for done, batch in enumerate(islice(run.loader, _FIRST + _MEASURED)):
        if done == _FIRST:
            _wait(run.device)
            begin = time.perf_counter()
        seed_iteration(run.cfg.seed, done, 0)
        train_step(run.cfg, model, batch, run.state)
    _wait(run.device)
    return (time.perf_counter() - begin) / _MEASURED


@torch.inference_mode()
def _seconds_of_evaluation(run: Run) -> float:
    """Return the time for the images of this process, which sees as many as the others."""
    run.model.eval()
    total = 0.0
    for loader, _ in run.tests.values():
        count, begin = 0, time.perf_counter()
        for batch in islice(loader, _BATCHES):
            run.model.detect([s.image for s in batch], [s.original_size for s in batch], paste=False)
            count += 1
        _wait(run.device)
        total += (time.perf_counter() - begin) / max(count, 1) * len(loader)
    return total


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
