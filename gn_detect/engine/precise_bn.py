"""PreciseBN: the statistics of BatchNorm as means over many batches with the weights as they are.

Running statistics are moving averages over iterations in which the weights changed (Wu and Johnson 2021,
arXiv 2105.07576, section 3).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..modeling.mask_rcnn import MaskRCNN
from ..structures import Sample, Target
from .step import split

if TYPE_CHECKING:
    from .run import Run

T = TypeVar("T")

logger = logging.getLogger(__name__)


def update_run(run: Run) -> None:
    """Recompute the statistics of the model that a run evaluates, on its next batches, once an iteration.

    The batches follow from seed and iteration, so a resumed run gets the same statistics.
    """
    settings = run.cfg.test.precise_bn
    if not settings.enabled or run.precise == run.done:
        return
    model = cast(MaskRCNN, run.state.evaluated)
    if not trained_norms(model):
        logger.info("no BatchNorm is trained: TEST.PRECISE_BN has nothing to do")
    else:
        logger.info("statistics of BatchNorm from %d batches", settings.num_iter)
        first = run.done - run.start
        chosen = islice(run.loader.batches(), first, first + settings.num_iter)
        batches = ([run.loader.samples[item] for item in items] for items in chosen)
        parts = (part for batch in batches for part in split(batch, run.cfg.solver.accumulate))

        def forward(part: list[Sample]) -> None:
            model.losses([s.image for s in part], [cast(Target, s.target) for s in part])

        recompute_statistics(model, forward, cast(Iterator[list[Sample]], parts))
    run.precise = run.done


def trained_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorms of all kinds that are in training mode."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]


@torch.no_grad()
def recompute_statistics(model: nn.Module, forward: Callable[[T], object], batches: Iterable[T]) -> None:
    """Set the running statistics of all BatchNorms in training mode to the means over ``batches``.

    As fvcore's ``update_bn_stats``: each batch counts by its number of values, and the variance is that of
    all values together.

    Args:
        model: its weights stay.
        forward: runs the model on a batch.
        batches: at least one.
    """
    norms = trained_norms(model)
    sums = {norm: _Sums(norm) for norm in norms}
    with _batch_statistics(norms, sums):
        for batch in batches:
            forward(batch)
    for norm, total in sums.items():
        total.store(norm)


class _Sums:
    """Means over batches, in float64."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.count = 0
        self.mean = torch.zeros_like(cast(Tensor, norm.running_mean), dtype=torch.float64)
        self.square = torch.zeros_like(self.mean)
        self.before = cast(Tensor, norm.running_mean).clone(), cast(Tensor, norm.running_var).clone()

    def add(self, norm: _BatchNorm, count: int) -> None:
        """Add a batch of ``count`` values in each channel; its statistics are the running ones."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = norm.running_mean.double()
        square = mean.square() + norm.running_var.double() * ((count - 1) / count)
        self.count += count
        self.mean += (mean - self.mean) * (count / self.count)
        self.square += (square - self.square) * (count / self.count)

    def store(self, norm: _BatchNorm) -> None:
        """Write the means; a norm that no batch reached keeps what it had."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, variance = (self.mean, self.square - self.mean.square()) if self.count else self.before
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


@contextmanager
def _batch_statistics(norms: list[_BatchNorm], sums: dict[_BatchNorm, _Sums]) -> Iterator[None]:
    """Let running statistics be those of the last batch alone, and add each to ``sums``."""

    def add(norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(norm, _BatchNorm)
        if inputs[0].numel():
            sums[norm].add(norm, inputs[0].numel() // inputs[0].shape[1])

    momenta = [norm.momentum for norm in norms]
    hooks = [norm.register_forward_hook(add) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
            norm.momentum = momentum
            hook.remove()
