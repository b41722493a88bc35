"""Run the COCO evaluators: pycocotools is the reference, the others are faster and give the same numbers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .bootstrap import Ranked, only_matches, rank
from .coco_data import GroundTruth, Json
from .detections import DetectionTable
from .results_file import without_collector

BACKENDS = ("hotcoco", "faster_coco_eval", "pycocotools")  # fastest first

# Oldest versions shown to equal pycocotools; early ones of hotcoco gave other numbers without a warning.
_PROVEN_FROM = {"hotcoco": (1, 3), "faster_coco_eval": (1, 8)}

# COCO's ranges of areas in square pixels.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
_RANGES = [list(edges) for edges in AREAS.values()]

THRESHOLDS = 10  # COCO's IoU thresholds 0.5, 0.55, ..., 0.95

_IMAGES = 500  # matched at once by hotcoco


def choose_backend(name: str | None) -> str:
    """Return the evaluator to use: the named one; for None and ``"auto"`` the fastest installed proven one.

    Raises:
        UserError: it is unknown or not installed.
    """
    if name in (None, "auto"):
        return next(backend for backend in BACKENDS if _is_proven(backend))
    if name not in BACKENDS:
        raise UserError(
            "bad-value", f"TEST.COCO_EVAL_BACKEND: {name!r} is not one of auto, {', '.join(BACKENDS)}"
        )
    try:
        importlib.import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise UserError(
            "missing-package",
            f"TEST.COCO_EVAL_BACKEND: {name} is not installed; pip install {package}, or choose auto",
        ) from error
    return name


def _is_proven(backend: str) -> bool:
    if backend not in _PROVEN_FROM:
        return True
    try:
        importlib.import_module(backend)
        version = importlib.metadata.version(backend.replace("_", "-"))
        return tuple(int(part) for part in version.split(".")[:2]) >= _PROVEN_FROM[backend]
    except (ImportError, ValueError):
        return False


@dataclass(frozen=True)
class Pairs:
    """Detections with the objects that they were matched with, at one IoU threshold.

    They are at most 100 of each image and category, in order of the images, and within an image and category
    in descending order of scores.

    Attributes:
        rows: (D,) int64, positions in the table of detections.
        images, categories: (D,) int64, numbers of the ground truth.
        scores: (D,) float64.
        objects: (D,) int64, id of the annotation that a detection was matched with; 0 without one.
        ignored: (D,) bool, neither true nor false positives: matched with a crowd.
    """

    rows: np.ndarray
    images: np.ndarray
    categories: np.ndarray
    scores: np.ndarray
    objects: np.ndarray
    ignored: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


class Evaluators:
    """The evaluators of one backend for one dataset. They share what they can of its boxes and masks."""

    def __init__(self, truth: GroundTruth, detections: DetectionTable, backend: str) -> None:
        """Load nothing yet.

        Args:
            truth: the ground truth, with masks if masks are evaluated.
            detections: of the same IoU types.
            backend: one of :data:`BACKENDS`.
        """
        self._truth, self._detections, self._backend = truth, detections, backend

    def precision_and_recall(self, iou_type: str, categories: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate at COCO's 10 IoU thresholds, 4 ranges of area and at most 1, 10 and 100 detections.

        Args:
            iou_type: ``"bbox"``, ``"segm"`` or ``"boundary"``.
            categories: K numbers of the ground truth's, ascending.

        Returns:
            Precision (10, 101, K, 4, 3) at 101 recalls and recall (10, K, 4, 3); -1 without any object to
            find.

        Raises:
            UserError: the backend refuses a mask that is not valid RLE.
        """
        with self._quiet():
            if self._backend == "hotcoco" and iou_type != "boundary":
                evaluator = self._by_hotcoco(iou_type, categories)
            else:
                evaluator = self._other(iou_type)
                evaluator.params.catIds = list(categories)
                evaluator.evaluate()
            evaluator.accumulate()
        return np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])

    def ranked(self, iou_type: str) -> dict[tuple[int, int], Ranked]:
        """Match detections with objects for resampling, at most 100 of each image and category.

        Returns:
            The matches by position of a category in ``labels`` that has objects or detections, and by
            position of a range in :data:`AREAS`.

        Raises:
            UserError: the backend refuses a mask that is not valid RLE.
        """
        entries: dict[tuple[int, int], list[tuple[int, Json]]] = {}
        with self._quiet(), without_collector():
            for evaluator, _ in self._with_matches(iou_type):
                evaluator.evaluate()
                for entry in filter(None, evaluator.evalImgs):
                    key = entry["category_id"] - 1, _RANGES.index([float(edge) for edge in entry["aRng"]])
                    entries.setdefault(key, []).append((entry["image_id"] - 1, only_matches(entry)))
        images = len(self._truth.images)
        return {key: rank(found, images, THRESHOLDS) for key, found in entries.items()}

    def pairs(self, iou_type: str, iou: float = 0.5) -> Pairs:
        """Match detections with objects of any area at one IoU threshold.

        Raises:
            UserError: the backend refuses a mask that is not valid RLE.
        """
        columns: list[list[np.ndarray]] = [[np.empty(0, dtype=np.int64)] for _ in range(3)]
        with self._quiet(), without_collector():
            for evaluator, rows in self._with_matches(iou_type):
                evaluator.params.iouThrs = np.array([iou])
                evaluator.params.areaRng, evaluator.params.areaRngLbl = _RANGES[:1], ["all"]
                evaluator.evaluate()
                for entry in filter(None, evaluator.evalImgs):
                    if len(entry["dtIds"]):
                        columns[0].append(rows[np.asarray(entry["dtIds"], dtype=np.int64) - 1])
                        columns[1].append(np.asarray(entry["dtMatches"][0], dtype=np.int64))
                        columns[2].append(np.asarray(entry["dtIgnore"][0], dtype=np.int64))
        rows, objects, ignored = map(np.concatenate, columns)
        table = self._detections
        order = np.argsort(table.images[rows], kind="stable")
        rows, objects, ignored = rows[order], objects[order], ignored[order].astype(bool)
        objects[ignored] = 0
        return Pairs(rows, table.images[rows], table.categories[rows], table.scores[rows], objects, ignored)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Let an evaluator print and warn nothing, and name it in its errors."""
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            except ValueError as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    "bad-rle", f"{self._backend} cannot evaluate these masks: {reason}; encode them again"
                ) from error

    def _with_matches(self, iou_type: str) -> Iterator[tuple[Any, np.ndarray]]:
        """Yield evaluators that keep the matches of at most 100 detections of each image and category.

        Each comes with the rows of the table that are its detections 1, 2, ...
        """
        if self._backend == "hotcoco":
            parts = self._parts(iou_type)
        else:
            parts = iter([(self._other(iou_type, plain=True), np.arange(len(self._detections)))])
        for evaluator, rows in parts:
            evaluator.params.maxDets = [100]
            yield evaluator, rows

    def _parts(self, iou_type: str) -> Iterator[tuple[Any, np.ndarray]]:
        """Yield hotcoco's evaluators of some images each, with the rows of their detections."""
        hotcoco = importlib.import_module("hotcoco")
        known = self._ground_truth(iou_type)
        for images, objects, rows in self._split(known, np.arange(len(self._detections))):
            truth = hotcoco.COCO({**known, "images": images, "annotations": objects})
            columns = _columns(self._detections, rows, iou_type)
            masks = self._detections.masks(rows) if iou_type == "segm" else None
            yield hotcoco.COCOeval(truth, truth.load_res(columns, segmentation=masks), iou_type), rows

    def _split(self, known: Json, rows: np.ndarray) -> Iterator[tuple[list[Json], list[Json], np.ndarray]]:
        """Yield some images at a time with their annotations and those rows of the table."""
        objects: dict[int, list[Json]] = {}
        for annotation in known["annotations"]:
            objects.setdefault(annotation["image_id"], []).append(annotation)
        numbers = self._detections.images[rows]
        order = np.argsort(numbers, kind="stable")
        rows, numbers = rows[order], numbers[order]
        for first in range(0, len(known["images"]), _IMAGES):
            images = known["images"][first : first + _IMAGES]  # their ids are 1, 2, ...
            begin, end = np.searchsorted(numbers, [first + 1, first + len(images) + 1])
            annotations = [a for image in images for a in objects.get(image["id"], ())]
            yield images, annotations, rows[begin:end]

    def _ground_truth(self, iou_type: str) -> Json:
        # Names do not matter here, and hotcoco refuses some.
        coco = self._truth.coco
        numbered = [{"id": c["id"], "name": str(c["id"])} for c in coco["categories"]]
        annotations = self._truth.annotations(iou_type)
        if iou_type == "bbox":  # hotcoco would read the masks
            annotations = [{k: v for k, v in a.items() if k != "segmentation"} for a in annotations]
        return {"images": coco["images"], "categories": numbered, "annotations": annotations}

    def _by_hotcoco(self, iou_type: str, categories: Sequence[int]) -> Any:
        """Match some images at a time: hotcoco's own copy of all masks would fill the memory."""
        hotcoco = importlib.import_module("hotcoco")
        params = hotcoco.Params(iou_type)
        params.cat_ids = list(categories)
        known, table = self._ground_truth(iou_type), self._detections
        stream = hotcoco.StreamingEval(known["categories"], iou_type, params=params)
        rows = np.flatnonzero(np.isin(table.categories, categories))
        for images, objects, part in self._split(known, rows):
            masks = table.masks(part) if iou_type == "segm" else None
            stream.update(images, objects, _columns(table, part, iou_type), segmentation=masks)
        return stream.finalize()

    def _other(self, iou_type: str, plain: bool = False) -> Any:
        """Return an evaluator of faster_coco_eval, or of pycocotools, which alone keeps its matches."""
        boundary = iou_type == "boundary"
        iou_type = "segm" if boundary else iou_type
        known, table = self._ground_truth(iou_type), self._detections
        given = {**known, "annotations": [table.entry(row, iou_type) for row in range(len(table))]}
        if self._backend == "faster_coco_eval" and not plain and not boundary:
            module = importlib.import_module("faster_coco_eval")
            truth, found = module.COCO(known), module.COCO(given)
            return module.COCOeval_faster(truth, found, iou_type, print_function=lambda *_: None)
        coco = importlib.import_module("pycocotools.coco").COCO
        truth, found = coco(), coco()
        for data, index in ((known, truth), (given, found)):
            index.dataset = data
            index.createIndex()
        if boundary:
            from .boundary import BoundaryEval  # pycocotools' evaluator takes long to import

            return BoundaryEval(truth, found, "segm")
        return importlib.import_module("pycocotools.cocoeval").COCOeval(truth, found, iou_type)


def _columns(table: DetectionTable, rows: np.ndarray, iou_type: str) -> np.ndarray:
    """Return (N, 7) float64, the detections as hotcoco takes them: image, box, score, category.

    hotcoco takes the box's area for the detection's. Masks get a box with their area, which is not read
    otherwise.
    """
    boxes = table.boxes[rows]
    if iou_type == "segm":
        boxes = np.zeros((len(rows), 4))
        boxes[:, 2], boxes[:, 3] = table.areas["segm"][rows], 1
    return np.column_stack([table.images[rows], boxes, table.scores[rows], table.categories[rows]])
