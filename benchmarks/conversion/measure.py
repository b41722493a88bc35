"""How much of a BatchNorm model's function its conversion keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_detect.convert import convert_norm

BOOTSTRAPS = 2000

Row = dict[str, Any]


@dataclass(frozen=True)
class Validation:
    """What the models are compared on.

    Attributes:
        images: (N, 3, H, W), normalised.
        labels: (N,) the class of each, -1 for none.
        by_neighbour: the models give features, whose accuracy is that of the nearest neighbour.
    """

    images: Tensor
    labels: Tensor
    by_neighbour: bool


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor) -> Tensor:
    """(N, D) in evaluation mode."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(32)])


def compare(original: Tensor, converted: Tensor, validation: Validation) -> Row:
    """Accuracy with its 95% interval, and three measures of likeness with the original's outputs.

    ``agreement`` is of the top class, for features of the nearest neighbour.
    """
    if validation.by_neighbour:
        before, after = _neighbours(original), _neighbours(converted)
        known = torch.bincount(validation.labels)[validation.labels] >= 2  # else there is none to find
        right = (validation.labels[after] == validation.labels)[known]
    else:
        before, after = original.argmax(1), converted.argmax(1)
        known = validation.labels >= 0
        right = (after == validation.labels)[known]
    same = before == after
    row: Row = {
        "agreement": same.float().mean().item(),
        "agreement_interval": bootstrap(same),
        "cosine": F.cosine_similarity(original, converted).mean().item(),
        "neighbours": (_neighbours(original) == _neighbours(converted)).float().mean().item(),
    }
    if known.any():
        row |= {"accuracy": right.float().mean().item(), "accuracy_interval": bootstrap(right)}
        of_original = (validation.labels[before] if validation.by_neighbour else before) == validation.labels
        row["kept_interval"] = bootstrap(right, of_original[known])
    return row


def bootstrap(hits: Tensor, of: Tensor | None = None, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean, or of its ratio to that of other hits on the same images."""
    values = hits.numpy().astype(np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (BOOTSTRAPS, len(values)))
    means = values[drawn].mean(1)
    if of is not None:
        others = of.numpy().astype(np.float64)[drawn].mean(1)
        means = means[others > 0] / others[others > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _neighbours(features: Tensor) -> Tensor:
    """Index of the most similar other row."""
    unit = F.normalize(features, dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-2.0)
    return similarity.argmax(1)


def initialisations(
    original: nn.Module, relative_eps: float, **rule: int
) -> dict[str, Callable[[], nn.Module]]:
    """What others do, and what we do without data, by name of the row."""

    def converted(init: Any) -> Callable[[], nn.Module]:
        return lambda: convert_norm(original, init=init, **rule)[0]

    return {
        "original": lambda: copy.deepcopy(original),
        "fresh": converted("reset"),
        "copied": converted("copy"),
        "matched": lambda: convert_norm(original, relative_eps=relative_eps, **rule)[0],
    }


def as_table(rows: dict[str, Row]) -> str:
    """One line for each model."""
    lines = [f"{'':14}{'accuracy':>24}{'agreement':>24}{'cosine':>8}{'same neighbour':>16}"]
    for name, row in rows.items():
        cells = [_with_interval(row, key) for key in ("accuracy", "agreement")]
        lines.append(f"{name:14}{cells[0]:>24}{cells[1]:>24}{row['cosine']:>8.3f}{row['neighbours']:>16.3f}")
    return "\n".join(lines)


def _with_interval(row: Row, key: str) -> str:
    if key not in row:
        return "-"
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.3f} ({low:.3f}-{high:.3f})"
