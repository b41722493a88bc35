"""Puts the parts of a report into its page."""

from __future__ import annotations

import importlib.resources
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config.paths import FOLDER
from ..data import resolve_dataset
from ..errors import UserError
from ..evaluation import METRICS, read_truth
from ..files import atomic_write_text
from ..visualize import Metrics, is_average, is_loss, metric_points
from ..weights.metadata import program_version
from .analysis import IOU_AVERAGES, RECALLS, Analysis, analyse, condense
from .charts import Chart, line_chart
from .pictures import Picture, draw_pictures
from .run_folder import RunFolder, TestSet, read_run

logger = logging.getLogger(__name__)

KINDS = {"bbox": "box", "segm": "mask"}
MOST_ROWS, MOST_CURVES = 2000, 100
"""Images in the table and categories with curves of their own: the worst, and the most frequent."""


@dataclass
class Section:
    """A dataset's part of the page.

    Attributes:
        name: of the dataset.
        number: from 0.
        metrics: see :class:`TestSet`.
        notice: why parts are missing; empty where all is there.
        analysis, pictures, curves, confusion: see their modules; empty with a notice.
    """

    name: str
    number: int
    metrics: Mapping[str, Mapping[str, float | None]]
    notice: str = ""
    analysis: Analysis | None = None
    pictures: list[Picture] = field(default_factory=list)
    curves: list[Chart] = field(default_factory=list)
    confusion: tuple[np.ndarray, list[str]] | None = None

    @property
    def categories(self) -> list[dict[str, Any]]:
        """Name, number of objects (None where it is not known) and AP by kind of each category."""
        names = [key for row in list(self.metrics.values())[:1] for key in row if key.startswith("AP-")]
        counts: list[int | None] = [None] * len(names)
        if self.analysis is not None:
            names = [f"AP-{name}" for name in self.analysis.truth.class_names]
            counts = list(self.analysis.object_counts)
        return [
            {
                "name": key.removeprefix("AP-"),
                "objects": count,
                "ap": {kind: row.get(key) for kind, row in self.metrics.items()},
            }
            for key, count in zip(names, counts, strict=True)
        ]

    @property
    def rows(self) -> list[Any]:
        """The images of the table, the worst first."""
        if self.analysis is None:
            return []
        ranked = sorted(self.analysis.images, key=lambda i: 2.0 if i.quality is None else i.quality)
        return ranked[:MOST_ROWS]


def write_report(
    folder: str | Path, output: str | Path | None = None, *, threshold: float = 0.5, pictures: int = 6
) -> Path:
    """Write a run's page; it needs no network and no other file.

    Args:
        folder: of the run.
        output: the page; ``report.html`` in the folder by default.
        threshold: least score of the detections in pictures, confusion and the table of images.
        pictures: how many of the worst and of the best images are shown.

    Returns:
        The path of the page.

    Raises:
        UserError: it is no run's folder, a file in it is damaged, or the page cannot be written. Datasets
            that are not there, and parts of a run that are not there yet, are said on the page.
    """
    run = read_run(folder)
    sections = [_section(run, test, number, threshold, pictures) for number, test in enumerate(run.tests)]
    page = render(run, sections, threshold).encode("utf-8", "replace").decode()  # JSON has half characters
    output = Path(output) if output else run.path / "report.html"
    atomic_write_text(output, page)
    return output


def _section(run: RunFolder, test: TestSet, number: int, threshold: float, pictures: int) -> Section:
    section = Section(test.name, number, test.metrics)
    if test.results is None:
        section.notice = "There is no result file: evaluate the run again for curves, confusion and pictures."
        return section
    kinds = [kind for kind in KINDS if kind in test.metrics] or ["bbox"]
    try:
        source = resolve_dataset(run.cfg, test.name)
        truth = read_truth(source.annotations, kinds[-1])
        section.analysis = analyse(truth, test.results, kinds, threshold)
    except UserError as error:
        logger.warning("No curves, confusion and pictures: %s", error)
        section.notice = run.without_folders(f"No curves, confusion and pictures: {error}")
        return section
    section.curves = [_precision_chart(section.analysis, kind) for kind in kinds]
    section.confusion = condense(section.analysis.confusion, truth.class_names)
    drawn = draw_pictures(section.analysis, source, pictures)
    section.pictures = [replace(picture, reason=run.without_folders(picture.reason)) for picture in drawn]
    return section


def _precision_chart(analysis: Analysis, kind: str) -> Chart:
    """Curves of all categories together, and of each: the page shows one choice at a time."""
    series = []
    counts = np.array(analysis.object_counts)
    chosen = set(np.argsort(-counts, kind="stable")[:MOST_CURVES].tolist())
    for colour, name in enumerate(IOU_AVERAGES):
        precision = analysis.curves[kind][name]
        known = precision[~np.isnan(precision).all(axis=1)]
        mean = known.mean(axis=0) if len(known) else np.full(len(RECALLS), np.nan)
        series.append((f"IoU {name}", np.stack([RECALLS, mean], axis=1), colour, "all"))
        for label, row in enumerate(precision):
            if len(precision) > 1 and label in chosen and counts[label]:
                points = np.stack([RECALLS, row], axis=1)
                series.append((f"IoU {name}", points, colour, str(label)))
    return line_chart(f"{KINDS[kind]} precision", "recall", series, x_range=(0, 1), y_max=1)


def training_charts(logged: Metrics) -> list[Chart]:
    """Losses, AP, learning rate and throughput by iteration, those that there are."""
    names = logged.names
    losses = [name for name in names if is_loss(name)]
    end = max(logged.last + 1, 1)
    chosen = {
        "loss": sorted(losses, key=lambda name: name != "total_loss"),
        "AP (%)": [name for name in names if is_average(name, "AP", "AP50")],
        "learning rate": [name for name in names if name == "lr"],
        "images per second": [name for name in names if name == "images_per_second"],
    }
    return [
        line_chart(
            title,
            "iteration",
            {name.replace("_", " "): metric_points(logged, name) for name in shown},
            x_range=(0, end),
            dots=title == "AP (%)",
        )
        for title, shown in chosen.items()
        if shown
    ]


def render(run: RunFolder, sections: list[Section], threshold: float) -> str:
    """The page's HTML; whatever comes from the run or its data is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gn_detect.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{value:.1f}"
    folder = importlib.resources.files("gn_detect.report")
    return environment.get_template("page.html.jinja").render(
        run=run,
        environment={
            key: run.without_folders(str(value)) for key, value in run.environment.items() if key != FOLDER
        },
        title=run.path.resolve().name,
        sections=sections,
        charts=training_charts(run.logged),
        last_iteration=run.logged.last + 1,
        metrics=METRICS,
        kinds=KINDS,
        threshold=threshold,
        version=program_version(),
        most_rows=MOST_ROWS,
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
    )
