"""Choose the groups and the relative eps of a conversion, and the number of steps of its calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .match import evaluation_mode
from .objective import Outputs, measure_errors, outputs_of_one_input
from .surgery import DEFAULT_GROUPS, DEFAULT_MIN_CHANNELS, convert_norm

# From the paper's GroupNorm to the one that keeps most. A larger eps keeps more still, but then the norm
# corrects less than half of a deviation of an image's variance.
CANDIDATES: tuple[dict[str, Any], ...] = (
    {"num_groups": DEFAULT_GROUPS, "min_channels_per_group": DEFAULT_MIN_CHANNELS, "relative_eps": 0.0},
    {"num_groups": DEFAULT_GROUPS, "min_channels_per_group": DEFAULT_MIN_CHANNELS, "relative_eps": 1.0},
    {"num_groups": 1, "min_channels_per_group": 1, "relative_eps": 1.0},
)
ENOUGH = 0.97  # mean cosine of the outputs before a calibration, which comes closer yet
MOST_IMAGES = 32  # that a choice is made on

# A rule of thumb: errors add up with the depth, and repeated images teach less.
STEPS_PER_NORM, PASSES, FEWEST_STEPS = 30, 8, 100


class Choice(NamedTuple):
    """Arguments of :func:`convert_norm`, and the mean cosine of the outputs that each candidate gave."""

    settings: dict[str, Any]
    similarity: list[tuple[dict[str, Any], float]]

    def __str__(self) -> str:
        words = [f"{_flags(settings)}: {cosine:.3f}" for settings, cosine in self.similarity]
        return f"chosen: {_flags(self.settings)} (outputs' cosine before calibration: {'; '.join(words)})"


def choose_settings(
    original: nn.Module,
    images: Tensor | Sequence[Any],
    given: Mapping[str, Any] | None = None,
    outputs: Outputs = outputs_of_one_input,
) -> Choice:
    """Choose groups and relative eps for :func:`convert_norm` and :func:`gn_detect.calibrate`.

    The paper's GroupNorm is taken if its matched outputs are close to the original's already; otherwise the
    first of the candidates that is, or the closest of all.

    Args:
        images: (N, C, H, W), or batches; up to 32 images, or batches, spread over all, are used.
        given: arguments of :func:`convert_norm` that are decided; the candidates take them as they are.
        outputs: see :func:`gn_detect.calibrate`.
    """
    some = images[:: -(-len(images) // MOST_IMAGES)]
    batches = list(some.split(8)) if isinstance(some, Tensor) else list(some)
    tried: list[tuple[dict[str, Any], float]] = []
    with evaluation_mode(original), torch.no_grad():
        for candidate in CANDIDATES:
            settings = candidate | dict(given or {})
            if any(settings == before for before, _ in tried):
                continue
            converted, _ = convert_norm(original, **settings)
            _, cosine = measure_errors(original, converted, [], batches, outputs)
            tried.append((settings, cosine))
            if cosine >= ENOUGH:
                break
    best = tried[-1] if tried[-1][1] >= ENOUGH else max(tried, key=lambda found: found[1])
    return Choice(best[0], tried)


def choose_steps(norms: int, batches: float) -> int:
    """Return the number of distillation steps for so many norms, and batches in a pass over the images."""
    return max(FEWEST_STEPS, min(STEPS_PER_NORM * norms, math.ceil(PASSES * batches)))


def _flags(settings: Mapping[str, Any]) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in settings.items())
