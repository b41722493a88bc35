"""Show results as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..text import printable
from .coco import METRICS
from .diagnosis import ERRORS

_COLUMNS = 3


def format_results(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table: COCO's numbers in a row for each IoU type, and below them the AP of each category.

    Args:
        metrics: ``{"bbox": {...}, "segm": {...}}`` in percent.

    Returns:
        Lines of text; ``-`` for a value that COCO does not define.
    """
    first = max(5, *(len(kind) for kind in metrics))
    lines = [" " * first + "".join(f"{name:>7}" for name in METRICS)]
    lines += [
        f"{kind:<{first}}" + "".join(f"{_number(row[name]):>7}" for name in METRICS)
        for kind, row in metrics.items()
    ]
    names = [
        key.removeprefix("AP-") for row in list(metrics.values())[:1] for key in row if key.startswith("AP-")
    ]
    if len(names) < 2:
        return "\n".join(lines)
    width = max(len("category"), *(len(printable(name)) for name in names))
    cells = [
        f"{printable(name):<{width}}"
        + "".join(f"{_number(row[f'AP-{name}']):>7}" for row in metrics.values())
        for name in names
    ]
    columns = min(_COLUMNS, len(cells))
    head = f"{'category':<{width}}" + "".join(f"{kind:>7}" for kind in metrics)
    lines.append("   ".join([head] * columns))
    per_column = -(-len(cells) // columns)
    for row in range(per_column):
        lines.append("   ".join(cells[row::per_column]))
    return "\n".join(lines)


def format_errors(diagnosis: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the AP50 lost to each kind of error, in a row for each IoU type.

    Args:
        diagnosis: by IoU type, see :func:`diagnose`.
    """
    lines = ["AP50 lost to  " + "  ".join(ERRORS)]
    for kind, found in diagnosis.items():
        cells = (f"{_number(found['errors'][name]['AP50_lost']):>{len(name)}}" for name in ERRORS)
        lines.append(f"{kind:<14}" + "  ".join(cells))
    return "\n".join(lines)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"
