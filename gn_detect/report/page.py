"""Put the parts of a report into its page."""

from __future__ import annotations

import importlib.resources
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config.paths import FOLDER
from ..data import resolve_dataset
from ..engine.checkpoint import AUGMENTED
from ..errors import UserError
from ..evaluation import ERRORS, METRICS, read_truth
from ..files import atomic_write_text
from ..visualize import Curve, Metrics, draw_chart, is_average, is_loss, is_validation_loss, metric_points
from ..weights.metadata import program_version
from .analysis import IOU_AVERAGES, RECALLS, Analysis, ImageResult, analyse, condense
from .comparison import Comparison, Difference, compare_on, conclusion
from .pictures import Choice, Picture, choose_changed, choose_images, draw_pictures
from .run_folder import RunFolder, TestSet, read_run

logger = logging.getLogger(__name__)

KINDS = {"bbox": "box", "segm": "mask"}
HELP = {
    "classification": "More images of the classes that are confused, or one class for what looks alike.",
    "localisation": "Larger images (INPUT.MIN_SIZE_TRAIN and _TEST), anchors of the objects' sizes "
    "(MODEL.ANCHOR_GENERATOR.SIZES), a cascade (MODEL.ROI_HEADS.NAME CascadeROIHeads), tighter annotations.",
    "both": "More images of these classes, and longer training.",
    "duplicate": "A lower MODEL.ROI_HEADS.NMS_THRESH_TEST.",
    "background": "Look whether these are objects without an annotation. If not: images without objects in "
    "the training set (DATALOADER.FILTER_EMPTY_ANNOTATIONS False), a higher score threshold.",
    "missed": "More images of the class, larger images, smaller anchors; in crowded images a higher "
    "TEST.DETECTIONS_PER_IMAGE.",
}
"""What usually helps against each kind of error."""
MOST_ROWS = 2000  # images in the table: the worst
MOST_CURVES = 100  # categories with their own curves: the most frequent


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes:
        title: name of the vertical axis.
        svg: an SVG element.
        legend: name and number of the page's colour for each curve; empty for a single curve.
    """

    title: str
    svg: str
    legend: list[tuple[str, int]]

    @classmethod
    def of(cls, title: str, curves: list[Curve], x_label: str, key: str, **options: Any) -> Chart:
        """Draw the curves; ``key`` and ``options`` are those of :func:`draw_chart`."""
        legend = [(curve.name, curve.colour % 8) for curve in curves if curve.group in ("", "all")]
        svg = draw_chart(curves, x_label, key, **options)
        return cls(title, svg, legend if len(legend) > 1 else [])


@dataclass
class Change:
    """The difference from another run on one dataset.

    Attributes:
        name: of the other run.
        notice: the reason why it is missing; empty if it is there.
        differences: by IoU type; the other run is the first.
        sentences: on the AP of each IoU type.
        pictures: of the images that gained and lost most, each with its change of quality.
    """

    name: str
    notice: str = ""
    differences: dict[str, list[Difference]] = field(default_factory=dict)
    sentences: list[str] = field(default_factory=list)
    pictures: list[tuple[float, Picture]] = field(default_factory=list)


@dataclass
class Section:
    """The part of the page for one dataset.

    Attributes:
        name: the dataset.
        number: position on the page, from 0.
        metrics: see :class:`TestSet`.
        notice: the reason why parts are missing; empty if there is everything.
        analysis, pictures, curves, confusion: see their modules; empty with a notice.
        reliability: precision by score.
        change: from another run, if one is given.
    """

    name: str
    number: int
    metrics: Mapping[str, Mapping[str, float | None]]
    notice: str = ""
    analysis: Analysis | None = None
    pictures: list[Picture] = field(default_factory=list)
    curves: list[Chart] = field(default_factory=list)
    reliability: Chart | None = None
    confusion: tuple[np.ndarray, list[str]] | None = None
    change: Change | None = None

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The name, number of objects (None if unknown), AP by kind and best threshold of each category."""
        names = [key for row in list(self.metrics.values())[:1] for key in row if key.startswith("AP-")]
        counts: list[int | None] = [None] * len(names)
        thresholds: list[dict[str, float] | None] = [None] * len(names)
        if self.analysis is not None:
            names = [f"AP-{name}" for name in self.analysis.truth.class_names]
            counts = list(self.analysis.object_counts)
            thresholds = list(self.analysis.diagnosis[self.analysis.iou_type]["thresholds"].values())
        return [
            {
                "name": key.removeprefix("AP-"),
                "objects": count,
                "ap": {kind: row.get(key) for kind, row in self.metrics.items()},
                "threshold": threshold,
            }
            for key, count, threshold in zip(names, counts, thresholds, strict=True)
        ]

    @property
    def rows(self) -> list[ImageResult]:
        """The images of the table, the worst first."""
        images = self.analysis.images if self.analysis is not None else []
        return sorted(images, key=lambda i: 2.0 if i.quality is None else i.quality)[:MOST_ROWS]


def write_report(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    threshold: float = 0.5,
    pictures: int = 6,
    against: str | Path | None = None,
) -> Path:
    """Write the page of a run, which needs no network and no other file.

    The page says which datasets and parts of the run are missing.

    Args:
        folder: the run's.
        output: the page; by default ``report.html`` in the folder.
        threshold: least score of the detections in pictures, confusion and the table of images.
        pictures: number of the worst and of the best images that are shown.
        against: folder of another run, of which the page shows the differences.

    Returns:
        The path of the page.

    Raises:
        UserError: a folder is not a run's, a file in it is damaged, or the page cannot be written.
    """
    run = read_run(folder)
    other = None if against is None else read_run(against)
    sections = [
        _section(run, test, number, threshold, pictures, other) for number, test in enumerate(run.tests)
    ]
    page = render(run, sections, threshold).encode("utf-8", "replace").decode()  # JSON has half characters
    output = Path(output) if output else run.path / "report.html"
    atomic_write_text(output, page)
    return output


def _section(
    run: RunFolder, test: TestSet, number: int, threshold: float, pictures: int, other: RunFolder | None
) -> Section:
    section = Section(test.name, number, test.metrics)
    if test.results is None:
        section.notice = "There is no result file: evaluate the run again for curves, confusion and pictures."
        return section
    kinds = [kind for kind in KINDS if kind in test.metrics] or ["bbox"]
    try:
        source = resolve_dataset(run.cfg, test.name)
        truth = read_truth(source.annotations, kinds[-1])
        analysis = analyse(truth, test.results, kinds, threshold)
    except UserError as error:
        logger.warning("No curves, confusion and pictures: %s", error)
        section.notice = run.without_folders(f"No curves, confusion and pictures: {error}")
        return section
    section.analysis = analysis
    section.curves = [_precision_chart(analysis, kind, f"{number}-{kind}") for kind in kinds]
    section.reliability = _reliability_chart(analysis, f"{number}-reliability")
    section.confusion = condense(analysis.confusion, truth.class_names)

    def draw(chosen: Sequence[Choice]) -> list[Picture]:
        drawn = draw_pictures(analysis, source, chosen)
        return [replace(picture, reason=run.without_folders(picture.reason)) for picture in drawn]

    section.pictures = draw(choose_images(analysis.images, pictures))
    if other is not None:
        section.change = change = Change(other.path.resolve().name)
        try:
            comparison, before = _compare(run, other, test, kinds, threshold)
        except UserError as error:
            change.notice = run.without_folders(str(error))
            return section
        change.differences = comparison.kinds
        change.sentences = [
            f"{KINDS[kind]} {conclusion(rows[0], comparison.images)}"
            for kind, rows in comparison.kinds.items()
        ]
        changed = choose_changed(analysis.images, before, pictures)
        shown = draw([choice for _, choice in changed])
        change.pictures = [(by, picture) for (by, _), picture in zip(changed, shown, strict=True)]
    return section


def _compare(
    run: RunFolder, other: RunFolder, test: TestSet, kinds: Sequence[str], threshold: float
) -> tuple[Comparison, list[ImageResult]]:
    """Return the differences of ``run`` from ``other`` on a dataset, and the other run's images."""
    earlier = next((each for each in other.tests if each.name == test.name), None)
    if earlier is None or earlier.results is None:
        raise UserError("no-dataset", f"{other.path} has no results on {test.name}; evaluate it there")
    comparison = compare_on(test.name, [other, run], [earlier, test], 1)
    truth = read_truth(resolve_dataset(run.cfg, test.name).annotations, kinds[-1])
    return comparison, analyse(truth, earlier.results, kinds, threshold).images


def _precision_chart(analysis: Analysis, kind: str, key: str) -> Chart:
    """Draw the curves of all categories together, and of each: the page shows one choice at a time."""
    curves = []
    counts = np.array(analysis.object_counts)
    chosen = set(np.argsort(-counts, kind="stable")[:MOST_CURVES].tolist())
    for colour, name in enumerate(IOU_AVERAGES):
        precision = analysis.curves[kind][name]
        known = precision[~np.isnan(precision).all(axis=1)]
        rows = {"all": known.mean(axis=0) if len(known) else np.full(len(RECALLS), np.nan)}
        if len(precision) > 1:
            rows |= {
                str(label): row for label, row in enumerate(precision) if label in chosen and counts[label]
            }
        for group, row in rows.items():
            curves.append(Curve(f"IoU {name}", np.stack([RECALLS, row], axis=1), colour, group))
    return Chart.of(f"{KINDS[kind]} precision", curves, "recall", key, x_range=(0, 1), y_max=1.02)


def _reliability_chart(analysis: Analysis, key: str) -> Chart | None:
    """Draw the precision of the detections by their score; None without detections."""
    curves = []
    for colour, (kind, found) in enumerate(analysis.diagnosis.items()):
        bins = [each for each in found["calibration"]["bins"] if each["count"]]
        points = np.array([(each["score"], each["precision"] / 100) for each in bins])
        if len(points):
            curves.append(Curve(KINDS[kind], points, colour))
    if not curves:
        return None
    curves.append(Curve("scores that can be believed", np.array([[0.0, 0.0], [1.0, 1.0]]), len(curves)))
    return Chart.of("precision", curves, "score", key, x_range=(0, 1), y_max=1.02, marked=True)


def training_charts(logged: Metrics) -> list[Chart]:
    """Draw losses, AP, learning rate and throughput by iteration, as far as there are any."""
    names = logged.names
    chosen = {
        "loss": sorted(
            [name for name in names if is_loss(name) or is_validation_loss(name)],
            key=lambda name: (name != "total_loss", not is_validation_loss(name)),
        ),
        "AP (%)": [name for name in names if is_average(name, "AP", "AP50")],
        "learning rate": [name for name in names if name == "lr"],
        "images per second": [name for name in names if name == "images_per_second"],
    }
    charts, x_range = [], (0, 1.01 * max(logged.last + 1, 1))
    for title, shown in chosen.items():
        points = [(name.replace("_", " "), metric_points(logged, name)) for name in shown]
        curves = [Curve(name, line, colour) for colour, (name, line) in enumerate(points)]
        if curves:
            marked = title == "AP (%)"
            charts.append(Chart.of(title, curves, "iteration", title, x_range=x_range, marked=marked))
    return charts


def render(run: RunFolder, sections: list[Section], threshold: float) -> str:
    """Return the page's HTML. Everything from the run or its data is escaped."""
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
        kinds=KINDS | {f"{kind}{AUGMENTED}": f"{name} (TTA)" for kind, name in KINDS.items()},
        errors=ERRORS,
        help=HELP,
        threshold=threshold,
        version=program_version(),
        most_rows=MOST_ROWS,
        style=(folder / "page.css").read_text(encoding="utf-8"),
        script=(folder / "page.js").read_text(encoding="utf-8"),
    )
