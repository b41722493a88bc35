"""The losses of a model on a test set."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch

from ..distributed.group import gather, get_rank, is_main, world_size
from ..progress import progress_bar
from ..structures import Sample, Target
from .model import Stop, agree, detection_memory_help, in_evaluation_mode

if TYPE_CHECKING:
    from ..modeling import MaskRCNN

logger = logging.getLogger(__name__)

VALIDATION = "validation"


@torch.no_grad()
def mean_losses(
    model: MaskRCNN, loader: Iterable[list[Sample]], stop: Stop | None = None
) -> dict[str, float]:
    """Return the means over images of ``total_loss`` and each loss; empty without an image.

    Norms use their running statistics. Proposals are as many as in training, so that the numbers compare
    with the training's. Each image seeds the choice of anchors and RoIs, so the result depends on weights and
    config alone, not on the number of processes. Weights, buffers and the state of random numbers stay.

    Args:
        model: on its device.
        loader: this process's images with targets, each by itself: every n-th of all, for n processes.
        stop: asked after each image.

    Raises:
        Interrupted: ``stop`` requests it; in all processes.
        UserError: an image cannot be read, or the memory of a GPU is too small for it.
    """
    rows: list[dict[str, float]] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with in_evaluation_mode(model), torch.random.fork_rng(devices):
        model.proposal_generator.training = True  # it alone, for the number of its proposals
        for count, (sample,) in enumerate(progress_bar(loader, desc="losses", unit="image", shown=is_main())):
            torch.manual_seed(get_rank() + count * world_size())  # the number of the image
            with detection_memory_help(sample.file_name):
                losses = model.losses([sample.image], [cast(Target, sample.target)])
            rows.append({name: float(loss) for name, loss in losses.items()})
            if stop is not None and stop.seen():
                break
    agree(stop)
    images = [row for part in gather(rows) for row in part]
    if not images:
        return {}
    # An exact sum does not depend on the order, in which processes differ.
    means = {name: math.fsum(row[name] for row in images) / len(images) for name in images[0]}
    means = {"total_loss": math.fsum(means.values()), **means}
    shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
    logger.info("losses on %d images: %s", len(images), shown)
    return means
