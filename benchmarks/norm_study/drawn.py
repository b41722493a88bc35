"""The study's tables, in Markdown, and its figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev

from gn_detect.files import atomic_write

from .cells import BATCHES, GROUP_SIZES, GROUPS, NORMS, Cell, Task, depends_on_batch

Results = Mapping[Cell, Mapping[str, float]]

FIGURES: dict[Task, tuple[tuple[str, str], ...]] = {
    "classifier": (("error", "error, %"),),
    "detector": (("mask AP", "mask AP"), ("box AP", "box AP")),
}
"""For each task the results' keys, and what they are called in tables."""

LABELS = {"BN": "BN", "FrozenBN": "frozen BN", "GN": "GN", "GN1": "LN (GN, 1 group)", "IN": "IN"}


def tables(done: Results) -> str:
    """By number of images per worker and, of GN, by groups; then AP by size of the detectors."""
    parts = []
    for task, measures in FIGURES.items():
        for key, title in measures:
            if any(cell.task == task for cell in done):
                parts += [_by_batch(done, task, key, title), _by_groups(done, task, key, title)]
    if any(cell.task == "detector" for cell in done):
        parts.append(_coco_table(done))
    for norm in NORMS:
        trained = [found for cell, found in done.items() if (cell.task, cell.norm) == ("detector", norm)]
        if diverged := sum("diverged" in found for found in trained):
            parts.append(
                f"{diverged} of {len(trained)} detectors with {LABELS[norm]} diverged, and count with AP 0."
            )
    return "\n\n".join(part for part in parts if part)


def figure(done: Results, path: Path) -> None:
    """Error (of masks: 100 - AP50) against the number of images per worker, one line for each norm."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 4.0), layout="constrained")
    measures: tuple[tuple[Task, str, str], ...] = (
        ("classifier", "error", "classifier's error, %"),
        ("detector", "mask AP50", "100 - mask AP50"),
    )
    for axes, (task, key, title) in zip(drawn.subplots(1, 2), measures, strict=True):
        for number, norm in enumerate(NORMS):
            points = [(batch, _values(done, _main(task, norm, batch), key)) for batch in BATCHES]
            points = [
                (batch, [100 - v if task == "detector" else v for v in values]) for batch, values in points
            ]
            points = [(batch, values) for batch, values in points if values]
            if points:
                spread = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
                axes.errorbar(
                    [batch for batch, _ in points], [mean(values) for _, values in points], spread,
                    marker="o", capsize=3, label=LABELS[norm], color=f"C{number}",
                )  # fmt: skip
        axes.set(xscale="log", xlabel="images per worker", ylabel=title)
        axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    lines = {}
    for axes in drawn.axes:
        handles, labels = axes.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    if lines:  # below both: inside it would lie on the curves
        drawn.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), frameon=False)
    with atomic_write(path, "wb") as file:
        drawn.savefig(file, format="png", dpi=130)


def _main(task: Task, norm: str, batch: int) -> Callable[[Cell], bool]:
    batch = batch if depends_on_batch(task, norm) else 2
    return lambda cell: (
        (cell.task, cell.norm, cell.batch, cell.groups, cell.group_size) == (task, norm, batch, 0, 0)
    )


def _values(done: Results, wanted: Callable[[Cell], bool], key: str) -> list[float]:
    """One for each seed."""
    return [found[key] for cell, found in done.items() if wanted(cell)]


def in_words(values: list[float]) -> str:
    """Mean and standard deviation over the seeds, and how many where they are not three."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {stdev(values):.1f}"


def _by_batch(done: Results, task: Task, key: str, title: str) -> str:
    lines = [f"| {task}: {title} | " + " | ".join(f"{batch}" for batch in BATCHES) + " | seeds |"]
    lines.append("|---" * (len(BATCHES) + 2) + "|")
    for norm in NORMS:
        found = [_values(done, _main(task, norm, batch), key) for batch in BATCHES]
        if any(found):
            counts = sorted({len(values) for values in found if values})
            seeds = "-".join(str(count) for count in sorted({counts[0], counts[-1]}))
            lines.append(f"| {LABELS[norm]} | " + " | ".join(map(in_words, found)) + f" | {seeds} |")
    if len(lines) <= 2:
        return ""
    if not depends_on_batch(task, "GN"):
        lines.append(
            "\nOf this task only BN depends on the batch: the others were trained once for each seed."
        )
    return "\n".join(lines)


def _by_groups(done: Results, task: Task, key: str, title: str) -> str:
    columns: dict[str, Callable[[Cell], bool]] = {"1 group": _main(task, "GN1", 2)}
    for groups in GROUPS:
        columns[f"{groups}"] = _split(task, groups, 0)
    columns["default"] = _main(task, "GN", 2)
    columns["1 channel"] = _main(task, "IN", 2)
    for size in GROUP_SIZES:
        columns[f"{size} channels"] = _split(task, 0, size)
    found = {name: in_words(_values(done, wanted, key)) for name, wanted in columns.items()}
    if not any(_values(done, columns[str(groups)], key) for groups in GROUPS):
        return ""
    return "\n".join(
        [
            f"| {task}, GN: {title} | " + " | ".join(found) + " |",
            "|---" * (len(found) + 1) + "|",
            "| 2 images per worker | " + " | ".join(found.values()) + " |",
        ]
    )


def _split(task: Task, groups: int, size: int) -> Callable[[Cell], bool]:
    return lambda cell: (cell.task, cell.norm, cell.groups, cell.group_size) == (task, "GN", groups, size)


def _coco_table(done: Results) -> str:
    """As the paper's tables 4 to 8: AP, AP50 and AP75 of boxes and masks, with 2 images per worker."""
    keys = [f"{kind} {key}" for kind in ("box", "mask") for key in ("AP", "AP50", "AP75")]
    lines = ["| detector, 2 images per worker | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for norm in NORMS:
        found = [in_words(_values(done, _main("detector", norm, 2), key)) for key in keys]
        if any(found):
            lines.append(f"| {LABELS[norm]} | " + " | ".join(found) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""
